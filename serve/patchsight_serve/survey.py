"""Questions about a gallery as a whole. They take long, so they are worked on one at a time, in a thread of their own:
searches and writers keep theirs. An answer is kept as long as the gallery stays the same."""

import asyncio
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import faiss
import numpy as np

from patchsight_serve.errors import NotReady, Overloaded
from patchsight_serve.gallery import Gallery
from patchsight_serve.item import Identity
from patchsight_serve.linkage import Pause
from patchsight_serve.nearest import F32, I64

KEPT = 8  # answers
WAITING = 8  # questions, the one in work counted in

T = TypeVar("T")
Work = Callable[[I64, F32, Pause], T]  # of keys int64 `(N,)`, ascending, and their unit vectors `(N, D)`


class _Kept(NamedTuple):
    gallery: "weakref.ref[Gallery]"
    encoder: Identity | None
    keys: I64  # a key names one vector for ever: the same keys are the same gallery
    answer: Any


class Surveys:
    """All that a server is asked of this kind."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "survey", initializer=_take_half_of_the_cores)
        self._kept: OrderedDict[tuple[str, Hashable], _Kept] = OrderedDict()
        self._keeping = threading.Lock()
        self._leaving = threading.Event()
        self._waiting = 0

    async def ask(self, gallery: Gallery, question: Hashable, work: Work[T]) -> T:
        """What `work` makes of the gallery, or what it made of it when `question` was asked before. Cancelled, it ends
        the work at its next pause. Raises Overloaded, NotReady, and what `work` raises."""
        kept = await asyncio.to_thread(self._recall, gallery, question)
        if kept is None:
            if self._waiting >= WAITING:
                message = f"{self._waiting} questions about whole galleries are waiting, the limit is {WAITING}"
                raise Overloaded(message, retry_after_s=10)
            left = threading.Event()
            self._waiting += 1
            try:
                loop = asyncio.get_running_loop()
                kept = await loop.run_in_executor(self._thread, self._answer, gallery, question, work, left)
            finally:
                left.set()
                self._waiting -= 1
        answer: T = kept.answer
        return answer

    def _answer(self, gallery: Gallery, question: Hashable, work: Work[Any], left: threading.Event) -> _Kept:
        def pause() -> None:
            if left.is_set() or self._leaving.is_set():
                raise NotReady("the server is leaving")

        pause()
        kept = self._recall(gallery, question)  # somebody before may have asked the same
        if kept is None:
            encoder, (keys, vectors) = gallery.encoder, gallery.snapshot()
            kept = _Kept(weakref.ref(gallery), encoder, keys, work(keys, vectors, pause))
            with self._keeping:
                self._kept[gallery.name, question] = kept
                while len(self._kept) > KEPT:
                    self._kept.popitem(last=False)
        return kept

    def _recall(self, gallery: Gallery, question: Hashable) -> _Kept | None:
        with self._keeping:
            kept = self._kept.get((gallery.name, question))
            if kept is None or kept.gallery() is not gallery or kept.encoder != gallery.encoder:
                return None
            self._kept.move_to_end((gallery.name, question))
        return kept if np.array_equal(kept.keys, gallery.keys()) else None

    def close(self) -> None:
        """End the work at its next pause, and wait for that."""
        self._leaving.set()
        self._thread.shutdown(cancel_futures=True)


def _take_half_of_the_cores() -> None:
    """The others are for requests. FAISS counts its threads for each thread that calls it."""
    faiss.omp_set_num_threads(max(1, faiss.omp_get_max_threads() // 2))
