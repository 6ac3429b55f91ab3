"""Vectors by key against a dictionary, whatever comes and goes."""

import numpy as np
import pytest

from patchsight_serve.nearest import normalize
from patchsight_serve.vectors import Vectors


def random(count: int, seed: int, dim: int = 6) -> np.ndarray:
    return normalize(np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32))


def test_a_random_history_equals_a_dictionary() -> None:
    rng, held, truth, key = np.random.default_rng(0), Vectors(6), {}, 0
    for step in range(300):
        count = int(rng.integers(0, 9))
        keys = key + np.cumsum(rng.integers(1, 4, count))
        key = int(keys.max(initial=key))
        vectors = random(count, step) if count else np.empty((0, 6), np.float32)
        held.add(keys, vectors)
        truth |= dict(zip(keys.tolist(), vectors, strict=True))
        gone = rng.integers(0, key + 3, int(rng.integers(0, 8)))  # some twice, some long gone, some never there
        there = set(gone.tolist()) & set(truth)
        assert held.remove(gone) == len(there)
        for one in there:
            del truth[one]
        assert held.ntotal == len(truth)
        assert held.keys().tolist() == sorted(truth)
        if not truth:
            continue
        asked = rng.integers(-2, key + 3, 20)
        assert held.present(asked).tolist() == [one for one in asked.tolist() if one in truth]
        some = rng.permutation(sorted(truth))
        assert (held.reconstruct_batch(some) == np.stack([truth[one] for one in some.tolist()])).all()
        query = random(1, 1000 + step)
        best = sorted(truth, key=lambda one: -float(truth[one] @ query[0]))
        scores, found = held.search(query, 5)
        assert found[0].tolist() == (best + [-1] * 5)[:5]
        np.testing.assert_allclose(scores[0][found[0] >= 0], [truth[o] @ query[0] for o in best[:5]], atol=1e-6)
        half = np.array([*best[::2], key + 1, -1])
        assert held.search(query, 5, held.only(half))[1][0].tolist() == (best[::2] + [-1] * 5)[:5]
        left = [one for one in best if one not in half]
        assert held.search(query, 5, held.all_but(half))[1][0].tolist() == (left + [-1] * 5)[:5]


def test_none_at_all_and_one_that_is_not_there() -> None:
    held = Vectors(6)
    assert held.keys().tolist() == []
    assert held.remove(np.array([0, 5])) == 0
    assert held.present(np.array([0, 5])).tolist() == []
    assert held.search(random(1, 0), 2)[1].tolist() == [[-1, -1]]
    held.add(np.array([0, 9]), random(2, 1))
    with pytest.raises(KeyError, match="5"):
        held.reconstruct_batch(np.array([9, 5]))
    assert held.remove(np.array([9, 0])) == 2
    assert held.keys().tolist() == []
    held.add(np.array([12]), random(1, 2))
    assert held.keys().tolist() == [12]
