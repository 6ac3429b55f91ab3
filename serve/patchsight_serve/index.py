"""The index of a gallery: its unit vectors in memory, by key. A cache of the record, always rebuilt from it."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import faiss
import numpy as np

from patchsight_serve.errors import InvalidRequest
from patchsight_serve.nearest import F32, I64, flat_index, nearest
from patchsight_serve.shared_lock import SharedLock


class Index:
    """Exact search over unit vectors; searches run side by side, and wait only while a change is made in memory."""

    def __init__(self) -> None:
        self._lock = SharedLock()
        self._flat: Any = None  # None until the first vector tells the size

    def __len__(self) -> int:
        flat = self._flat
        return int(flat.ntotal) if flat is not None else 0

    @property
    def dim(self) -> int | None:
        """Values per vector; None while empty."""
        return int(self._flat.d) if len(self) else None

    def change(self, fresh: Mapping[int, F32], gone: Collection[int] = ()) -> None:
        """Take out the keys `gone`, then put in unit vectors `(D,)` under keys that were never used."""
        keys = np.array(list(fresh), dtype=np.int64)
        vectors = np.stack(list(fresh.values())) if fresh else None
        self.extend(keys, vectors, gone)

    def extend(self, keys: Any, vectors: F32 | None, gone: Collection[int] = ()) -> None:
        """As `change`, with the keys int64 `(N,)` and vectors `(N, D)` as arrays."""
        with self._lock.alone():
            if gone and self._flat is not None:
                self._flat.remove_ids(np.array(sorted(gone), dtype=np.int64))
            if vectors is None:
                return
            if not len(self):
                self._flat = flat_index(vectors.shape[1])
            self._flat.add_with_ids(vectors, keys)

    def nearest(
        self, query: F32, k: int, leave_out: Collection[int] = (), only: Iterable[int] | None = None
    ) -> tuple[list[int], list[float]]:
        """Keys and scores, in any order, of all vectors that may belong to the best `k`, ties included.

        query: unit vector `(D,)`. only: keys to choose from, None for all; filtered before the search, so that k are
        found where k exist. Raises InvalidRequest if the query has another size than the vectors.
        """
        selector: Any = None
        if only is not None:
            selector = faiss.IDSelectorBatch(np.array(sorted(set(only).difference(leave_out)), dtype=np.int64))
        elif leave_out:
            selector = faiss.IDSelectorNot(faiss.IDSelectorBatch(np.array(sorted(leave_out), dtype=np.int64)))
        with self._lock.shared():
            if not len(self):
                return [], []
            if query.shape != (self.dim,):
                message = f"the query has {query.size} values, the gallery's vectors have {self.dim}"
                raise InvalidRequest(message, param="vectors")
            keys, scores = nearest(self._flat, query[None], k, selector)[0]
        return keys.tolist(), scores.tolist()

    def keys(self) -> I64:
        """All keys, int64 `(N,)`, ascending: none is ever lower than those before it, and removing keeps the order."""
        with self._lock.shared():
            return self._keys()

    def _keys(self) -> I64:
        keys: I64 = faiss.vector_to_array(self._flat.id_map) if len(self) else np.empty(0, np.int64)
        return keys

    def snapshot(self, rows: int = 16_384) -> tuple[I64, F32]:
        """All keys, ascending, and their unit vectors `(N, D)`, copied `rows` at a time, so that a change waits for so
        many at most. What is put in meanwhile is not in it, what is taken out may be."""
        with self._lock.shared():
            flat, keys = self._flat, self._keys()
        vectors = np.empty((len(keys), flat.d if len(keys) else 0), np.float32)
        there = np.zeros(len(keys), bool)
        for start in range(0, len(keys), rows):
            part = slice(start, start + rows)
            with self._lock.shared():
                if self._flat is not flat:  # emptied and begun anew: none of the rest is there
                    break
                present = self._keys()
                places = np.searchsorted(present, keys[part])
                there[part] = present[np.minimum(places, len(present) - 1)] == keys[part] if len(present) else False
                vectors[part][there[part]] = flat.index.reconstruct_batch(places[there[part]])
        return (keys, vectors) if there.all() else (keys[there], vectors[there])
