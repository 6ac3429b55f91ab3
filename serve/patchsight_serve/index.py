"""The index of a gallery: its unit vectors in memory, by key. A cache of the record, always rebuilt from it.

Exact up to a number of vectors. From there on codes of the vectors are made in a thread of its own, while searches and
changes go on; what has come meanwhile is noted and brought in, and then searches go by the codes.
"""

import logging
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, NamedTuple

import faiss
import numpy as np

from patchsight_serve.approximate import Approximate
from patchsight_serve.errors import InvalidRequest
from patchsight_serve.index_build import build
from patchsight_serve.index_file import IndexFile
from patchsight_serve.nearest import F32, I64, among, nearest
from patchsight_serve.shared_lock import SharedLock
from patchsight_serve.vectors import Vectors

log = logging.getLogger(__name__)

EXACT_LIMIT = 200_000  # vectors
GROWTH = 4  # times as many vectors as at the last build: the lists are made anew
FEW = 512  # vectors put in while nobody searches, at the end of a build: a few milliseconds
RARE = 0.002  # of all: so many are looked up one by one, which costs as much as to pass over 500 others
STALE = 0.25  # of all: so many codes of vectors that are gone call for new ones

Come = tuple[I64, F32]


class IndexState(NamedTuple):
    """How searches are answered. recall: the share of the 10 nearest that is found; None: all, by the kind of index.
    lists, probes: how many there are, and how many a search for 10 visits, in the median of those that were measured.
    building: another is being made."""

    kind: Literal["flat", "ivf"]
    recall: float | None
    lists: int | None
    probes: int | None
    building: bool


class _Stopped(Exception):
    """A build that nobody needs any more."""


class Index:
    """Search over unit vectors; searches run side by side, and wait only while a change is made in memory."""

    def __init__(self, exact_limit: int = EXACT_LIMIT, file: IndexFile | None = None) -> None:
        """exact_limit: among as many vectors, or fewer, a search is exact. file: where codes are kept."""
        self._exact_limit = exact_limit
        self._file = file
        self._kept = True  # what has come is in the file
        self._lock = SharedLock()
        self._vectors: Vectors | None = None  # None until the first one tells the size
        self._approximate: Approximate | None = None
        self._due = exact_limit + 1  # vectors that call for a build
        self._journal: list[Come] | None = None  # what has come since the build at work began
        self._builder: threading.Thread | None = None
        self._leaving = threading.Event()

    def __len__(self) -> int:
        return self._vectors.ntotal if self._vectors is not None else 0

    @property
    def dim(self) -> int | None:
        """Values per vector; None while empty."""
        vectors = self._vectors
        return vectors.d if vectors is not None and vectors.ntotal else None

    @property
    def state(self) -> IndexState:
        """As it is right now."""
        made, building = self._approximate, self._journal is not None
        if made is None or len(self) <= self._exact_limit:
            return IndexState("flat", None, None, None, building)
        return IndexState("ivf", made.plan.recall, made.plan.lists, made.plan.typical, building)

    def change(self, fresh: Mapping[int, F32], gone: Collection[int] = ()) -> None:
        """Take out the keys `gone`, then put in unit vectors `(D,)` under keys that were never used."""
        keys = np.array(list(fresh), dtype=np.int64)
        vectors = np.stack(list(fresh.values())) if fresh else None
        self.extend(keys, vectors, gone)
        self.fit()

    def extend(self, keys: I64, vectors: F32 | None, gone: Collection[int] = ()) -> None:
        """As `change`, with the keys int64 `(N,)` and vectors `(N, D)` as arrays; many may follow before `fit`."""
        with self._lock.alone():
            if self._vectors is not None and gone:
                self._vectors.remove(np.array(sorted(gone), dtype=np.int64))
            if vectors is None:
                return
            self._kept = False
            if self._vectors is None or not len(self):  # the vectors to come may have another size
                self._vectors, self._approximate, self._journal = Vectors(vectors.shape[1]), None, None
                self._due = self._exact_limit + 1
            self._vectors.add(keys, vectors)
            if self._approximate is not None:
                self._approximate.add(keys, vectors)
            if self._journal is not None:
                self._journal.append((keys, vectors))

    def nearest(
        self, query: F32, k: int, leave_out: Collection[int] = (), only: I64 | None = None
    ) -> tuple[list[int], list[float]]:
        """Keys and scores, in any order, of all vectors that may belong to the best `k`, ties included; of an
        approximate index, of those that it visits.

        query: unit vector `(D,)`. only: keys int64 `(N,)` to choose from, each once, None for all; filtered before the
        search, so that k are found where k exist. Raises InvalidRequest if the query has another size than the vectors.
        """
        left = np.array(sorted(leave_out), dtype=np.int64)
        chosen = only[~np.isin(only, left)] if only is not None and left.size else only
        with self._lock.shared():
            if self._vectors is None or not len(self):
                return [], []
            if query.shape != (self.dim,):
                message = f"the query has {query.size} values, the gallery's vectors have {self.dim}"
                raise InvalidRequest(message, param="vectors")
            keys, scores = self._search(self._vectors, query, k, chosen, left)
        return keys.tolist(), scores.tolist()

    def _search(self, vectors: Vectors, query: F32, k: int, chosen: I64 | None, left: I64) -> tuple[I64, F32]:
        """chosen: keys, of which some may be gone; None for all but those `left`."""
        if chosen is not None and len(chosen) <= RARE * vectors.ntotal:
            return among(vectors, vectors.present(chosen), query, k)
        count = vectors.ntotal if chosen is None else len(chosen)
        if self._approximate is not None and count > self._exact_limit:
            keys, scores, _ = self._approximate.search(vectors, query, k, chosen, left)
            return keys, scores
        params = vectors.only(chosen) if chosen is not None else vectors.all_but(left) if left.size else None
        ((keys, scores),) = nearest(vectors, query[None], k, params)
        return keys, scores

    def keys(self) -> I64:
        """All keys, int64 `(N,)`, ascending."""
        with self._lock.shared():
            return self._vectors.keys() if self._vectors is not None else np.empty(0, np.int64)

    def snapshot(self, rows: int = 16_384) -> tuple[I64, F32]:
        """All keys, ascending, and their unit vectors `(N, D)`, copied `rows` at a time, so that a change waits for so
        many at most. What is put in meanwhile is not in it, what is taken out may be."""
        keys, held = self.keys(), self._vectors
        if held is None:
            return keys, np.empty((0, 0), np.float32)
        vectors = np.empty((len(keys), held.d), np.float32)
        count = 0
        for start in range(0, len(keys), rows):
            with self._lock.shared():  # where they were all taken out, and others put in, `held` is empty
                there, found = held.read(keys[start : start + rows])
            keys[count : count + len(there)], vectors[count : count + len(there)] = there, found
            count += len(there)
        return keys[:count], vectors[:count]

    def fit(self) -> None:
        """Begin to build what the vectors call for, if it is not there."""
        if not self._wanting() or self._leaving.is_set():
            return
        with self._lock.alone():
            if self._journal is not None or not self._wanting():
                return
            self._journal, self._kept = [], True
            assert self._vectors is not None
            work = self._journal, self._vectors, self._vectors.keys()
            builder = threading.Thread(target=self._build, args=work, name="index build", daemon=True)
            self._builder = builder
        builder.start()

    def _wanting(self) -> bool:
        """Whether there are many more vectors than at the last build, or many codes of vectors that are gone."""
        made, count = self._approximate, len(self)
        gone = made.codes.ntotal - count if made is not None and count > self._exact_limit else 0
        return count >= self._due or gone > STALE * count

    def _build(self, journal: list[Come], vectors: Vectors, keys: I64) -> None:
        faiss.omp_set_num_threads(1)  # of this thread: the other cores are for those who wait
        count = len(keys)
        log.info("an approximate index of %d vectors is being built", count)
        try:
            made = build(vectors, keys, lambda: self._reading(journal), lambda: self._go_on(journal))
            if made is not None:
                if self._file is not None:
                    self._file.write(made, vectors, lambda: self._reading(journal))
                self._switch(journal, made)
                self.fit()  # it may have grown four times meanwhile
        except _Stopped:
            pass
        except Exception:
            log.exception("the approximate index of %d vectors was not built; the one before goes on", count)
        finally:
            with self._lock.alone():
                if self._journal is journal:  # it came to nothing: again when there are twice as many
                    self._journal, self._due = None, 2 * count

    def _go_on(self, journal: list[Come]) -> None:
        if self._leaving.is_set() or self._journal is not journal:
            raise _Stopped

    @contextmanager
    def _reading(self, journal: list[Come]) -> Iterator[None]:
        with self._lock.shared():
            self._go_on(journal)
            yield

    def _switch(self, journal: list[Come], made: Approximate) -> None:
        """Bring in what has come; the last of it, and the change of places, while nobody searches."""
        while True:
            with self._lock.alone():
                self._go_on(journal)
                come = journal.copy()
                journal.clear()
                last = sum(len(keys) for keys, _ in come) <= FEW
                if last:
                    for keys, vectors in come:
                        made.add(keys, vectors)
                    self._approximate, self._journal = made, None
                    self._due = max(GROWTH * made.plan.size, self._exact_limit + 1)
                    break
            for keys, vectors in come:
                made.add(keys, vectors)
        plan = made.plan
        log.info("searches visit %d of %d lists, recall at 10 is %.4f", plan.typical, plan.lists, plan.recall)

    def take_up(self) -> None:
        """Go on with the codes that were kept, where they are of these vectors; before anybody searches."""
        if self._file is None or self._vectors is None or len(self) <= self._exact_limit:
            return
        found = self._file.read(self._vectors)
        if found is not None:
            self._approximate, new = found
            self._kept = not new
            self._due = max(GROWTH * self._approximate.plan.size, self._exact_limit + 1)

    def keep(self) -> None:
        """After `close`: keep codes, where some have come since they were kept."""
        made, vectors = self._approximate, self._vectors
        if self._file is not None and made is not None and vectors is not None and not self._kept:
            self._file.write(made, vectors, self._lock.shared)

    def close(self) -> None:
        """End a build, which takes a second or so."""
        self._leaving.set()
        if self._builder is not None:
            self._builder.join()
