"""The approximate index: what it returns is right in score, let through by the selector, and nearly all there is."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import numpy as np
import pytest

from patchsight_serve.approximate import STEPS, Approximate, Plan
from patchsight_serve.index_build import _measured, _nearest, _probes, build
from patchsight_serve.nearest import F32, I64, cosine, normalize
from patchsight_serve.vectors import Vectors


def clustered(count: int, dim: int = 16, clusters: int = 40, seed: int = 0) -> F32:
    rng = np.random.default_rng(seed)
    centers = np.random.default_rng(99).standard_normal((clusters, dim))  # the same for every seed
    return normalize(
        (centers[rng.integers(0, clusters, count)] + 0.4 * rng.standard_normal((count, dim))).astype(np.float32)
    )


def free() -> AbstractContextManager[None]:
    """Nobody else reads or writes."""
    return nullcontext()


def made(vectors: F32, keys: I64) -> tuple[Vectors, Approximate]:
    held = Vectors(vectors.shape[1])
    held.add(keys, vectors)
    built = build(held, held.keys(), free, lambda: None)
    assert built is not None
    return held, built


def best(vectors: F32, keys: I64, query: F32, k: int) -> set[int]:
    """Brute force; there are no ties in what is asked."""
    return set(keys[np.argsort(-cosine(vectors, query), kind="stable")[:k]].tolist())


@pytest.fixture(scope="module")
def gallery() -> tuple[F32, I64, Vectors, Approximate]:
    vectors, keys = clustered(20_000), np.random.default_rng(1).permutation(50_000)[:20_000] + 1
    return vectors, keys, *made(vectors, keys)


def test_what_is_found_is_right_and_nearly_all(gallery: tuple[F32, I64, Vectors, Approximate]) -> None:
    vectors, keys, held, index = gallery
    plan = index.plan
    assert (plan.size, plan.lists) == (20_000, 282)
    assert plan.recall >= 0.99
    assert plan.typical < plan.lists / 4  # or it would be no faster than a flat one
    for k in (1, 10, 60, 1000):
        found = total = 0
        for query in clustered(60, seed=2):
            right = best(vectors, keys, query, k)
            mine, scores, _ = index.search(held, query, k)
            order = np.argsort(-scores)[:k]
            assert scores[order].tolist() == cosine(held.reconstruct_batch(mine[order]), query).tolist()
            assert len(order) == k
            found += len(right & set(mine[order].tolist()))
            total += k
        assert found / total >= 0.98


def test_queries_that_are_like_nothing_in_it_find_their_neighbors_too() -> None:
    """Each of 400 pictures is there 50 times, nearly the same; what a new one wants is far from all of them. With lists
    enough for the copies, nine of ten of its neighbors were missed."""
    rng, dim = np.random.default_rng(0), 64
    pictures = normalize(rng.standard_normal((400, dim)).astype(np.float32))
    vectors = normalize(np.repeat(pictures, 50, axis=0) + 0.02 * rng.standard_normal((20_000, dim)).astype(np.float32))
    keys = np.arange(20_000)
    held, index = made(vectors, keys)
    assert np.median([index.search(held, query, 10)[2] for query in vectors[:100]]) <= 10
    hits, lists = 0, []
    for query in normalize(rng.standard_normal((100, dim)).astype(np.float32)):
        mine, scores, visited = index.search(held, query, 10)
        hits += len(best(vectors, keys, query, 10) & set(mine[np.argsort(-scores)[:10]].tolist()))
        lists.append(visited)
    assert hits >= 0.95 * 1000
    assert np.median(lists) > 20


def test_the_recall_that_is_told_is_the_one_there_is(gallery: tuple[F32, I64, Vectors, Approximate]) -> None:
    """By brute force over all that was measured on, each without itself; with a plan that misses much."""
    vectors, keys, held, index = gallery
    poor = replace(index, plan=replace(index.plan, probes=(1,) * len(STEPS)))
    rows = np.arange(0, 20_000, 200)
    own = keys[rows], vectors[rows]
    near = [_nearest(held, index.codes.quantizer, int(key), query, keys, free) for key, query in zip(*own, strict=True)]
    told = _measured(poor, held, own, near, free).plan
    hits = 0
    for key, query, (scores, lists) in zip(*own, near, strict=True):
        right = best(vectors, keys, query, 11) - {key}
        others = np.sort(np.delete(cosine(vectors, query), np.flatnonzero(keys == key)))[::-1][:10]
        np.testing.assert_allclose(scores, others, rtol=0, atol=1e-6)
        neighbors = keys[np.argsort(-cosine(vectors, query), kind="stable")[1:11]]
        assert lists.tolist() == index.codes.quantizer.assign(held.reconstruct_batch(neighbors), 1)[:, 0].tolist()
        hits += len(right & set(poor.search(held, query, 11)[0].tolist()))
    assert told.recall == pytest.approx(hits / (10 * len(rows)))
    assert told.recall < 0.9
    assert told.typical == 1


def test_all_lists_find_nearly_what_brute_force_finds(gallery: tuple[F32, I64, Vectors, Approximate]) -> None:
    """What is missed then, the codes have lost."""
    vectors, keys, held, index = gallery
    everything = replace(index, plan=replace(index.plan, probes=(index.plan.lists,) * len(STEPS)))
    hits = 0
    for query in clustered(50, seed=3):
        mine, scores, visited = everything.search(held, query, 20)
        assert visited == index.plan.lists
        hits += len(best(vectors, keys, query, 20) & set(mine[np.argsort(-scores)[:20]].tolist()))
    assert hits >= 0.995 * 1000


@pytest.mark.parametrize("share", [0.5, 0.02])
def test_as_many_as_exist_are_found_among_those_let_through(
    gallery: tuple[F32, I64, Vectors, Approximate], share: float
) -> None:
    """Also where none of them is in the lists that are visited at first: they are those farthest from the query."""
    vectors, keys, held, index = gallery
    query = clustered(1, seed=4)[0]
    far = np.argsort(cosine(vectors, query))[: int(share * len(keys))]
    for k in (10, 300, 1000):
        mine, _, _ = index.search(held, query, k, keys[far])
        assert len(mine) >= min(k, len(far))
        assert set(mine.tolist()) <= set(keys[far].tolist())


def test_a_plan_visits_more_for_what_is_less_similar() -> None:
    similarity = np.repeat(np.array([0.92, 0.72, 0.52], np.float32), 100)
    visits = np.concatenate([np.arange(1, 101), 2 * np.arange(1, 101), np.full(100, 150)])
    probes = _probes(similarity, visits, 0.9, 500)
    plan = Plan(500, probes, 1.0, 1, 1)
    asked = (1.0, 0.92, 0.901, 0.86, 0.72, 0.651, 0.52, 0.501, 0.49, -1.0)
    assert [plan.needed(s) for s in asked] == [91, 91, 91, 182, 182, 182, 182, 182, 500, 500]
    assert _probes(similarity[:149], visits[:149], 0.9, 500) == (500,) * 38 + (91,) * 2  # 49 pairs are too few
    assert list(probes) == sorted(probes, reverse=True)


def test_vectors_that_come_and_go() -> None:
    vectors = clustered(2000)
    held, index = made(vectors, np.arange(1, 2001))
    more = clustered(100, seed=9)
    held.add(np.arange(5001, 5101), more)
    index.add(np.arange(5001, 5101), more)
    held.remove(np.array([1, 2, 3, 5001, 77_777]))
    for key, query in ((1, vectors[0]), (5001, more[0])):
        mine, _, _ = index.search(held, query, 2000)
        assert key not in mine
    mine, _, _ = index.search(held, more[5], 1)
    assert 5006 in mine


@pytest.mark.parametrize("count", [32, 38, 39, 100])
def test_few_vectors_and_equal_ones(count: int) -> None:
    """One list, or lists that nothing is nearest to."""
    for vectors in (clustered(count), np.repeat(clustered(1), count, axis=0)):
        held, index = made(vectors, np.arange(count))
        assert index.plan.recall >= 0.99
        mine, _, _ = index.search(held, vectors[0], count)
        assert set(mine.tolist()) == set(range(count))


def test_too_few_to_learn_codes_from() -> None:
    for count in (0, 1, 31):
        held = Vectors(16)
        held.add(np.arange(count), clustered(count))
        assert build(held, held.keys(), free, lambda: None) is None


@pytest.mark.parametrize("dim", [1, 3, 7, 130])
def test_vectors_of_any_size(dim: int) -> None:
    vectors = clustered(3000, dim=dim)
    held, index = made(vectors, np.arange(3000))
    for row in (0, 77):
        mine, scores, _ = index.search(held, vectors[row], 5)
        assert np.sort(scores)[-5:] == pytest.approx(np.sort(cosine(vectors, vectors[row]))[-5:], abs=1e-3)


def test_ten_thousand_equal_vectors() -> None:
    vectors = np.concatenate([np.repeat(clustered(1), 8000, axis=0), clustered(2000, seed=5)])
    held, index = made(vectors, np.arange(10_000))
    mine, scores, _ = index.search(held, vectors[0], 10)
    assert len(mine) >= 10
    assert (np.sort(scores)[-10:] == scores.max()).all()


def test_what_goes_while_it_is_built_is_not_found() -> None:
    """Half of all after the first parts were read; then all."""
    for rest in (np.arange(1, 1000, 2), np.empty(0, np.int64)):
        held, reads = Vectors(16), 0
        held.add(np.arange(1000), clustered(1000))

        def reading(held: Vectors = held, rest: I64 = rest) -> AbstractContextManager[None]:
            nonlocal reads
            reads += 1
            if reads == 3:
                held.remove(np.setdiff1d(np.arange(1000), rest))
            return nullcontext()

        built = build(held, held.keys(), reading, lambda: None)
        if not rest.size:
            assert built is None or built.search(held, clustered(1)[0], 10)[0].size == 0
            continue
        assert built is not None
        assert set(built.search(held, clustered(1)[0], 1000)[0].tolist()) == set(rest.tolist())


def test_it_ends_when_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """At each of the places where it asks."""

    class Enough(Exception):
        pass

    held = Vectors(16)
    held.add(np.arange(3000), clustered(3000))
    monkeypatch.setattr("patchsight_serve.index_build.CHUNK", 512)
    asked = 0

    def count() -> AbstractContextManager[None]:
        nonlocal asked
        asked += 1
        return nullcontext()

    build(held, held.keys(), count, count)
    assert asked > 40
    for last in (1, 5, asked - 1):
        left = last

        def go_on() -> AbstractContextManager[None]:
            nonlocal left
            left -= 1
            if not left:
                raise Enough
            return nullcontext()

        with pytest.raises(Enough):
            build(held, held.keys(), go_on, go_on)
