"""Vectors on a plane: by their two principal components, and at a scale that fits a map.

The answer depends on the set of vectors alone, not on their order. Knows unit vectors, no images.
"""

from typing import Any

import numpy as np

from patchsight_serve.kmeans import in_order
from patchsight_serve.nearest import F32

F64 = np.ndarray[Any, np.dtype[np.float64]]

BLOCK, ROUNDS = 16, 60  # of subspace iteration; embeddings need ten or so
SAME = 1e-10  # a share of the variance by which two rounds differ in the end
DECIMALS = 5  # of a position: a hundred thousandth of the map's width


def principal(vectors: F32) -> F32:
    """Rows `(N, D)` on the plane in which they differ most, float32 `(N, 2)`, around 0; along the first axis more than
    along the second. Each axis points to where the number that weighs most in it grows."""
    count, dim = vectors.shape
    plane = np.zeros((count, 2), np.float32)
    if not count:
        return plane
    order = in_order(vectors)
    centered = vectors[order] - vectors[order].mean(axis=0, dtype=np.float64).astype(np.float32)
    axes = _leading((centered.T @ centered).astype(np.float64))
    heaviest = axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])]
    plane[order, : min(dim, 2)] = centered @ (axes * np.sign(heaviest)).astype(np.float32)
    return plane


def _leading(covariance: F64) -> F64:
    """The eigenvectors `(D, 2)` of the two largest eigenvalues of a symmetric `(D, D)`, the largest first; `(D, 1)`
    where D is 1. By subspace iteration: all D of them take a minute where D is 2,048."""
    dim = len(covariance)
    basis = np.random.default_rng(0).standard_normal((dim, min(BLOCK, dim)))
    before = np.full(2, np.inf)
    for _ in range(ROUNDS):
        basis, _ = np.linalg.qr(covariance @ basis)
        values, within = np.linalg.eigh(basis.T @ covariance @ basis)
        basis = basis @ within[:, ::-1]  # eigh has the largest last
        if np.abs(values[::-1][:2] - before[: len(values)]).max() <= SAME * values[-1]:
            break
        before = values[::-1][:2]
    return basis[:, :2]


def scaled(plane: F32) -> F32:
    """Positions `(N, 2)` moved and scaled, both axes alike, so that they fill 0 to 1 along the longer one, with their
    middle at 0.5; rounded."""
    if not len(plane):
        return plane
    low, high = plane.min(axis=0).astype(np.float64), plane.max(axis=0).astype(np.float64)
    span = (high - low).max() or 1.0
    fitted: F32 = ((plane - (low + high) / 2) / span + 0.5).clip(0, 1).round(DECIMALS).astype(np.float32)
    return fitted
