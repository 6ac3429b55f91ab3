"""Making an approximate index: the codes of all vectors, and the measure of how many lists hold what is how similar."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import faiss
import numpy as np

from patchsight_serve.approximate import ROUNDING, STEPS, Approximate, Plan, Reading
from patchsight_serve.nearest import F32, I64, normalize
from patchsight_serve.vectors import Vectors

RECALL = 0.99  # of the neighbors that an exact search finds, in the mean
COVERED = (0.995, 0.999)  # of the pairs of a similarity, tried in turn until RECALL is reached
LISTS = 2  # times the square root of the number of vectors
LIST = 39  # vectors of a list in the mean, at least; FAISS warns of fewer to find a center from
SAMPLE = 50  # vectors per list, from which the centers are found
ITERATIONS = 10  # of k-means, as FAISS has it for lists
MEASURED = 10  # neighbors, for the recall
QUERIES = 128  # of the gallery's own vectors: one side of the pairs, and what the recall is measured on
PARTNERS = 16_384  # the other side
PAIRS = 50  # of a similarity, at least
SMALL = 128  # values of a vector: of up to so many each has a code of its own, of more two have one
BITS, CODE_MIN = 4, 32  # of a code; vectors to learn it from: from 16 equal ones FAISS learns one that finds nothing
CHUNK = 8192  # vectors between two looks at whether to go on: about a second at 4,000 lists

Some = tuple[I64, F32]  # keys and their vectors


def build(vectors: Vectors, keys: I64, reading: Reading, go_on: Callable[[], None]) -> Approximate | None:
    """Codes of the vectors under these keys, and how to search them; None if there are too few to learn a code from.

    reading: nothing changes during its block. go_on: is called once in a second or so; both raise to end the work.
    """

    def read(keys: I64) -> Some:
        """Those that are still there."""
        with reading():
            return vectors.read(keys)

    rng = np.random.default_rng(0)
    lists = max(1, min(int(LISTS * len(keys) ** 0.5), len(keys) // LIST))
    chosen = rng.choice(keys, min(len(keys), SAMPLE * lists), replace=False)
    sample = np.concatenate([np.empty((0, vectors.d), np.float32), *(read(some)[1] for some in _chunks(chosen))])
    if len(sample) < CODE_MIN:
        return None
    codes = _empty(_centers(sample, lists, rng, go_on), sample)
    del sample
    for some in _chunks(keys):
        there, found = read(some)
        codes.add_with_ids(found, there)
    if not codes.ntotal:
        return None
    own = read(rng.choice(keys, min(QUERIES, len(keys)), replace=False))
    near = [_nearest(vectors, codes.quantizer, *one, keys, reading) for one in zip(*own, strict=True)]
    pairs = _pairs(codes.quantizer, own, near, read(rng.choice(keys, min(PARTNERS, len(keys)), replace=False)))
    for covered in COVERED:  # more of the pairs, until the gallery's own vectors find their neighbors
        plan = Plan(codes.nlist, _probes(*pairs, covered, codes.nlist), 1.0, codes.nlist, codes.ntotal)
        made = _measured(Approximate(codes, plan), vectors, own, near, reading)
        if made.plan.recall >= RECALL:
            break
    return made


def _chunks(keys: I64) -> Iterator[I64]:
    return (keys[start : start + CHUNK] for start in range(0, len(keys), CHUNK))


def _empty(centers: F32, sample: F32) -> Any:
    """No vectors yet, in as many lists as there are centers."""
    lists, dim = centers.shape
    quantizer = faiss.IndexFlatIP(dim)
    quantizer.add(centers)
    parts = dim // 2 if dim % 2 == 0 and dim > SMALL else dim
    codes = faiss.IndexIVFPQFastScan(quantizer, dim, lists, parts, BITS, faiss.METRIC_INNER_PRODUCT)
    codes.pq.cp.min_points_per_centroid = 1  # or it warns of small galleries
    codes.train(sample)
    return codes


def _centers(sample: F32, lists: int, rng: np.random.Generator, go_on: Callable[[], None]) -> F32:
    """Unit centers `(lists, D)` by spherical k-means. FAISS's own cannot be ended before it is done, which takes
    minutes; what takes long here is still FAISS's, a chunk at a time."""
    lists = min(lists, len(sample))
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


def _nearest(vectors: Vectors, quantizer: Any, key: int, query: F32, among: I64, reading: Reading) -> tuple[F32, I64]:
    """Of a vector's own neighbors, MEASURED where there are so many, the scores and the lists that they are in."""
    with reading():  # what has come meanwhile has no code yet
        scores, keys = vectors.search(query[None], MEASURED + 1, vectors.only(among))
        others = (keys[0] != key) & (keys[0] >= 0)
        others[MEASURED:] &= others[:MEASURED].sum() < MEASURED
        lists = quantizer.assign(vectors.reconstruct_batch(keys[0][others]), 1)[:, 0]
    return scores[0][others], lists


def _pairs(quantizer: Any, own: Some, near: list[tuple[F32, I64]], partners: Some) -> tuple[F32, I64]:
    """Of own vectors with their neighbors and with the partners: how similar the two are, `(P,)`, and how many lists
    the first must visit to come to the second."""
    _, order = quantizer.search(own[1], quantizer.ntotal)
    visits = np.empty_like(order)
    np.put_along_axis(visits, order, np.arange(1, quantizer.ntotal + 1)[None], axis=1)
    others = own[0][:, None] != partners[0][None]
    lists = quantizer.assign(partners[1], 1)[:, 0]
    similarity = [(own[1] @ partners[1].T)[others], *(scores for scores, _ in near)]
    return np.concatenate(similarity), np.concatenate(
        [visits[:, lists][others], *(visits[i, lists] for i, (_, lists) in enumerate(near))]
    )


def _probes(similarity: F32, visits: I64, covered: float, lists: int) -> tuple[int, ...]:
    """For each of STEPS the lists in which `covered` of the pairs find each other; where there are too few pairs, as
    for those less similar; all lists, where there are none of these."""
    step = np.clip(np.searchsorted(STEPS, similarity, "right") - 1, 0, len(STEPS) - 1)
    probes, last = np.empty(len(STEPS), np.int64), lists
    for i in range(len(STEPS)):
        of_step = visits[step == i]
        if len(of_step) >= PAIRS:
            last = int(np.quantile(of_step, covered, method="higher"))
        probes[i] = last
    return tuple(np.maximum.accumulate(probes[::-1])[::-1].tolist())


def _measured(
    made: Approximate, vectors: Vectors, own: Some, near: list[tuple[F32, I64]], reading: Reading
) -> Approximate:
    """With what its plan finds of the neighbors of the own vectors; equal scores are equally good."""
    found, visited = [], []
    for key, query, (exact, _) in zip(*own, near, strict=True):
        if exact.size:
            with reading():
                keys, scores, probes = made.search(vectors, query, len(exact) + 1)
            least = exact.min() - ROUNDING
            found.append(min(1.0, np.count_nonzero(scores[keys != key] >= least) / len(exact)))
            visited.append(probes)
    recall, typical = (float(np.mean(found)), int(np.median(visited))) if found else (1.0, 1)
    return replace(made, plan=replace(made.plan, recall=recall, typical=typical))
