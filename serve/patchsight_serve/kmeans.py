"""Clusters of unit vectors: spherical k-means by FAISS, from seeds that are far apart (greedy k-means++).

The answer depends on the set of vectors alone: not on their order, and on no chance. Knows unit vectors, no images.
"""

from collections.abc import Iterator
from typing import NamedTuple

import faiss
import numpy as np

from patchsight_serve.linkage import Pause
from patchsight_serve.nearest import F32, I64

SEED = 0
PER_CLUSTER = 128  # vectors that the centers are learned from, at most; more of them move no center by much
TIMES = 3  # that the centers are learned, from other seeds; the best are kept
TRIALS = 16  # rows drawn for a seed; with 4, and once, 30 % of planted partitions were missed, with these none of 360
ROUNDS = 25  # of k-means, at most: it ends when no center moves
ROWS = 8192  # compared with all centers at once, in float64
SAME = 1e-6  # 1 - cosine, below which two vectors are one point to the choice of seeds


class Clustering(NamedTuple):
    """centers: float32 `(K, D)`, of length 1. owner: of each row its nearest center, int64 `(N,)`; each center owns
    one row or more. scores: the cosine to it, float32 `(N,)`."""

    centers: F32
    owner: I64
    scores: F32


def kmeans(vectors: F32, k: int, pause: Pause = lambda: None) -> Clustering:
    """Unit rows `(N, D)` in up to `k` clusters, 1 to N; in fewer where fewer of them differ, or a center is left with
    none."""
    order = in_order(vectors)
    random = np.random.default_rng(SEED)
    chosen = order
    if len(order) > k * PER_CLUSTER:
        chosen = order[np.sort(random.choice(len(order), k * PER_CLUSTER, replace=False))]
    sample = vectors[chosen]
    learned = [_learn(sample, _seeds(sample, k, random, pause), pause) for _ in range(TIMES)]
    centers = max(learned, key=lambda centers: _likeness(sample, centers))
    owner, scores = np.empty(len(order), np.int64), np.empty(len(order), np.float32)
    for rows in _parts(order):
        pause()
        owner[rows], scores[rows] = nearest_center(vectors[rows], centers)
    used, owner = np.unique(owner, return_inverse=True)
    return Clustering(centers[used], owner, scores)


def in_order(vectors: F32) -> I64:
    """Rows by their bytes: the same vectors come in the same order, however they were added."""
    order: I64 = np.argsort(np.ascontiguousarray(vectors).view(f"V{4 * vectors.shape[1]}").ravel(), kind="stable")
    return order


def nearest_center(vectors: F32, centers: F32) -> tuple[I64, F32]:
    """Of unit rows `(N, D)`: the nearest of the centers, int64 `(N,)`, the first of equals, and the cosine to it."""
    products = vectors.astype(np.float64) @ centers.astype(np.float64).T
    owner = products.argmax(axis=1)
    return owner, np.clip(products[np.arange(len(owner)), owner], -1.0, 1.0).astype(np.float32)


def _seeds(sample: F32, k: int, random: np.random.Generator, pause: Pause) -> F32:
    """Rows of the sample `(K, D)`: each is the best of a few, drawn with a chance that grows with the distance to the
    nearest one before. Random rows alone would often fall twice into one cluster, and k-means does not come back from
    that."""
    picked = [int(random.integers(len(sample)))]
    away = _distance(sample, sample[picked])[0]
    while len(picked) < k and away.any():
        pause()
        reach = np.cumsum(away, dtype=np.float64)
        drawn = np.searchsorted(reach, random.random(TRIALS) * reach[-1], side="right").clip(max=len(sample) - 1)
        left = np.minimum(away, _distance(sample, sample[drawn]))
        best = int(left.sum(axis=1, dtype=np.float64).argmin())
        picked.append(int(drawn[best]))
        away = left[best]
    return sample[picked]


def _distance(sample: F32, points: F32) -> F32:
    """1 - cosine, half the square of the distance, float32 `(P, M)`; 0 where it is no more than rounding."""
    distance: F32 = 1 - points @ sample.T
    distance[distance < SAME] = 0
    return distance


def _learn(sample: F32, centers: F32, pause: Pause) -> F32:
    """Lloyd's rounds, one at a time, so that they can be ended between two."""
    engine = faiss.Kmeans(
        sample.shape[1], len(centers), niter=1, spherical=True, seed=SEED, min_points_per_centroid=1,
        max_points_per_centroid=len(sample),
    )  # fmt: skip
    for _ in range(ROUNDS):
        pause()
        engine.train(sample, init_centroids=centers)
        before, centers = centers, np.asarray(engine.centroids)
        if np.array_equal(before, centers):
            break
    return centers


def _likeness(sample: F32, centers: F32) -> float:
    """The sum of the cosines to the nearest centers: what k-means makes as large as it can."""
    parts = (sample[start : start + ROWS] for start in range(0, len(sample), ROWS))
    return sum(float(nearest_center(part, centers)[1].sum(dtype=np.float64)) for part in parts)


def _parts(rows: I64) -> Iterator[I64]:
    return (rows[start : start + ROWS] for start in range(0, len(rows), ROWS))
