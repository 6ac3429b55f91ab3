"""k-means: planted clusters are found, each row is with its nearest center, and neither order nor chance matters."""

import numpy as np
import pytest

from patchsight_serve import kmeans as module
from patchsight_serve.kmeans import kmeans
from patchsight_serve.nearest import normalize


def planted(seed: int, k: int = 8, dim: int = 32, spread: float = 0.35) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors around `k` centers, 5 to 80 of each, in random order; and which center each is of."""
    rng = np.random.default_rng(seed)
    centers = rng.standard_normal((k, dim))
    truth = rng.permutation(np.repeat(np.arange(k), rng.integers(5, 81, k)))
    return normalize((centers[truth] + spread * rng.standard_normal((len(truth), dim))).astype(np.float32)), truth


def adjusted_rand_index(a: np.ndarray, b: np.ndarray) -> float:
    """1 for the same partition, 0 on average for a random one (Hubert and Arabie 1985)."""

    def pairs(counts: np.ndarray) -> float:
        return float((counts * (counts - 1) / 2).sum())

    table = np.zeros((a.max() + 1, b.max() + 1))
    np.add.at(table, (a, b), 1)
    both, rows, columns = pairs(table), pairs(table.sum(axis=1)), pairs(table.sum(axis=0))
    expected = rows * columns / pairs(np.array(len(a)))
    return (both - expected) / ((rows + columns) / 2 - expected)


def test_the_index_that_the_tests_use() -> None:
    one, other = np.array([0, 0, 1, 1, 2, 2]), np.array([2, 2, 0, 0, 1, 1])
    assert adjusted_rand_index(one, other) == 1
    assert adjusted_rand_index(np.array([0, 0, 1, 1]), np.array([0, 0, 1, 2])) == pytest.approx(0.5714, abs=1e-4)


@pytest.mark.parametrize("seed", range(20))
def test_planted_clusters_are_found(seed: int) -> None:
    vectors, truth = planted(seed)
    found = kmeans(vectors, 8)
    assert adjusted_rand_index(found.owner, truth) >= 0.95


def test_planted_clusters_are_found_by_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PER_CLUSTER", 20)
    for seed in range(5):
        vectors, truth = planted(seed)
        assert len(vectors) > 8 * 20
        assert adjusted_rand_index(kmeans(vectors, 8).owner, truth) >= 0.95


@pytest.mark.parametrize("k", [1, 2, 7, 40])
@pytest.mark.parametrize("rows", [8192, 11])
def test_every_row_is_with_its_nearest_center(k: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS", rows)
    vectors = normalize(np.random.default_rng(k).standard_normal((400, 12)).astype(np.float32))
    centers, owner, scores = kmeans(vectors, k)
    assert centers.shape == (k, 12)
    assert np.linalg.norm(centers, axis=1) == pytest.approx(1, abs=1e-5)
    for vector, mine, score in zip(vectors, owner, scores, strict=True):
        cosines = [float(np.sum(vector.astype(np.float64) * center)) for center in centers]
        assert mine == int(np.argmax(cosines))
        assert score == pytest.approx(max(cosines), abs=1e-6)
    assert np.unique(owner).tolist() == list(range(k))


def test_centers_are_the_means_of_what_they_own() -> None:
    """That is what k-means ends at; on planted clusters it gets there."""
    vectors, _ = planted(3)
    centers, owner, _ = kmeans(vectors, 8)
    for cluster, center in enumerate(centers):
        mean = vectors[owner == cluster].astype(np.float64).mean(axis=0)
        assert center == pytest.approx(mean / np.linalg.norm(mean), abs=1e-5)


@pytest.mark.parametrize("per_cluster", [256, 10])
def test_the_same_vectors_in_any_order_give_the_same_answer(per_cluster: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PER_CLUSTER", per_cluster)
    vectors = normalize(np.random.default_rng(0).standard_normal((300, 12)).astype(np.float32))
    vectors[100:150] = vectors[:50]  # some more than once
    first = kmeans(vectors, 6)
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(vectors))
        again = kmeans(vectors[order], 6)
        assert np.array_equal(again.centers, first.centers)
        assert np.array_equal(again.owner, first.owner[order])
        assert np.array_equal(again.scores, first.scores[order])


def test_fewer_different_vectors_than_clusters() -> None:
    three = normalize(np.random.default_rng(0).standard_normal((3, 12)).astype(np.float32))
    centers, owner, scores = kmeans(np.repeat(three, 10, axis=0), 8)
    assert len(centers) == 3
    assert [len(set(part)) for part in np.split(owner, 3)] == [1, 1, 1]
    assert scores == pytest.approx(1, abs=1e-6)


def test_as_many_clusters_as_vectors() -> None:
    for count in (1, 2, 30):
        vectors = normalize(np.random.default_rng(count).standard_normal((count, 12)).astype(np.float32))
        owner = kmeans(vectors, count).owner
        assert sorted(owner) == list(range(count))


def test_opposite_vectors() -> None:
    """A center between them would have no direction."""
    vectors = normalize(np.array([[1, 0], [-1, 0], [1, 0.1], [-1, 0.1]], np.float32))
    owner = kmeans(vectors, 2).owner
    assert owner[0] == owner[2] != owner[1] == owner[3]
    assert np.isfinite(kmeans(vectors[:2], 1).centers).all()


def test_pause_ends_the_work() -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kmeans(planted(0)[0], 8, stop)
