"""The plane of the two principal components, by scikit-learn's as oracle; and its scale."""

import numpy as np
import pytest
from sklearn.decomposition import PCA

from patchsight_serve.nearest import normalize
from patchsight_serve.principal import principal, scaled


def mixed(count: int, dim: int, seed: int = 0) -> np.ndarray:
    """Unit vectors that differ more in some directions than in others."""
    rng = np.random.default_rng(seed)
    few = rng.standard_normal((count, 6)) @ rng.standard_normal((6, dim))
    return normalize((few + 0.5 * rng.standard_normal((count, dim))).astype(np.float32))


@pytest.mark.parametrize(("count", "dim"), [(3, 2), (50, 3), (400, 24), (40, 300), (500, 384)])
def test_it_is_that_of_scikit_learn_signs_included(count: int, dim: int) -> None:
    vectors = mixed(count, dim)
    expected = PCA(2, svd_solver="full").fit_transform(vectors)
    assert np.abs(principal(vectors) - expected).max() < 1e-5
    assert principal(vectors).dtype == np.float32


def test_it_depends_on_the_set_of_vectors_alone() -> None:
    vectors = mixed(300, 24)
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(300)
        assert np.array_equal(principal(vectors[order]), principal(vectors)[order])


@pytest.mark.parametrize(
    "vectors",
    [np.empty((0, 0)), np.eye(1, 8), np.tile(np.eye(1, 8), (5, 1)), np.array([[1.0], [-1.0], [1.0]]), np.eye(2, 2)],
    ids=["none", "one", "equal ones", "one dimension", "two"],
)
def test_what_has_no_plane_gets_one(vectors: np.ndarray) -> None:
    plane = principal(vectors.astype(np.float32))
    assert plane.shape == (len(vectors), 2)
    assert np.isfinite(plane).all()
    equal = (vectors == vectors[:1]).all()
    assert equal == (np.abs(plane).max(initial=0) < 1e-6)
    fitted = scaled(plane)
    assert ((fitted >= 0) & (fitted <= 1)).all()


def test_the_longer_range_fills_the_map_and_both_axes_have_one_scale() -> None:
    plane = np.array([[-3.0, 2.0], [5.0, 4.0], [1.0, 3.0]], np.float32)
    assert scaled(plane).tolist() == pytest.approx(np.array([[0, 0.375], [1, 0.625], [0.5, 0.5]]))
    assert scaled(plane[:, ::-1]).tolist() == pytest.approx(np.array([[0.375, 0], [0.625, 1], [0.5, 0.5]]))
    assert scaled(np.full((3, 2), 7, np.float32)).tolist() == [[0.5, 0.5]] * 3
    assert np.array_equal(scaled(1e-3 * plane), scaled(plane))
