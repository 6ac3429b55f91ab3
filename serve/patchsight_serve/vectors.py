"""Unit vectors in memory, by key: what every search compares with in the end.

Adding, looking up and taking out cost what they touch, however many there are. They lie in FAISS's flat index, without
gaps: the last one takes the place of one that goes. Which row has which key is kept here.
"""

from typing import Any

import faiss
import numpy as np

from patchsight_serve.nearest import F32, I64

_NONE = np.empty(0, np.int64)
_I32 = np.ndarray[Any, np.dtype[np.int32]]


class Vectors:
    """Rows of `d` values under int64 keys from 0 on, each used once; a table of keys takes 4 bytes for each up to the
    largest. Whoever changes them keeps readers away meanwhile."""

    def __init__(self, dim: int) -> None:
        self._flat = faiss.IndexFlatIP(dim)
        self._keys: I64 = _NONE  # of each row; longer than there are rows
        self._rows: _I32 = np.empty(0, np.int32)  # of each key; -1: none

    @property
    def ntotal(self) -> int:
        """How many there are."""
        return int(self._flat.ntotal)

    @property
    def d(self) -> int:
        """Values per vector."""
        return int(self._flat.d)

    def keys(self) -> I64:
        """All keys, int64 `(N,)`, ascending; a copy."""
        return np.sort(self._keys[: self.ntotal])

    def add(self, keys: I64, vectors: F32) -> None:
        """Put unit vectors float32 `(N, D)` in under keys `(N,)` that were never used."""
        first, count = self.ntotal, self.ntotal + len(keys)
        self._keys = _grown(self._keys, count, 0)
        self._rows = _grown(self._rows, int(keys.max(initial=-1)) + 1, -1)
        self._flat.add(vectors)
        self._keys[first:count] = keys
        self._rows[keys] = np.arange(first, count)

    def remove(self, keys: I64) -> int:
        """Take out those of the keys that are there; how many that were."""
        rows = self._rows_of(keys)
        gone = np.unique(rows[rows >= 0])
        if not gone.size:
            return 0
        left = self.ntotal - len(gone)
        self._rows[self._keys[gone]] = -1
        holes = gone[gone < left]
        last = np.setdiff1d(np.arange(left, self.ntotal), gone, assume_unique=True)  # as many as there are holes
        table = faiss.rev_swig_ptr(self._flat.get_xb(), self.ntotal * self.d).reshape(-1, self.d)
        table[holes] = table[last]
        self._keys[holes] = self._keys[last]
        self._rows[self._keys[holes]] = holes
        self._flat.remove_ids(faiss.IDSelectorRange(left, self.ntotal))
        return len(gone)

    def has(self, keys: I64) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Whether each of the keys is there, bool `(N,)`."""
        return self._rows_of(keys) >= 0

    def present(self, keys: I64) -> I64:
        """Those of the keys that are there, in their order."""
        there: I64 = keys[self.has(keys)]
        return there

    def read(self, keys: I64) -> tuple[I64, F32]:
        """Those of the keys that are there, in their order, and their vectors `(N, D)`."""
        there = self.present(keys)
        return there, self.reconstruct_batch(there)

    def reconstruct_batch(self, keys: I64) -> F32:
        """Their vectors `(N, D)`. Raises KeyError where one is not there."""
        rows = self._rows_of(keys)
        if (rows < 0).any():
            raise KeyError(int(keys[rows < 0][0]))
        table = faiss.rev_swig_ptr(self._flat.get_xb(), self.ntotal * self.d).reshape(-1, self.d)
        vectors: F32 = table[rows]
        return vectors

    def search(self, queries: F32, k: int, params: Any = None) -> tuple[F32, I64]:
        """As FAISS's: scores and keys `(Q, k)`, best first, −1 where there are fewer. params: of `only`, `all_but`."""
        scores, rows = self._flat.search(queries, k, params=params)
        keys = np.full(rows.shape, -1)
        keys[rows >= 0] = self._keys[rows[rows >= 0]]
        return scores, keys

    def only(self, keys: I64) -> Any:
        """What has `search` look among these keys; those that are not there are passed over."""
        rows = self._rows_of(keys)
        chosen = np.zeros(self.ntotal, dtype=bool)
        chosen[rows[rows >= 0]] = True
        selector = faiss.IDSelectorBitmap(np.packbits(chosen, bitorder="little"))  # type: ignore[call-arg, arg-type]
        return faiss.SearchParameters(sel=selector)  # type: ignore[call-arg]

    def all_but(self, keys: I64) -> Any:
        """What has `search` pass over these keys."""
        rows = self._rows_of(keys)
        selector = faiss.IDSelectorNot(faiss.IDSelectorBatch(rows[rows >= 0].astype(np.int64)))
        return faiss.SearchParameters(sel=selector)  # type: ignore[call-arg]

    def _rows_of(self, keys: I64) -> _I32:
        rows = np.full(len(keys), -1, np.int32)
        known = (keys >= 0) & (keys < len(self._rows))
        rows[known] = self._rows[keys[known]]
        return rows


def _grown(table: Any, size: int, fill: int) -> Any:
    """At least so long, with room for more: a table that grows is not copied each time."""
    if size <= len(table):
        return table
    longer = np.full(max(size, len(table) * 3 // 2), fill, table.dtype)
    longer[: len(table)] = table
    return longer
