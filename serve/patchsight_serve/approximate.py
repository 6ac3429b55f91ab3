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
DOUBT = 4  # standard deviations that a similarity by code may be off; with 3, 0.2 % of the neighbors were missed
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
        (closeness,), (lists,) = self.codes.quantizer.search(query[None], self.plan.lists)
        best = _Best(vectors, query, k)
        visited, wanted = 0, self.plan.needed(1.0)
        while visited < wanted:
            some = slice(visited, wanted)
            self._visit(lists[some], closeness[some], best, selector)
            visited = wanted
            needed = self.plan.needed(best.least) if best.enough else self.plan.lists
            wanted = min(needed, GROWTH * visited)  # in steps: what is found next may be more similar, and need less
        keys, scores = best.answer()
        return keys, scores, visited

    def _visit(self, lists: I64, closeness: F32, best: "_Best", selector: Any) -> None:
        """Compare the query with what may be among the best in these lists. closeness: of it to their centers."""
        fetch, known = SPARE * best.k + FETCH, np.empty(0, np.int64)
        while True:
            by_code, found = self._codes_in(lists, closeness, best.query, fetch, selector)
            fresh = (found >= 0) & ~np.isin(found, known) if known.size else found >= 0
            best.compare(found[fresh], by_code[fresh])
            if found[-1] < 0 or not best.hopeful(by_code[-1:])[0]:
                return
            fetch, known = 4 * fetch, found  # one that the codes have behind those fetched may be better

    def _codes_in(self, lists: I64, closeness: F32, query: F32, fetch: int, selector: Any) -> tuple[F32, I64]:
        """Similarity by the codes and keys `(fetch,)`, best first; −1 where there are fewer."""
        by_code, keys = np.empty(fetch, np.float32), np.empty(fetch, np.int64)
        params = faiss.SearchParametersIVF(sel=selector, nprobe=len(lists))  # type: ignore[call-arg]
        places = [faiss.swig_ptr(table) for table in (lists, closeness, by_code, keys)]
        # Not the method without `_c`: it takes no parameters, and the number of lists would be the index's own.
        self.codes.search_preassigned_c(1, faiss.swig_ptr(query), fetch, *places, False, params)
        return by_code, keys


class _Best:
    """The `k` vectors most similar to a query of all that were compared so far, and ties at the k-th place.

    least: the similarity of the last of them, −1 as long as there are fewer.
    """

    def __init__(self, vectors: Vectors, query: F32, k: int) -> None:
        self.query, self.k = np.ascontiguousarray(query), k
        self.least = -1.0
        self._vectors = vectors
        self._keys: I64 = np.empty(0, np.int64)
        self._scores: F32 = np.empty(0, np.float32)
        self._wrong: F32 = np.empty(0, np.float32)  # similarities by code less the true ones

    @property
    def enough(self) -> bool:
        return len(self._keys) >= self.k

    def hopeful(self, by_code: F32) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Which of these similarities by code may be of one of the best, bool `(N,)`."""
        return by_code + (DOUBT * np.std(self._wrong) if self.enough else np.inf) >= self.least

    def compare(self, keys: I64, by_code: F32) -> None:
        """Exactly those that may be among the best; keys that are gone are passed over."""
        chosen = self.hopeful(by_code) & self._vectors.has(keys)
        keys, by_code = keys[chosen], by_code[chosen]
        if not len(keys):
            return
        table = self._vectors.reconstruct_batch(keys)
        rough = table @ self.query  # off in the last digits
        self._wrong = np.concatenate([self._wrong, by_code - rough])
        every = np.concatenate([self._scores, rough])
        floor = np.partition(every, -self.k)[-self.k] - ROUNDING if len(every) >= self.k else -np.inf
        near, stay = np.flatnonzero(rough >= floor), self._scores >= floor
        self._keys = np.concatenate([self._keys[stay], keys[near]])
        self._scores = np.concatenate([self._scores[stay], cosine(table[near], self.query)])
        if self.enough:
            self.least = float(np.partition(self._scores, -self.k)[-self.k])

    def answer(self) -> tuple[I64, F32]:
        best = self._scores >= self.least
        return self._keys[best], self._scores[best]


def _selector(only: I64 | None, left: I64 | None) -> Any:
    """FAISS's; None lets all through."""
    if only is not None:
        chosen = np.zeros(int(only.max(initial=0)) + 1, dtype=bool)
        chosen[only] = True
        return faiss.IDSelectorBitmap(np.packbits(chosen, bitorder="little"))  # type: ignore[call-arg, arg-type]
    return None if left is None or not left.size else faiss.IDSelectorNot(faiss.IDSelectorBatch(left))
