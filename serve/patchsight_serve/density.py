"""Clusters of unit vectors by density: HDBSCAN (Campello et al., 2013) by scikit-learn, where it is installed. It finds
how many there are, and leaves out what lies between them.

The answer depends on the set of vectors alone. Knows unit vectors, no images.
"""

from importlib.util import find_spec

import numpy as np

from patchsight_serve.errors import InvalidRequest
from patchsight_serve.kmeans import Clustering, in_order
from patchsight_serve.linkage import Pause
from patchsight_serve.nearest import F32, I64, cosine, normalize

MAX_VECTORS = 5000  # all pairs of them are compared, in 0.4 GB; 10,000 took 1.6 GB


def require(count: int) -> None:
    """Raises InvalidRequest if so many vectors are too many, or scikit-learn is not there."""
    if find_spec("sklearn") is None:
        raise InvalidRequest(
            "hdbscan needs scikit-learn, which this server has not: pip install scikit-learn", "method"
        )
    if count > MAX_VECTORS:
        message = f"hdbscan compares all pairs of images; the gallery has {count:,}, the limit is {MAX_VECTORS:,}"
        raise InvalidRequest(message, "method")


def hdbscan(vectors: F32, min_size: int, pause: Pause = lambda: None) -> Clustering:
    """Unit rows `(N, D)` in clusters of at least `min_size`; what belongs to none has owner -1 and score 0. Raises as
    `require` does."""
    require(len(vectors))
    owner = np.full(len(vectors), -1, np.int64)
    if len(vectors) >= min_size:
        from sklearn.cluster import HDBSCAN  # only now: it takes a second to load

        pause()
        order = in_order(vectors)
        # Of unit vectors the Euclidean distance ranks as the cosine does. Its other algorithms hold Python's lock, and
        # with it the whole server, for as long as they work.
        engine = HDBSCAN(min_cluster_size=min_size, algorithm="brute", copy=True)
        owner[order] = engine.fit_predict(vectors[order])
        pause()
    return _described(vectors, owner)


def _described(vectors: F32, owner: I64) -> Clustering:
    """With centers, the directions of the means, and the cosines to them."""
    count = int(owner.max(initial=-1)) + 1
    centers, scores = np.empty((count, vectors.shape[1]), np.float32), np.zeros(len(vectors), np.float32)
    for cluster in range(count):
        rows = np.flatnonzero(owner == cluster)
        total = vectors[rows].sum(axis=0, dtype=np.float64)
        centers[cluster] = normalize(total if total.any() else vectors[rows[0]])
        scores[rows] = cosine(vectors[rows], centers[cluster])
    return Clustering(centers, owner, scores)
