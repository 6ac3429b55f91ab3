"""Which vectors hang together: the connected components of all pairs whose cosine reaches a limit.

Exact, and in blocks: never all pairs at once. FAISS proposes, float64 decides, as in `nearest`. Knows unit vectors and
their rows, no images.
"""

from collections.abc import Callable, Iterator

import faiss
import numpy as np

from patchsight_serve.nearest import F32, I64, cosine

ROWS, COLUMNS = 2048, 512  # whose pairs are in memory at once: 50 MB where every one of them reaches the limit
EXACT = 8192  # pairs, or rows, that are computed in float64 at once
SAME = 1e-6  # mean cosines that differ by less differ by rounding alone

Pause = Callable[[], None]  # called between two blocks; ends the work by raising


def components(vectors: F32, min_score: float, pause: Pause = lambda: None) -> I64:
    """For each of the unit rows `(N, D)` the lowest row of its component, int64 `(N,)`.

    Two rows are in one component if pairs lead from one to the other whose `nearest.cosine` is >= min_score. Equal
    rows always are: their cosine is 1, also where rounding leaves it a little below.
    """
    parent: I64 = np.arange(len(vectors))
    # As in `nearest`: twice what the float32 product of two unit vectors can be wrong by.
    error = vectors.shape[1] * 2.0**-23
    for left in range(0, len(vectors), COLUMNS):
        columns = faiss.IndexFlatIP(vectors.shape[1])
        columns.add(vectors[left : left + COLUMNS])
        end = min(left + COLUMNS, len(vectors))
        for start in range(0, end, ROWS):
            pause()
            top = max(0, min(start, end - ROWS))  # the last block overlaps: FAISS is seven times slower with few rows
            limits, scores, found = columns.range_search(vectors[top : min(top + ROWS, end)], min_score - error)
            counts = (limits[1:] - limits[:-1]).astype(np.int64)
            a = top + np.repeat(np.arange(len(counts)), counts)
            b = left + found
            apart = parent[a] != parent[b]  # most pairs are of rows that are together already
            a, b, certain = a[apart], b[apart], scores[apart] >= min_score + error
            _merge(parent, a[certain], b[certain])
            _merge_close(parent, vectors, a[~certain], b[~certain], min_score)
    return parent


def _merge_close(parent: I64, vectors: F32, a: I64, b: I64, min_score: float) -> None:
    """Merge those pairs of rows that reach the limit, which only float64 can tell."""
    while a.size:
        apart = parent[a] != parent[b]
        a, b = a[apart], b[apart]
        left, right = vectors[a[:EXACT]], vectors[b[:EXACT]]
        reached = (cosine(left, right).astype(np.float64) >= min_score) | (left == right).all(axis=1)
        _merge(parent, a[:EXACT][reached], b[:EXACT][reached])
        a, b = a[EXACT:], b[EXACT:]


def _merge(parent: I64, a: I64, b: I64) -> None:
    """Put the components of each pair of rows together. `parent` gives each row's lowest one, before and after."""
    while True:
        a, b = parent[a], parent[b]
        apart = a != b
        if not apart.any():
            return
        a, b = a[apart], b[apart]
        # Of several links of a row one is taken, its lowest; the others have their turn in the next round.
        np.minimum.at(parent, np.maximum(a, b), np.minimum(a, b))
        while True:
            above = parent[parent]
            if np.array_equal(above, parent):
                break
            parent[:] = above


def central(vectors: F32, rows: I64) -> tuple[int, F32]:
    """Of a group of rows `(M,)` the place of the one that is most like all of them, the first of equals; and the
    cosine of each to it, float32 `(M,)`."""
    total = np.zeros(vectors.shape[1])
    for part in _parts(rows):
        total += vectors[part].sum(axis=0, dtype=np.float64)
    # The mean of the cosines to all is the product with the mean of all: no need for the M × M pairs.
    alike = np.concatenate([vectors[part].astype(np.float64) @ total for part in _parts(rows)]) / len(rows)
    first = int(np.argmax(alike >= alike.max() - SAME))
    scores: F32 = np.concatenate([cosine(vectors[part], vectors[rows[first]]) for part in _parts(rows)])
    scores[first] = 1.0
    return first, scores


def _parts(rows: I64) -> Iterator[I64]:
    return (rows[start : start + EXACT] for start in range(0, len(rows), EXACT))
