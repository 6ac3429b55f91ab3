"""Exact nearest neighbors by cosine: FAISS proposes, float64 decides.

FAISS sums in float32 in an order that depends on the number of queries, and breaks ties as it likes. So it is asked for
a few more than are wanted, those are scored again in float64 (rounded to float32), and the answer counts only once the
rounding error of FAISS provably cannot hide a better one. Knows vectors and integer keys, no images.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import faiss
import numpy as np

from patchsight_serve.errors import InvalidRequest

ROWS = 65_536  # that are normalized at once, in float64
MARGIN = 16  # asked for beyond k: enough that real embeddings are settled at the first try
LOOKED_UP = 4096  # vectors at once, which are copied, and again in float64

F32 = np.ndarray[Any, np.dtype[np.float32]]
I64 = np.ndarray[Any, np.dtype[np.int64]]


def normalize(vectors: F32) -> F32:
    """Rows `(N, D)` or one vector `(D,)` to length 1, as float32.

    Raises:
        InvalidRequest: a vector has length 0, or holds NaN or infinity; `param` is its row.
    """
    exact = np.asarray(vectors, dtype=np.float64)
    # Scaled by the largest entry first, so that squares neither overflow nor vanish.
    peak = np.abs(exact).max(axis=-1, keepdims=True, initial=0.0)
    bad = np.flatnonzero(~np.isfinite(peak) | (peak == 0.0))
    if bad.size:
        row = int(bad[0])
        why = "has length 0" if peak.ravel()[row] == 0.0 else "holds NaN or infinity"
        raise InvalidRequest(f"vector {row} {why}: it has no direction", param=f"vectors[{row}]")
    scaled = exact / peak
    unit: F32 = (scaled / np.linalg.norm(scaled, axis=-1, keepdims=True)).astype(np.float32)
    return unit


def normalize_rows(vectors: F32) -> None:
    """`normalize` in place, for matrices of gigabytes."""
    for start in range(0, len(vectors), ROWS):
        part = vectors[start : start + ROWS]
        part[:] = normalize(part)


class Flat:
    """Unit rows `(N, D)` as an index that searches them where they lie: a copy of a gallery may be gigabytes."""

    def __init__(self, vectors: F32) -> None:
        self._vectors = np.ascontiguousarray(vectors)
        self.ntotal, self.d = vectors.shape

    def search(self, queries: F32, k: int, params: None = None) -> tuple[F32, I64]:  # noqa: ARG002 - FAISS's signature
        found: tuple[F32, I64] = faiss.knn(queries, self._vectors, k, metric=faiss.METRIC_INNER_PRODUCT)
        return found

    def reconstruct_batch(self, keys: I64) -> F32:
        rows: F32 = self._vectors[keys]
        return rows


def cosine(vectors: F32, query: F32) -> F32:
    """Unit rows `(K, D)` against one unit query `(D,)`: float32 `(K,)` in -1..1.

    Summed row by row in float64, so a score depends on nothing but its two vectors.
    """
    products = np.multiply(vectors, query, dtype=np.float64).sum(axis=1)
    scores: F32 = np.clip(products, -1.0, 1.0).astype(np.float32)
    return scores


@contextmanager
def _threads_for(queries: int) -> Iterator[None]:
    """One thread for a single query: OpenMP's would spin, and on cores that others use also a search of milliseconds
    takes them a second. Requests bring threads of their own. Set for the calling thread alone."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1 if queries == 1 else before)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def nearest(index: Any, queries: F32, k: int, params: Any = None) -> list[tuple[I64, F32]]:
    """For each unit query of `(Q, D)`: keys and scores, in any order, of at least all vectors that may belong to the
    best `k`, ties at the k-th place included. Sorting by score and by the caller's own rule for ties gives exactly
    what brute force gives.

    index: `Flat`, or `Vectors`; must not change during the call. params: what it makes to choose among keys, or None.
    """
    found: list[tuple[I64, F32]] = [(np.empty(0, np.int64), np.empty(0, np.float32))] * len(queries)
    if index.ntotal == 0 or k < 1:
        return found
    # |computed - true| of a float32 dot product of unit vectors is below D · 2⁻²⁴ (1 + tiny); twice that, to be safe.
    error = index.d * 2.0**-23
    pending, fetch = np.arange(len(queries)), min(k + MARGIN, index.ntotal)
    while pending.size:
        with _threads_for(len(queries)):
            approximate, keys = index.search(queries[pending], fetch, params=params)
        unsettled = []
        for row, q in enumerate(pending):
            mine = keys[row][keys[row] >= 0]
            scores = cosine(index.reconstruct_batch(mine), queries[q]) if mine.size else np.empty(0, np.float32)
            found[q] = mine, scores
            everything = mine.size < fetch or fetch == index.ntotal
            if not everything and np.partition(scores, -k)[-k] <= approximate[row].min() + 2 * error:
                unsettled.append(q)
        pending, fetch = np.array(unsettled, dtype=np.int64), min(4 * fetch, index.ntotal)
    return found


def among(index: Any, keys: I64, query: F32, k: int) -> tuple[I64, F32]:
    """As `nearest` for one query `(D,)`, of the vectors under these keys alone, which must be there: the others cost
    nothing."""
    scores = np.empty(len(keys), np.float32)
    for start in range(0, len(keys), LOOKED_UP):
        scores[start : start + LOOKED_UP] = cosine(index.reconstruct_batch(keys[start : start + LOOKED_UP]), query)
    if k >= len(keys):
        return keys, scores
    best = scores >= np.partition(scores, -k)[-k]
    return keys[best], scores[best]
