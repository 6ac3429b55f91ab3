"""Components against all pairs in float64 and a union-find of a few lines; the central row against all pairs, too."""

import tracemalloc

import numpy as np
import pytest

from patchsight_serve import linkage
from patchsight_serve.linkage import central, components
from patchsight_serve.nearest import cosine, normalize


def clustered(seed: int, count: int = 300, dim: int = 24, spread: float = 0.06) -> np.ndarray:
    """Unit vectors around a third as many centers: groups of all sizes, with links near every limit."""
    rng = np.random.default_rng(seed)
    centers = rng.standard_normal((count // 3, dim)) / np.sqrt(dim)
    near = centers[rng.integers(len(centers), size=count)]
    return normalize((near + spread * rng.standard_normal((count, dim))).astype(np.float32))


def partition(component: np.ndarray) -> set[frozenset[int]]:
    return {frozenset(np.flatnonzero(component == c).tolist()) for c in np.unique(component)}


def brute_force(vectors: np.ndarray, min_score: float) -> set[frozenset[int]]:
    """All pairs in float64, and union-find over those that reach the limit, one after the other."""
    exact = vectors.astype(np.float64)
    scores = np.stack([(exact * row).sum(axis=1) for row in exact]).clip(-1, 1).astype(np.float32).astype(np.float64)
    parent = list(range(len(vectors)))

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    for a, b in np.argwhere(scores >= min_score).tolist():
        parent[root(a)] = root(b)
    return partition(np.array([root(i) for i in range(len(vectors))]))


@pytest.mark.parametrize("blocks", [(256, 4096, 8192), (32, 50, 5), (7, 64, 1)])
@pytest.mark.parametrize("min_score", [0.5, 0.9, 0.95])
def test_components_equal_brute_force(min_score: float, blocks: tuple[int, int, int], monkeypatch) -> None:
    for name, value in zip(("ROWS", "COLUMNS", "EXACT"), blocks, strict=True):
        monkeypatch.setattr(linkage, name, value)
    for seed in range(3):
        vectors = clustered(seed)
        expected = brute_force(vectors, min_score)
        assert 1 < len(expected) < len(vectors)
        component = components(vectors, min_score)
        assert partition(component) == expected
        assert all(component[min(group)] == min(group) for group in expected)


def test_the_limit_is_exact_to_the_last_bit() -> None:
    """FAISS's float32 cannot tell these apart: there are pairs that it would put on the wrong side."""
    rng = np.random.default_rng(0)
    wrong = 0
    for _ in range(300):
        pair = normalize(rng.standard_normal((2, 384)).astype(np.float32) + 2)
        (score,) = cosine(pair[:1], pair[1])
        wrong += (pair[0] @ pair[1]) != score
        assert components(pair, float(score)).tolist() == [0, 0]
        assert components(pair, float(np.nextafter(score, np.float32(2)))).tolist() == [0, 1]
    assert wrong > 0


def test_a_chain_is_one_component_though_its_ends_are_opposite() -> None:
    angle = np.deg2rad(np.arange(0, 181, 10))
    chain = normalize(np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32))
    shuffled = np.random.default_rng(0).permutation(len(chain))
    assert components(chain[shuffled], 0.984).tolist() == [0] * len(chain)  # cos 10° = 0.9848
    assert components(chain[shuffled], 0.985).tolist() == list(range(len(chain)))
    broken = np.delete(chain, 9, axis=0)
    assert components(broken, 0.984).tolist() == [0] * 9 + [9] * 9


def test_the_order_of_rows_does_not_matter() -> None:
    vectors = clustered(7)
    expected = partition(components(vectors, 0.93))
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(len(vectors))
        found = partition(components(vectors[order], 0.93))
        assert {frozenset(order[list(group)].tolist()) for group in found} == expected


def test_equal_rows_are_together_at_1_whatever_rounding_says() -> None:
    vectors = normalize(np.random.default_rng(0).standard_normal((200, 24)).astype(np.float32))
    short = next(v for v in vectors if cosine(v[None], v)[0] < 1)
    others = vectors[:3]
    rows = np.concatenate([others[:1], np.tile(short, (700, 1)), others[1:]])
    assert components(rows, 1.0).tolist() == [0] + [1] * 700 + [701, 702]


def test_no_rows_and_one_row() -> None:
    assert components(np.empty((0, 0), np.float32), 0.9).tolist() == []
    assert components(np.ones((1, 1), np.float32), 0.9).tolist() == [0]


def test_memory_is_that_of_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where every pair is a link: all at once would be 36 MB of scores."""
    monkeypatch.setattr(linkage, "ROWS", 64)
    monkeypatch.setattr(linkage, "COLUMNS", 256)
    rows = np.tile(normalize(np.arange(1, 9).astype(np.float32)), (3000, 1))
    tracemalloc.start()
    try:
        assert not components(rows, 0.9).any()
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()


def test_pause_comes_between_blocks_and_ends_the_work() -> None:
    vectors = clustered(0)

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        components(vectors, 0.9, stop)


@pytest.mark.parametrize("exact", [8192, 4])
def test_the_central_row_equals_brute_force(exact: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linkage, "EXACT", exact)
    rng = np.random.default_rng(0)
    for size in (3, 10, 50):
        vectors = normalize((rng.standard_normal(16) + 0.3 * rng.standard_normal((80, 16))).astype(np.float32))
        rows = rng.choice(80, size, replace=False)
        group = vectors[rows].astype(np.float64)
        expected = int((group @ group.T).mean(axis=1).argmax())
        first, scores = central(vectors, rows)
        assert first == expected
        assert scores[first] == 1
        others = np.arange(size) != expected
        assert scores[others] == pytest.approx((group @ group[expected])[others], abs=1e-7)


def test_of_two_the_first_is_the_central_one() -> None:
    """Each is as like the other as the other is to it; only rounding differs."""
    rng = np.random.default_rng(0)
    for _ in range(100):
        pair = normalize(rng.standard_normal((2, 100)).astype(np.float32))
        assert central(pair, np.array([0, 1]))[0] == 0
        assert central(pair, np.array([1, 0]))[0] == 0
