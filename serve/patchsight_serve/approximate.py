"""Approximate nearest neighbors: FAISS's inverted lists, of which a search visits some and is exact on those.

Each vector is in the list of the center that it is nearest to; a search visits the lists whose centers are nearest to
the query. How many that must be is measured when the index is built, on the gallery's own vectors. Knows vectors and
integer keys, no images, and no threads: who builds is `index`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np

from patchsight_serve.nearest import F32, I64, nearest, normalize

RECALL = 0.99  # of the neighbors that an exact search finds, in the mean, at each of LEVELS
LEVELS = (10, 100, 1000)  # neighbors asked for; what is between them is searched as the next one
LISTS = 4  # times the square root of the number of vectors: the least that FAISS's guidelines name
LIST = 39  # vectors of a list in the mean, at least; FAISS warns of fewer to find a center from
SAMPLE = 50  # vectors per list, from which the centers are found
ITERATIONS = 10  # of k-means, as FAISS has it for lists
QUERIES = 256  # of the gallery's own vectors, on which the recall is measured
CHUNK = 8192  # vectors between two looks at whether to go on: about a second at 4,000 lists
QUERY_CHUNK = 16
ROUNDING = 1e-6  # scores of one pair of vectors, summed in another order, differ by less

Read = Callable[[I64], tuple[I64, F32]]


@dataclass(frozen=True)
class Plan:
    """How an index of inverted lists is searched.

    lists: how many there are. probes: how many a search for each of LEVELS visits. recall: at the first of LEVELS, as
    measured. size: vectors at that time.
    """

    lists: int
    probes: tuple[int, ...]
    recall: float
    size: int

    def visited(self, k: int, share: float = 1.0) -> int:
        """Lists to visit for `k` neighbors, of a `share` of the vectors: the rarer they are, the further apart."""
        probes = next((probes for level, probes in zip(LEVELS, self.probes, strict=True) if k <= level), self.lists)
        return min(self.lists, int(np.ceil(probes / min(share, 1.0))))


def search(index: Any, plan: Plan, query: F32, k: int, selector: Any, chosen: int, exact: bool) -> tuple[I64, F32]:
    """As `nearest` for one query `(D,)`, of the lists visited: all of them if `exact`, else as many more as it takes to
    find `k`. chosen: how many vectors the selector lets through, about."""
    probes = plan.lists if exact else plan.visited(k, max(chosen, 1) / index.ntotal)
    while True:
        params = faiss.SearchParametersIVF(sel=selector, nprobe=probes)  # type: ignore[call-arg]
        ((keys, scores),) = nearest(index, query[None], k, params)
        if len(keys) >= k or probes == plan.lists:
            return keys, scores
        probes = min(4 * probes, plan.lists)


def build(keys: I64, read: Read, go_on: Callable[[], None]) -> tuple[Any, Plan] | None:
    """An index of inverted lists with the vectors under these keys, and how to search it; None if there are none.

    read: of keys, those that are still there, and their unit vectors `(N, D)`. go_on: is called once in a second or so,
    and raises to end the work.
    """
    rng = np.random.default_rng(0)
    lists = max(1, min(int(LISTS * len(keys) ** 0.5), len(keys) // LIST))
    chosen = rng.choice(keys, min(len(keys), SAMPLE * lists), replace=False)
    sample = np.concatenate([read(part)[1] for part in _chunks(chosen, CHUNK)])
    if not len(sample):
        return None
    centers = _centers(sample, min(lists, len(sample)), rng, go_on)
    del sample
    index = _empty(centers)
    for part in _chunks(keys, CHUNK):
        there, vectors = read(part)
        index.add_with_ids(vectors, there)
    return (index, _plan(index, rng, go_on)) if index.ntotal else None


def keys_of(index: Any) -> I64:
    """All keys of a `flat_index`, or of an index of inverted lists."""
    if not isinstance(index, faiss.IndexIVF):
        keys: I64 = faiss.vector_to_array(index.id_map)
        return keys
    inverted: Any = index.invlists
    sizes = [inverted.list_size(i) for i in range(index.nlist)]
    lists = [faiss.rev_swig_ptr(inverted.get_ids(i), size).copy() for i, size in enumerate(sizes) if size]
    return np.concatenate(lists) if lists else np.empty(0, np.int64)


def _chunks(keys: I64, size: int) -> Iterator[I64]:
    return (keys[start : start + size] for start in range(0, len(keys), size))


def _empty(centers: F32) -> Any:
    """No vectors yet, in as many lists as there are centers."""
    lists, dim = centers.shape
    quantizer = faiss.IndexFlatIP(dim)
    quantizer.add(centers)
    index = faiss.IndexIVFFlat(quantizer, dim, lists, faiss.METRIC_INNER_PRODUCT)
    by_key = faiss.DirectMap.Hashtable  # type: ignore[attr-defined]
    index.set_direct_map_type(by_key)  # to look up and remove
    return index


def _centers(sample: F32, lists: int, rng: np.random.Generator, go_on: Callable[[], None]) -> F32:
    """Unit centers `(lists, D)` by spherical k-means. FAISS's own cannot be ended before it is done, which takes
    minutes; what takes long here is still FAISS's, a chunk at a time."""
    centers = sample[rng.choice(len(sample), lists, replace=False)]
    for _ in range(ITERATIONS):
        sums = np.zeros_like(centers)
        for start in range(0, len(sample), CHUNK):
            go_on()
            part = sample[start : start + CHUNK]
            _, nearest_center = faiss.knn(part, centers, 1, metric=faiss.METRIC_INNER_PRODUCT)
            order = np.argsort(nearest_center[:, 0], kind="stable")
            of = nearest_center[order, 0]
            first = np.flatnonzero(np.diff(of, prepend=-1))
            sums[of[first]] += np.add.reduceat(part[order], first, axis=0)
        lost = np.flatnonzero(~sums.any(axis=1))  # nothing is nearest to them: they begin anew
        sums[lost] = sample[rng.choice(len(sample), len(lost))]
        centers = normalize(sums)
    return centers


def _plan(index: Any, rng: np.random.Generator, go_on: Callable[[], None]) -> Plan:
    """Visit more lists until the index's own vectors find their neighbors."""
    own = rng.choice(keys_of(index), min(QUERIES, index.ntotal), replace=False)
    lists = index.nlist
    exact = _own_scores(index, own, lists, go_on)
    enough: list[int] = []
    recall, probes = 1.0, 1
    while len(enough) < len(LEVELS):
        scores = exact if probes == lists else _own_scores(index, own, probes, go_on)
        while len(enough) < len(LEVELS):
            reached = _recall(scores, exact, LEVELS[len(enough)])
            if reached < RECALL:
                break
            recall = recall if enough else reached
            enough.append(probes)
        probes = min(lists, max(probes + 1, probes * 5 // 4))
    return Plan(lists, tuple(enough), recall, index.ntotal)


def _own_scores(index: Any, own: I64, probes: int, go_on: Callable[[], None]) -> F32:
    """Scores `(Q, K)` of the neighbors that vectors of the index find, best first, they themselves left out."""
    k = min(LEVELS[-1], index.ntotal - 1)
    found = []
    for keys in _chunks(own, QUERY_CHUNK):
        go_on()
        params = faiss.SearchParametersIVF(nprobe=probes)  # type: ignore[call-arg]
        scores, neighbors = index.search(index.reconstruct_batch(keys), k + 1, params=params)
        scores[(neighbors == keys[:, None]) | (neighbors < 0)] = -np.inf
        found.append(-np.sort(-scores, axis=1)[:, :k])
    return np.concatenate(found)


def _recall(scores: F32, exact: F32, level: int) -> float:
    """The share of the `level` best that is found, in the mean over the queries; equal scores are equally good."""
    k = min(level, exact.shape[1])
    if not k:
        return 1.0
    return float((scores[:, :k] >= exact[:, k - 1 : k] - ROUNDING).mean())
