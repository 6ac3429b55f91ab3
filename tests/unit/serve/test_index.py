"""The index: filtered searches equal brute force, and nothing is lost while another index takes its place."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from patchsight_serve import index as index_module
from patchsight_serve.index import EXACT_LIMIT, Index
from patchsight_serve.nearest import F32, cosine, normalize
from patchsight_serve.settings import ServeSettings
from patchsight_serve.vectors import Vectors

Until = Callable[[Callable[[], object]], None]
DIM = 16


def clustered(count: int, seed: int = 0, dim: int = DIM) -> F32:
    rng = np.random.default_rng(seed)
    centers = np.random.default_rng(99).standard_normal((30, dim))
    return normalize((centers[rng.integers(0, 30, count)] + 0.4 * rng.standard_normal((count, dim))).astype(np.float32))


class Truth:
    """What an index should hold, and what brute force finds in it."""

    def __init__(self) -> None:
        self.vectors: dict[int, F32] = {}
        self._arrays: Any = None

    def change(self, fresh: dict[int, F32], gone: set[int]) -> None:
        self.vectors = {key: v for key, v in self.vectors.items() if key not in gone} | fresh
        self._arrays = None

    def best(self, query: F32, k: int, only: Any = None) -> list[tuple[int, float]]:
        if self._arrays is None:
            self._arrays = np.array(list(self.vectors)), np.stack(list(self.vectors.values()))
        keys, vectors = self._arrays
        if only is not None:
            chosen = np.isin(keys, list(only))
            keys, vectors = keys[chosen], vectors[chosen]
        scores = cosine(vectors, query)
        order = np.lexsort((keys, -scores))[:k]
        return list(zip(keys[order].tolist(), scores[order].tolist(), strict=True))


def ranked(index: Index, query: F32, k: int, **how: Any) -> list[tuple[int, float]]:
    keys, scores = index.nearest(query, k, **how)
    assert len(set(keys)) == len(keys)
    return sorted(zip(keys, scores, strict=True), key=lambda pair: (-pair[1], pair[0]))[:k]


def recall(index: Index, truth: Truth, queries: F32, k: int = 10) -> float:
    """Of the neighbors; each that is found must be there, with its own score."""
    hits = 0
    for query in queries:
        found = ranked(index, query, k)
        assert [score for _, score in found] == [cosine(truth.vectors[key][None], query)[0] for key, _ in found]
        hits += len({key for key, _ in found} & {key for key, _ in truth.best(query, k)})
    return hits / (k * len(queries))


@pytest.fixture
def open_index():
    """`open_index(limit)`; closed at the end."""
    opened: list[Index] = []

    def make(limit: int) -> Index:
        opened.append(Index(limit))
        return opened[-1]

    yield make
    for one in opened:
        one.close()


@pytest.fixture
def held_build(monkeypatch: pytest.MonkeyPatch):
    """A build that waits in its middle, when some of the vectors were read: `held_build(reads)` gives the event that it
    has come there, and the one that lets it go on."""

    def hold(reads: int) -> tuple[threading.Event, threading.Event]:
        there, go_on, build = threading.Event(), threading.Event(), index_module.build
        left = reads

        def slow(vectors, keys, reading, check):
            def counted():
                nonlocal left
                left -= 1
                if not left:
                    there.set()
                    assert go_on.wait(60)
                return reading()

            return build(vectors, keys, counted, check)

        monkeypatch.setattr(index_module, "build", slow)
        monkeypatch.setattr("patchsight_serve.index_build.CHUNK", 256)
        return there, go_on

    return hold


@pytest.fixture(scope="module", params=[EXACT_LIMIT, 5000], ids=["flat", "ivf"])
def tied(request: pytest.FixtureRequest, until: Until):
    """An index of 20,000 vectors, each of them under five keys, and what is in it."""
    index, truth = Index(request.param), Truth()
    vectors = np.concatenate([clustered(4000)] * 5)
    truth.change({key: vectors[key - 1] for key in range(1, 20_001)}, set())
    index.extend(np.arange(1, 20_001), vectors)
    index.fit()
    until(lambda: not index.state.building)
    assert index.state.kind == ("flat" if request.param == EXACT_LIMIT else "ivf")
    yield index, truth, request.param
    index.close()


@pytest.mark.parametrize("share", [0.5, 0.2, 0.01, 0.0005, 0.0001])
def test_filtered_equals_brute_force_with_ties(tied: tuple[Index, Truth, int], share: float) -> None:
    """Among as many as the limit, or fewer, an approximate index is exact, too."""
    index, truth, limit = tied
    rng = np.random.default_rng(1)
    count = min(limit, round(share * 20_000))
    some = rng.choice(4000, -(-count // 5), replace=False)
    only = rng.permutation((some[:, None] + 1 + 4000 * np.arange(5)).ravel()[:count])  # with all that are equal to them
    allowed = set(only.tolist())
    for query in clustered(4, seed=2):
        for k in (1, 10, 1000):
            expected = truth.best(query, k, allowed)
            assert ranked(index, query, k, only=only) == expected
            first = [key for key, _ in expected[:3]]
            rest = truth.best(query, k, allowed - set(first))
            assert ranked(index, query, k, only=only, leave_out=first) == rest
    stale = np.append(only, [77_777, 99_999])  # keys that are gone by now
    assert ranked(index, query, 10, only=stale) == truth.best(query, 10, allowed)
    assert ranked(index, query, 10, only=only[:0]) == []


def test_more_than_the_limit_are_let_through(open_index, until: Until) -> None:
    index, truth = open_index(1000), Truth()
    vectors = clustered(12_000)
    truth.change({key: vectors[key] for key in range(12_000)}, set())
    index.extend(np.arange(12_000), vectors)
    index.fit()
    until(lambda: index.state.kind == "ivf")
    half = np.arange(0, 12_000, 2)
    hits = 0
    for query in clustered(50, seed=3):
        found = ranked(index, query, 10, only=half)
        assert len(found) == 10
        assert all(key % 2 == 0 for key, _ in found)
        hits += len(set(found) & set(truth.best(query, 10, set(half.tolist()))))
    assert hits >= 0.95 * 500
    far = np.argsort(cosine(vectors, query))[:3000]  # none of these is in the lists around the query
    assert len(ranked(index, query, 1000, only=far)) == 1000


@pytest.mark.parametrize("few", [1, 10**6])
def test_changes_during_a_build_are_all_in_the_new_index(
    open_index, held_build, until: Until, monkeypatch: pytest.MonkeyPatch, few: int
) -> None:
    """Brought in while searches go on, or all at the end."""
    monkeypatch.setattr(index_module, "FEW", few)
    index, truth = open_index(1000), Truth()
    there, go_on = held_build(12)  # eight parts for the centers, then the vectors

    def change(fresh: dict[int, F32], gone: set[int]) -> None:
        truth.change(fresh, gone)
        index.change(fresh, gone)

    vectors = clustered(4000)
    change({key: vectors[key] for key in range(1000)}, set())
    assert index.state == ("flat", None, None, None, False)
    change({key: vectors[key] for key in range(1000, 2000)}, set())
    assert there.wait(60)
    assert index.state == ("flat", None, None, None, True)
    change({}, set(range(0, 2000, 10)))  # read, or not yet
    change({key: vectors[key] for key in range(2000, 2500)}, {1, 2, 3})
    change({key: vectors[key] for key in range(2500, 2600)}, set(range(2000, 2100)))  # came and went meanwhile
    for query in clustered(5, seed=4):
        assert ranked(index, query, 10) == truth.best(query, 10)  # exact until the change of places
    go_on.set()
    until(lambda: not index.state.building)
    state = index.state
    assert state.kind == "ivf"
    assert state.recall is not None
    assert state.recall >= 0.99
    assert state.probes is not None
    assert state.lists is not None
    assert state.probes < state.lists
    assert set(index.keys().tolist()) == set(truth.vectors)
    assert len(index) == len(truth.vectors)
    assert len(set(index._approximate.keys().tolist())) == index._approximate.codes.ntotal  # nobody has two codes
    assert recall(index, truth, clustered(100, seed=5)) >= 0.95
    change({key: vectors[key] for key in range(3000, 3100)}, set(range(500, 600)))
    assert set(index.keys().tolist()) == set(truth.vectors)
    for key in range(3000, 3100):
        assert ranked(index, vectors[key], 1)[0][0] == key
    for key in range(500, 600):
        assert key not in {found for found, _ in ranked(index, vectors[key], 1000)}


def test_writers_and_readers_at_once(open_index, until: Until) -> None:
    """Three writers, each with keys of its own, over the limit and four times that: it is built twice at least."""
    index = open_index(400)
    stop, wrong, parts = threading.Event(), [], [Truth() for _ in range(3)]

    def write(number: int) -> None:
        rng, mine, key = np.random.default_rng(number), parts[number], number
        while len(mine.vectors) < 1500:
            vectors = clustered(20, seed=1000 * key + number)
            fresh = {key + 3 * i: v for i, v in enumerate(vectors)}
            key += 3 * len(fresh)
            gone = set(rng.choice(list(mine.vectors), 4).tolist()) if mine.vectors else set()
            index.change(fresh, gone)
            mine.change(fresh, gone)

    def read() -> None:
        queries = clustered(50, seed=7)
        while not stop.is_set():
            for query in queries:
                size = len(index)
                keys, scores = index.nearest(query, 10)
                if len(set(keys)) != len(keys) or (size > 100 and len(keys) < 10) or max(scores, default=0) > 1:
                    wrong.append(keys)

    reader = threading.Thread(target=read)
    writers = [threading.Thread(target=write, args=(n,)) for n in range(3)]
    for thread in (reader, *writers):
        thread.start()
    for writer in writers:
        writer.join()
    stop.set()
    reader.join()
    until(lambda: not index.state.building)
    assert wrong == []
    truth = Truth()
    for part in parts:
        truth.change(part.vectors, set())
    assert index.state.kind == "ivf"
    assert set(index.keys().tolist()) == set(truth.vectors)
    assert recall(index, truth, clustered(100, seed=8)) >= 0.95


def test_it_is_built_anew_when_there_are_four_times_as_many(open_index, until: Until) -> None:
    index, vectors = open_index(500), clustered(5000)
    index.change({key: vectors[key] for key in range(501)})
    until(lambda: index.state.kind == "ivf")
    lists = index.state.lists
    index.change({key: vectors[key] for key in range(501, 2003)})
    assert not index.state.building
    index.change({key: vectors[key] for key in range(2003, 2005)})
    until(lambda: not index.state.building)
    assert lists is not None
    assert index.state.lists is not None
    assert index.state.lists > 3 * lists
    assert set(index.keys().tolist()) == set(range(2005))


def test_fewer_than_the_limit_are_searched_exactly_whatever_the_index_is(open_index, until: Until) -> None:
    index, truth, vectors = open_index(1000), Truth(), clustered(3000)
    truth.change({key: vectors[key] for key in range(3000)}, set())
    index.change(truth.vectors)
    until(lambda: index.state.kind == "ivf")
    gone = set(range(2000))
    truth.change({}, gone)
    index.change({}, gone)
    assert index.state == ("flat", None, None, None, False)
    for query in clustered(50, seed=6):
        assert ranked(index, query, 10) == truth.best(query, 10)


@pytest.mark.parametrize("dim", [8, DIM])
def test_emptied_during_a_build_it_begins_anew(
    open_index, held_build, until: Until, caplog: pytest.LogCaptureFixture, dim: int
) -> None:
    """Also with vectors of another size; the build comes to nothing, and to no error."""
    index, vectors = open_index(500), clustered(1000)
    there, go_on = held_build(5)
    index.change({key: vectors[key] for key in range(600)})
    assert there.wait(60)
    index.change({}, set(range(600)))
    other = clustered(20, dim=dim)
    index.change({1000 + i: v for i, v in enumerate(other)})
    builder = index._builder
    go_on.set()
    assert builder is not None
    builder.join(60)
    assert index.state == ("flat", None, None, None, False)
    assert (index.dim, len(index)) == (dim, 20)
    assert ranked(index, other[3], 1)[0][0] == 1003
    index.change({2000 + i: v for i, v in enumerate(clustered(600, dim=dim))})
    until(lambda: index.state.kind == "ivf")
    assert (index.dim, len(index)) == (dim, 620)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_all_deleted_during_a_build(open_index, held_build, until: Until) -> None:
    index, vectors = open_index(500), clustered(1000)
    there, go_on = held_build(3)
    index.change({key: vectors[key] for key in range(600)})
    assert there.wait(60)
    index.change({}, set(range(600)))
    go_on.set()
    until(lambda: not index.state.building)
    assert index.nearest(vectors[0], 10) == ([], [])
    index.change({1000: vectors[0]})
    assert ranked(index, vectors[0], 10)[0][0] == 1000


def test_a_build_that_fails_is_said_and_the_index_before_goes_on(
    open_index, until: Until, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    index, truth, vectors, tries = open_index(100), Truth(), clustered(1000), []
    build = index_module.build

    def failing(vectors, *_):
        tries.append(vectors.ntotal)
        raise MemoryError

    monkeypatch.setattr(index_module, "build", failing)

    def add(start: int, end: int) -> None:
        fresh = {key: vectors[key] for key in range(start, end)}
        truth.change(fresh, set())
        index.change(fresh)
        until(lambda: not index.state.building)

    add(0, 150)
    assert "the approximate index of 150 vectors was not built; the one before goes on" in caplog.text
    add(150, 299)  # not again at once
    assert tries == [150]
    assert index.state == ("flat", None, None, None, False)
    assert ranked(index, vectors[7], 10) == truth.best(vectors[7], 10)
    monkeypatch.setattr(index_module, "build", build)
    add(299, 300)
    assert index.state.kind == "ivf"


def test_closing_ends_a_build(open_index, held_build) -> None:
    index, vectors = open_index(500), clustered(1000)
    there, go_on = held_build(3)
    index.change({key: vectors[key] for key in range(600)})
    assert there.wait(60)
    closing = threading.Thread(target=index.close)
    closing.start()
    assert index._leaving.wait(60)
    go_on.set()
    closing.join(60)
    assert not closing.is_alive()
    assert index._builder is not None
    assert not index._builder.is_alive()
    assert index.state == ("flat", None, None, None, False)
    index.change({key: vectors[key] for key in range(600, 1000)})
    assert not index.state.building  # nor does another begin


def test_the_settings_limit_is_the_index_limit() -> None:
    assert ServeSettings().exact_limit == EXACT_LIMIT


@pytest.mark.parametrize("limit", [EXACT_LIMIT, 500], ids=["flat", "ivf"])
def test_a_snapshot_is_all_there_is_in_the_order_of_the_keys(open_index, until: Until, limit: int) -> None:
    index, vectors = open_index(limit), clustered(1000)
    assert index.keys().tolist() == []
    assert [part.tolist() for part in index.snapshot()] == [[], []]
    index.change({key: vectors[key] for key in range(1000)})
    until(lambda: not index.state.building)
    index.change({}, set(range(0, 1000, 3)))
    left = [key for key in range(1000) if key % 3]
    assert index.keys().tolist() == left
    keys, copied = index.snapshot(rows=64)
    assert keys.tolist() == left
    assert (copied == vectors[left]).all()


def test_what_is_taken_out_during_a_snapshot_may_be_left_out_of_it(open_index, monkeypatch: pytest.MonkeyPatch) -> None:
    index, vectors, present = open_index(EXACT_LIMIT), clustered(100), Vectors.present
    index.change({key: vectors[key] for key in range(100)})
    parts: list[Any] = []

    def first_then_gone(held: Any, keys: Any) -> Any:
        parts.append(keys)
        if len(parts) == 2:
            held.remove(np.array([1, 33, 34, 77]))
        return present(held, keys)

    monkeypatch.setattr(Vectors, "present", first_then_gone)
    keys, copied = index.snapshot(rows=32)
    assert keys.tolist() == [key for key in range(100) if key not in (33, 34, 77)]  # 1 was copied before
    assert (copied == vectors[keys]).all()


def test_codes_of_vectors_that_are_gone_are_passed_over_and_made_anew(open_index, until: Until) -> None:
    """Also where nearly all that are near are gone; a quarter of all calls for new codes."""
    index, truth, vectors = open_index(500), Truth(), clustered(4000)
    truth.change({key: vectors[key] for key in range(4000)}, set())
    index.change(truth.vectors)
    until(lambda: index.state.kind == "ivf")
    gone = {key for key, _ in truth.best(vectors[7], 790)}
    truth.change({}, gone)
    index.change({}, gone)
    assert not index.state.building
    assert index._approximate.codes.ntotal == 4000
    found = ranked(index, vectors[7], 10)
    assert len(found) == 10
    assert not gone & {key for key, _ in found}
    index.change({}, set(list(truth.vectors)[:100]))
    until(lambda: index._approximate.codes.ntotal == 3110)
    assert not index.state.building
