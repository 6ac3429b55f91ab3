"""The approximate index: what it returns is right in score, let through by the selector, and nearly all there is."""

from collections.abc import Callable
from typing import Any

import faiss
import numpy as np
import pytest

from patchsight_serve.approximate import LEVELS, Plan, _own_scores, build, keys_of, search
from patchsight_serve.nearest import F32, I64, cosine, flat_index, normalize


def clustered(count: int, dim: int = 16, clusters: int = 40, seed: int = 0) -> F32:
    rng = np.random.default_rng(seed)
    centers = np.random.default_rng(99).standard_normal((clusters, dim))  # the same for every seed
    return normalize(
        (centers[rng.integers(0, clusters, count)] + 0.4 * rng.standard_normal((count, dim))).astype(np.float32)
    )


def of(vectors: F32, keys: I64) -> Callable[[I64], tuple[I64, F32]]:
    """What `build` reads."""
    place = {int(key): i for i, key in enumerate(keys)}
    return lambda wanted: (wanted, vectors[[place[int(key)] for key in wanted]])


def made(vectors: F32, keys: I64) -> tuple[Any, Plan]:
    built = build(keys, of(vectors, keys), lambda: None)
    assert built is not None
    return built


def best(vectors: F32, keys: I64, query: F32, k: int) -> set[int]:
    """Brute force; there are no ties in what is asked."""
    return set(keys[np.argsort(-cosine(vectors, query), kind="stable")[:k]].tolist())


@pytest.fixture(scope="module")
def gallery() -> tuple[F32, I64, Any, Plan]:
    vectors, keys = clustered(20_000), np.random.default_rng(1).permutation(50_000)[:20_000] + 1
    return vectors, keys, *made(vectors, keys)


def test_it_measures_how_many_lists_to_visit(gallery: tuple[F32, I64, Any, Plan]) -> None:
    vectors, keys, index, plan = gallery
    assert (plan.size, plan.lists) == (20_000, 20_000 // 39)
    assert plan.recall >= 0.99
    assert list(plan.probes) == sorted(plan.probes)
    assert plan.probes[0] < plan.lists / 4  # or it would be no faster than a flat one
    assert set(keys_of(index).tolist()) == set(keys.tolist())
    for k in (1, 10, 60, 1000):
        found = total = 0
        for query in clustered(60, seed=2):
            right = best(vectors, keys, query, k)
            mine, scores = search(index, plan, query, k, None, len(keys), exact=False)
            order = np.argsort(-scores)[:k]
            assert scores.tolist() == cosine(index.reconstruct_batch(mine), query).tolist()
            assert len(order) == k
            found += len(right & set(mine[order].tolist()))
            total += k
        assert found / total >= 0.95


def test_a_vector_is_no_neighbor_of_its_own(gallery: tuple[F32, I64, Any, Plan]) -> None:
    """The recall is not flattered by what every search finds."""
    vectors, keys, index, plan = gallery
    rows = np.arange(0, 20_000, 1000)
    scores = _own_scores(index, keys[rows], plan.lists, lambda: None)
    others = [np.sort(np.delete(cosine(vectors, vectors[row]), row))[::-1][:1000] for row in rows]
    np.testing.assert_allclose(scores, others, rtol=0, atol=1e-6)


def test_all_lists_are_brute_force(gallery: tuple[F32, I64, Any, Plan]) -> None:
    vectors, keys, index, plan = gallery
    for query in clustered(20, seed=3):
        mine, scores = search(index, plan, query, 20, None, len(keys), exact=True)
        assert set(mine[np.argsort(-scores)[:20]].tolist()) == best(vectors, keys, query, 20)


@pytest.mark.parametrize("share", [0.5, 0.02])
def test_as_many_as_exist_are_found_among_those_let_through(gallery: tuple[F32, I64, Any, Plan], share: float) -> None:
    """Also where none of them is in the lists that are visited at first: they are those farthest from the query."""
    vectors, keys, index, plan = gallery
    query = clustered(1, seed=4)[0]
    far = np.argsort(cosine(vectors, query))[: int(share * len(keys))]
    selector = faiss.IDSelectorBatch(keys[far])
    for k in (10, 300):
        mine, scores = search(index, plan, query, k, selector, len(far), exact=False)
        assert len(mine) >= k
        assert set(mine.tolist()) <= set(keys[far].tolist())
    everything, _ = search(index, plan, query, 1000, selector, len(far), exact=False)
    assert len(everything) >= min(1000, len(far))


def test_a_plan_visits_more_for_more_neighbors_and_for_rarer_ones() -> None:
    plan = Plan(lists=100, probes=(2, 5, 20), recall=0.99, size=10_000)
    assert [plan.visited(k) for k in (1, 10, 11, 100, 101, 1000, 1001)] == [2, 2, 5, 5, 20, 20, 100]
    assert [plan.visited(10, share) for share in (2.0, 1.0, 0.5, 0.3, 0.001)] == [2, 2, 4, 7, 100]
    assert len(plan.probes) == len(LEVELS)


def test_vectors_are_added_looked_up_and_removed_by_key() -> None:
    vectors, keys = clustered(2000), np.arange(1, 2001)
    index, plan = made(vectors, keys)
    more = clustered(100, seed=9)
    index.add_with_ids(more, np.arange(5001, 5101))
    index.remove_ids(np.array([1, 2, 3, 5001, 77_777]))
    assert set(keys_of(index).tolist()) == (set(range(4, 2001)) | set(range(5002, 5101)))
    assert index.ntotal == 2000 - 3 + 99
    assert (index.reconstruct_batch(np.array([5002, 4])) == np.stack([more[1], vectors[3]])).all()
    with pytest.raises(RuntimeError):
        index.reconstruct_batch(np.array([4, 5001]))
    for key, query in ((1, vectors[0]), (5001, more[0])):
        mine, _ = search(index, plan, query, 2000, None, 2096, exact=True)
        assert key not in mine


@pytest.mark.parametrize("count", [1, 2, 38, 39, 100])
def test_few_vectors_and_equal_ones(count: int) -> None:
    """One list, or lists that nothing is nearest to."""
    for vectors in (clustered(count), np.repeat(clustered(1), count, axis=0)):
        index, plan = made(vectors, np.arange(count))
        assert plan.recall >= 0.99
        mine, _ = search(index, plan, vectors[0], count, None, count, exact=False)
        assert set(mine.tolist()) == set(range(count))


def test_ten_thousand_equal_vectors() -> None:
    vectors = np.concatenate([np.repeat(clustered(1), 8000, axis=0), clustered(2000, seed=5)])
    index, plan = made(vectors, np.arange(10_000))
    mine, scores = search(index, plan, vectors[0], 10, None, 10_000, exact=False)
    assert set(range(8000)) <= set(mine.tolist())  # ties at the tenth place, all of them
    assert (scores[np.isin(mine, np.arange(8000))] == scores.max()).all()


def test_what_is_gone_while_it_is_built_is_not_read() -> None:
    vectors, keys = clustered(1000), np.arange(1000)
    odd = lambda wanted: (wanted[wanted % 2 == 1], vectors[wanted[wanted % 2 == 1]])  # noqa: E731
    built = build(keys, odd, lambda: None)
    assert built is not None
    assert set(keys_of(built[0]).tolist()) == set(range(1, 1000, 2))
    assert build(keys, lambda wanted: (wanted[:0], vectors[:0]), lambda: None) is None


def test_it_ends_when_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """At each of the places where it asks."""

    class Enough(Exception):
        pass

    vectors, keys = clustered(3000), np.arange(3000)
    monkeypatch.setattr("patchsight_serve.approximate.CHUNK", 512)
    asked = 0

    def count() -> None:
        nonlocal asked
        asked += 1

    build(keys, of(vectors, keys), count)
    assert asked > 40
    for last in (1, 5, asked - 1):
        left = last

        def go_on() -> None:
            nonlocal left
            left -= 1
            if not left:
                raise Enough

        with pytest.raises(Enough):
            build(keys, of(vectors, keys), go_on)


def test_keys_of_a_flat_index() -> None:
    flat = flat_index(16)
    assert keys_of(flat).tolist() == []
    flat.add_with_ids(clustered(5), np.array([9, 3, 7, 1, 5]))
    flat.remove_ids(np.array([7]))
    assert sorted(keys_of(flat).tolist()) == [1, 3, 5, 9]
