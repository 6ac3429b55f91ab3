"""Gathers images of many requests into batches for one encoder. Knows neither HTTP nor image files.

A batch is whatever waits at the moment the encoder is free and is of one size: nothing ever sleeps to fill one. A batch
that fails is run again image by image, so that a bad image takes down itself alone, and the worker thread starts again
should anything escape from there. A batch that never ends is noticed: its requests are told, and the process has to be
replaced, because no thread can be stopped from outside.
"""

import asyncio
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Self

import numpy as np

from patchsight_serve.encoder import Encoder, Pixels
from patchsight_serve.engine import Admission, probe, room, terms
from patchsight_serve.errors import DeadlineExceeded, NotReady, PatchsightError
from patchsight_serve.timing import Timing
from patchsight_serve.waiting import Item, Result, Waiting

logger = logging.getLogger(__name__)

WATCH_S = 0.25  # between two looks at the batch in the encoder


class Batcher(Admission):
    """One encoder, its queue, and the one thread that runs it. All methods belong to one event loop.

    batch_timeout_s: a batch that takes longer hangs, and `hung` is true from then on.
    heartbeat: `time.monotonic()` of the last batch that the encoder ran without failing; -inf before the first, and
    after one that failed.
    """

    def __init__(
        self,
        encoder: Encoder,
        max_batch: int = 32,
        max_queue: int = 256,
        on_batch: Callable[[int], object] = lambda _: None,
        max_wait_s: float = math.inf,
        batch_timeout_s: float = math.inf,
    ) -> None:
        self.encoder = encoder
        super().__init__(max_queue, max_wait_s)
        self.max_batch, self.batch_timeout_s = max_batch, batch_timeout_s
        self.heartbeat = -math.inf
        self.hung = False
        self._on_batch = on_batch  # told the size of each batch, in the worker's thread
        self._waiting = Waiting()
        self._running: list[Item] = []  # the batch in the encoder
        self._began = math.inf  # time.monotonic() when the encoder was last called; inf while it is not running
        self._wake = threading.Condition()
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._watch: asyncio.Task[None] | None = None
        self._proving = asyncio.Lock()

    # The life of the worker

    async def __aenter__(self) -> Self:
        self._thread = threading.Thread(target=self._supervise, name=f"encode {self.encoder.manifest.name}")
        self._thread.daemon = True  # an encoder that hangs must not keep the process alive
        self._thread.start()
        self._watch = asyncio.create_task(self._notice(), name=f"watch {self.encoder.manifest.name}")
        return self

    async def __aexit__(self, *_: object) -> None:
        """Answer what is queued, then end the worker."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread is not None and not self.hung:
            await asyncio.to_thread(self._thread.join, 10.0)
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None  # a cancelled task remembers where it was, and that would keep the encoder in memory

    @property
    def alive(self) -> bool:
        """The worker thread runs."""
        return self._thread is not None and self._thread.is_alive() and not self.hung

    # Requests, on the event loop

    async def run(self, images: Sequence[Pixels], outputs: Sequence[str]) -> tuple[list[Result], Timing]:
        """As in `Engine`. Cancelling takes the images out of the queue. Raises NotReady if the worker is dead."""
        if not self.alive:
            raise NotReady(f"the worker of encoder {self.encoder.manifest.name!r} is not running")
        loop, agreed = asyncio.get_running_loop(), terms.get()
        items = [Item(i, tuple(outputs), loop.create_future(), agreed.bulk, agreed.deadline) for i in images]
        submitted = time.perf_counter()
        with self._wake:
            self._waiting.extend(items)
            self._wake.notify()
        try:
            results = [await items[0].future] if len(items) == 1 else await asyncio.gather(*(i.future for i in items))
        except asyncio.CancelledError:
            with self._wake:  # the futures are cancelled; their images must not wait for a worker that may hang
                self._waiting.drop()
            raise
        if not items:
            return [], Timing()
        started, finished = min(i.started for i in items), max(i.finished for i in items)
        return list(results), Timing(queue=started - submitted, infer=finished - started)

    async def prove(self, max_age_s: float, timeout_s: float) -> None:
        """As in `Engine`."""
        async with self._proving:  # a hundred probes at once make one inference
            if self.alive and time.monotonic() - self.heartbeat <= max_age_s:
                return
            gray, name = probe(self.encoder.manifest)
            try:
                async with asyncio.timeout(timeout_s):
                    (result,), _ = await self.run([gray], [name])
            except TimeoutError:
                result = NotReady(f"encoder {self.encoder.manifest.name!r} did not answer within {timeout_s:g} s")
            except DeadlineExceeded as error:
                result = error
            if isinstance(result, PatchsightError):
                raise NotReady(result.message)

    async def _notice(self) -> None:
        """Watch for a batch that does not end. Those in it get 504, those behind it 503, and so does who comes next."""
        name, limit = self.encoder.manifest.name, self.batch_timeout_s
        while time.monotonic() - self._began <= limit:
            await asyncio.sleep(min(WATCH_S, limit / 4))
        self.hung = True
        logger.critical("encoder %r hangs: a batch of %d is not done after %g s", name, len(self._running), limit)
        with self._wake:
            behind = self._waiting.clear()
        late = DeadlineExceeded(f"encoder {name!r} did not finish a batch within {limit:g} s")
        for items, error in ((self._running, late), (behind, NotReady(f"encoder {name!r} hangs"))):
            for item in items:
                if not item.future.done():
                    item.future.set_exception(error)

    # The worker's thread

    def _supervise(self) -> None:
        while True:
            try:
                return self._work()
            except BaseException:  # whatever it was, the next request must be answered
                logger.exception("the worker of encoder %r starts again", self.encoder.manifest.name)
                self._began, self.heartbeat = math.inf, -math.inf
                self._deliver(self._running, [_failed() for _ in self._running])

    def _work(self) -> None:
        manifest = self.encoder.manifest
        while True:
            with self._wake:
                while not self._waiting and not self._stopping:
                    self._wake.wait()
                if not self._waiting:
                    return
                self._running = self._waiting.take(
                    lambda item: room(self.max_batch, item.image, manifest),
                    lambda one, other: one.image.shape == other.image.shape,
                )
            if self._running:
                self._deliver(self._running, self._encode(self._running))
            self._running = []

    def _encode(self, batch: Sequence[Item]) -> list[Result]:
        """Results of a batch, one per item; if the batch fails, each item is tried alone."""
        started = time.perf_counter()
        for item in batch:
            item.started = item.started or started
        # Requests that ask for different outputs share the batch: the graph is run for all that anybody wants.
        names = list(dict.fromkeys(name for item in batch for name in item.outputs))
        self.pace.left(len(batch))
        self._began = time.monotonic()
        try:
            values = self.encoder.run(np.stack([item.image for item in batch]), names)
        except Exception as error:
            self._began, self.heartbeat = math.inf, -math.inf
            self.pace.came(len(batch), answered=False)
            if len(batch) > 1:
                logger.warning("a batch of %d failed (%s); trying its images one by one", len(batch), error)
                return [result for item in batch for result in self._encode([item])]
            logger.exception("encoder %r failed on an image", self.encoder.manifest.name)
            return [error if isinstance(error, PatchsightError) else _failed()]
        # The first one warms the encoder up: its time says nothing of the next.
        self.pace.came(len(batch), answered=self.heartbeat > -math.inf)
        self._began, self.heartbeat = math.inf, time.monotonic()
        self._on_batch(len(batch))
        return [{name: values[name][i] for name in item.outputs} for i, item in enumerate(batch)]

    def _deliver(self, batch: Sequence[Item], results: Sequence[Result]) -> None:
        """Hand results to the event loop, in one call for the whole batch."""
        finished = time.perf_counter()

        def resolve() -> None:
            for item, result in zip(batch, results, strict=True):
                if not item.future.done():
                    item.finished = finished
                    item.future.set_result(result)

        try:
            batch[0].future.get_loop().call_soon_threadsafe(resolve)
        except (RuntimeError, IndexError):  # the loop is closed: nobody waits any more; or there is no batch
            logger.debug("nobody waits for a batch of %d", len(batch))


def _failed() -> PatchsightError:
    return PatchsightError("the encoder failed on this image")
