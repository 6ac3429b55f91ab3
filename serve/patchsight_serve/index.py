"""The index of a gallery: its unit vectors in memory, by key. A cache of the record, always rebuilt from it.

Exact up to a number of vectors. From there on an approximate index is built in a thread of its own, of the vectors in
memory, while searches and changes go on; what was changed meanwhile is noted, brought in, and then one takes the
other's place.
"""

import logging
import threading
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, NamedTuple

import faiss
import numpy as np

from patchsight_serve.approximate import Plan, build, keys_of, search
from patchsight_serve.errors import InvalidRequest
from patchsight_serve.nearest import F32, I64, among, flat_index, nearest
from patchsight_serve.shared_lock import SharedLock

log = logging.getLogger(__name__)

EXACT_LIMIT = 200_000  # vectors
GROWTH = 4  # times as many vectors as at the last build: the lists are made anew
FEW = 512  # vectors put in while nobody searches, at the end of a build: a few milliseconds
RARE = 0.002  # of all: so many are looked up one by one, which costs as much as to pass over 500 others
_NONE = np.empty(0, np.int64)


class IndexState(NamedTuple):
    """How searches are answered. recall: the share of the 10 nearest that is found; None: all, by the kind of index.
    lists, probes: how many there are, and how many a search for 10 visits. building: another is being made."""

    kind: Literal["flat", "ivf"]
    recall: float | None
    lists: int | None
    probes: int | None
    building: bool


class Change(NamedTuple):
    """Keys `(G,)` to take out, then vectors `(N, D)` to put in under keys `(N,)`; no vectors: nothing to put in."""

    gone: I64
    keys: I64
    vectors: F32 | None

    def apply(self, index: Any) -> None:
        """To an index of FAISS that is addressed by keys."""
        if self.gone.size:
            index.remove_ids(self.gone)
        if self.vectors is not None:
            index.add_with_ids(self.vectors, self.keys)


class _Stopped(Exception):
    """A build that nobody needs any more."""


class Index:
    """Search over unit vectors; searches run side by side, and wait only while a change is made in memory."""

    def __init__(self, exact_limit: int = EXACT_LIMIT, keep: Callable[[Any, Plan], None] = lambda *_: None) -> None:
        """exact_limit: among as many vectors, or fewer, a search is exact. keep: is handed what was built, before
        anybody else may change it."""
        self._exact_limit = exact_limit
        self._keep = keep
        self._kept = True  # as it is now, or almost
        self._lock = SharedLock()
        self._vectors: Any = None  # of FAISS; None until the first vector tells the size
        self._plan: Plan | None = None  # how to search them; None: all of them
        self._due = exact_limit + 1  # vectors that call for a build
        self._journal: list[Change] | None = None  # since the build at work began
        self._builder: threading.Thread | None = None
        self._leaving = threading.Event()

    def __len__(self) -> int:
        vectors = self._vectors
        return int(vectors.ntotal) if vectors is not None else 0

    @property
    def dim(self) -> int | None:
        """Values per vector; None while empty."""
        return int(self._vectors.d) if len(self) else None

    @property
    def state(self) -> IndexState:
        """As it is right now."""
        plan, building = self._plan, self._journal is not None
        if plan is None:
            return IndexState("flat", None, None, None, building)
        if len(self) <= self._exact_limit:
            return IndexState("ivf", 1.0, plan.lists, plan.lists, building)
        return IndexState("ivf", plan.recall, plan.lists, plan.probes[0], building)

    def change(self, fresh: Mapping[int, F32], gone: Collection[int] = ()) -> None:
        """Take out the keys `gone`, then put in unit vectors `(D,)` under keys that were never used."""
        keys = np.array(list(fresh), dtype=np.int64)
        vectors = np.stack(list(fresh.values())) if fresh else None
        self.extend(keys, vectors, gone)
        self.fit()

    def extend(self, keys: I64, vectors: F32 | None, gone: Collection[int] = ()) -> None:
        """As `change`, with the keys int64 `(N,)` and vectors `(N, D)` as arrays; many may follow before `fit`."""
        change = Change(np.array(sorted(gone), dtype=np.int64), keys, vectors)
        with self._lock.alone():
            self._kept = False
            if self._vectors is not None:
                change._replace(keys=_NONE, vectors=None).apply(self._vectors)
            if vectors is not None and not len(self):  # the vectors to come may have another size
                self._vectors, self._plan, self._journal = flat_index(vectors.shape[1]), None, None
                self._due = self._exact_limit + 1
            if vectors is not None:
                self._vectors.add_with_ids(vectors, keys)
            if self._journal is not None:
                self._journal.append(change)

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
        selector = _all_but(left) if chosen is None else _only(chosen)
        with self._lock.shared():
            if not len(self):
                return [], []
            if query.shape != (self.dim,):
                message = f"the query has {query.size} values, the gallery's vectors have {self.dim}"
                raise InvalidRequest(message, param="vectors")
            keys, scores = self._search(query, k, chosen, selector)
        return keys.tolist(), scores.tolist()

    def _search(self, query: F32, k: int, chosen: I64 | None, selector: Any) -> tuple[I64, F32]:
        """chosen: keys, of which some may be gone."""
        if chosen is not None and len(chosen) <= RARE * len(self):
            found = among(self._vectors, chosen, query, k)
            if found is not None:
                return found
        if self._plan is not None:
            count = len(self) if chosen is None else len(chosen)
            return search(self._vectors, self._plan, query, k, selector, count, exact=count <= self._exact_limit)
        params = None if selector is None else faiss.SearchParameters(sel=selector)  # type: ignore[call-arg]
        ((keys, scores),) = nearest(self._vectors, query[None], k, params)
        return keys, scores

    def keys(self) -> I64:
        """All keys, int64 `(N,)`, ascending."""
        with self._lock.shared():
            return self._keys()

    def _keys(self) -> I64:
        return np.sort(keys_of(self._vectors)) if len(self) else _NONE

    def snapshot(self, rows: int = 16_384) -> tuple[I64, F32]:
        """All keys, ascending, and their unit vectors `(N, D)`, copied `rows` at a time, so that a change waits for so
        many at most. What is put in meanwhile is not in it, what is taken out may be."""
        with self._lock.shared():
            keys, dim = self._keys(), self.dim
        vectors = np.empty((len(keys), dim or 0), np.float32)
        count = 0
        for start in range(0, len(keys), rows):
            with self._lock.shared():
                if self.dim != dim:  # emptied, and perhaps begun anew: none of the rest is there
                    break
                there, some = _present(self._vectors, keys[start : start + rows])
            keys[count : count + len(there)], vectors[count : count + len(there)] = there, some
            count += len(there)
        return keys[:count], vectors[:count]

    def fit(self) -> None:
        """Begin to build what the number of vectors calls for, if it is not there."""
        if len(self) < self._due or self._leaving.is_set():
            return
        with self._lock.alone():
            if self._journal is not None or len(self) < self._due:
                return
            self._journal, self._kept = [], True
            work = self._journal, keys_of(self._vectors)
            builder = threading.Thread(target=self._build, args=work, name="index build", daemon=True)
            self._builder = builder
        builder.start()

    def _build(self, journal: list[Change], keys: I64) -> None:
        faiss.omp_set_num_threads(1)  # of this thread: the other cores are for those who wait
        count = len(keys)
        log.info("an approximate index of %d vectors is being built", count)
        try:
            built = build(keys, lambda some: self._read(journal, some), lambda: self._go_on(journal))
            if built is not None:
                self._keep(*built)
                self._switch(journal, *built)
                self.fit()  # it may have grown four times meanwhile
        except _Stopped:
            pass
        except Exception:
            log.exception("the approximate index of %d vectors was not built; the one before goes on", count)
        finally:
            with self._lock.alone():
                if self._journal is journal:  # it came to nothing: again when there are twice as many
                    self._journal, self._due = None, 2 * count

    def _go_on(self, journal: list[Change]) -> None:
        if self._leaving.is_set() or self._journal is not journal:
            raise _Stopped

    def _read(self, journal: list[Change], keys: I64) -> tuple[I64, F32]:
        with self._lock.shared():
            self._go_on(journal)
            return _present(self._vectors, keys)

    def _switch(self, journal: list[Change], built: Any, plan: Plan) -> None:
        """Bring in what has changed; the last of it, and the change of places, while nobody searches."""
        while True:
            with self._lock.alone():
                self._go_on(journal)
                changes = journal.copy()
                journal.clear()
                last = sum(len(change.keys) for change in changes) <= FEW
                if last:
                    for change in changes:
                        change.apply(built)
                    self._vectors, self._plan, self._journal = built, plan, None
                    self._due = max(GROWTH * plan.size, self._exact_limit + 1)
                    break
            for change in changes:
                change.apply(built)
        log.info("searches visit %d of %d lists, recall at 10 is %.4f", plan.probes[0], plan.lists, plan.recall)

    def adopt(self, vectors: Any, plan: Plan, kept: bool) -> None:
        """Begin with what was once handed to `keep`. kept: it has not changed since."""
        self._vectors, self._plan, self._kept = vectors, plan, kept
        self._due = max(GROWTH * plan.size, self._exact_limit + 1)

    def keep(self) -> None:
        """After `close`: hand over an approximate index that has changed since it was."""
        if self._plan is not None and not self._kept and len(self) > self._exact_limit:
            self._keep(self._vectors, self._plan)

    def close(self) -> None:
        """End a build, which takes a second or so."""
        self._leaving.set()
        if self._builder is not None:
            self._builder.join()


def _present(index: Any, keys: I64) -> tuple[I64, F32]:
    """Those of the keys that are in the index, and their vectors."""
    try:
        return keys, index.reconstruct_batch(keys)
    except RuntimeError:  # FAISS: key not found
        keys = keys[np.isin(keys, keys_of(index))]
        return keys, index.reconstruct_batch(keys)


def _only(keys: I64) -> Any:
    chosen = np.zeros(int(keys.max(initial=0)) + 1, dtype=bool)
    chosen[keys] = True
    return faiss.IDSelectorBitmap(np.packbits(chosen, bitorder="little"))  # type: ignore[call-arg, arg-type]


def _all_but(keys: I64) -> Any:
    return faiss.IDSelectorNot(faiss.IDSelectorBatch(keys)) if keys.size else None
