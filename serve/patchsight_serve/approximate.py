"""Approximate nearest neighbors: short codes of the vectors in inverted lists, whose best are compared exactly.

A code has four bits for each pair of values (product quantization, scanned in registers: arXiv:1812.09162), so that
sixteen times less memory is read than with the vectors. Each code is in the list of the center that its vector is
nearest to, and a search visits the lists whose centers are nearest to the query. How many, depends on what it finds: it
goes on until neighbors as similar as the last one it wants would have been in the lists visited. How many lists that
takes for each similarity is measured when the codes are made, on pairs of the gallery's own vectors; so also a query
that is like none of them is answered well, which a number of lists tuned on the gallery's own images does not give.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np

from patchsight_serve.nearest import F32, I64, cosine
from patchsight_serve.vectors import Vectors

SPARE, FETCH = 10, 300  # codes fetched: so many for each neighbor wanted, and so many more
GROWTH = 8  # times as many lists as before, at most, when those visited were too few
STEPS = np.arange(-1.0, 1.0, 0.05)  # of similarity
ROUNDING = 1e-6  # scores of one pair of vectors, summed in another order, differ by less

Reading = Callable[[], AbstractContextManager[None]]  # no vector changes during its block


@dataclass(frozen=True)
class Plan:
    """How many lists to visit.

    lists: how many there are. probes: for neighbors of at least the similarity of each of STEPS, never growing.
    recall, typical: of 10 neighbors, as measured, and how many lists that took in the median. size: vectors then.
    """

    lists: int
    probes: tuple[int, ...]
    recall: float
    typical: int
    size: int

    def needed(self, similarity: float) -> int:
        """Lists in which neighbors of this similarity lie, or of a greater one."""
        return self.probes[int(np.clip(np.searchsorted(STEPS, similarity, "right") - 1, 0, len(STEPS) - 1))]


@dataclass(frozen=True)
class Approximate:
    """codes: an index of FAISS that is addressed by the keys of the vectors; it may have some that are gone."""

    codes: Any
    plan: Plan

    def keys(self) -> I64:
        """Of all codes, int64 `(N,)`, in any order."""
        lists: Any = self.codes.invlists
        sizes = [lists.list_size(i) for i in range(self.codes.nlist)]
        keys = [faiss.rev_swig_ptr(lists.get_ids(i), size).copy() for i, size in enumerate(sizes) if size]
        return np.concatenate(keys) if keys else np.empty(0, np.int64)

    def add(self, keys: I64, vectors: F32) -> None:
        """Unit vectors `(N, D)` that have come."""
        self.codes.add_with_ids(vectors, keys)

    def search(
        self, vectors: Vectors, query: F32, k: int, only: I64 | None = None, left: I64 | None = None
    ) -> tuple[I64, F32, int]:
        """Keys and scores, in any order, of `k` vectors and all ties at the k-th place, or all that there are; and how
        many lists were visited.

        query: unit `(D,)`. only: keys to choose from, or None; else those that are not `left`, or None.
        """
        selector = _selector(only, left)
        probes, fetch = self.plan.needed(1.0), SPARE * k + FETCH
        while True:
            params = faiss.SearchParametersIVF(sel=selector, nprobe=probes)  # type: ignore[call-arg]
            (by_code,), (found,) = self.codes.search(query[None], fetch, params=params)
            there = vectors.has(found)
            keys = found[there]
            scores = _scores(vectors, keys, query, k)
            enough = len(keys) >= k
            least = float(np.partition(scores, -k)[-k]) if enough else -1.0
            error = 3 * float(np.std(by_code[there] - scores)) if enough else np.inf
            if found[-1] >= 0 and least <= by_code[-1] + error:
                fetch *= 4  # one that the codes have behind those fetched may be better
                continue
            needed = self.plan.needed(least) if enough else self.plan.lists
            if needed <= probes or probes == self.plan.lists:
                best = scores >= least
                return keys[best], scores[best], probes
            probes = min(needed, GROWTH * probes)  # in steps: what is found next may be more similar, and need less


def _scores(vectors: Vectors, keys: I64, query: F32, k: int) -> F32:
    """Exact ones `(N,)` of all that may be among the best `k`; the others' may be off in the last digits."""
    scores: F32 = np.empty(len(keys), np.float32)
    if len(keys):
        table = vectors.reconstruct_batch(keys)
        scores[:] = table @ query
        near = np.flatnonzero(scores >= np.partition(scores, -min(k, len(keys)))[-min(k, len(keys))] - ROUNDING)
        scores[near] = cosine(table[near], query)
    return scores


def _selector(only: I64 | None, left: I64 | None) -> Any:
    """FAISS's; None lets all through."""
    if only is not None:
        chosen = np.zeros(int(only.max(initial=0)) + 1, dtype=bool)
        chosen[only] = True
        return faiss.IDSelectorBitmap(np.packbits(chosen, bitorder="little"))  # type: ignore[call-arg, arg-type]
    return None if left is None or not left.size else faiss.IDSelectorNot(faiss.IDSelectorBatch(left))
