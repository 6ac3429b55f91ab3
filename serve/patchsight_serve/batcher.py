"""Gathers images of many requests into batches for one encoder. Knows neither HTTP nor image files.

Admission is counted in images and is all or nothing for a request. A batch is whatever waits at the moment the encoder
is free and is of one size: nothing ever sleeps to fill one. A batch that fails is run again image by image, so that a
bad image takes down itself alone, and the worker thread starts again should anything escape from there.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from patchsight_serve.encoder import Encoder, Pixels
from patchsight_serve.engine import Admission, Result, probe, room
from patchsight_serve.errors import NotReady, PatchsightError
from patchsight_serve.timing import Timing

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class _Item:
    """One image on its way through."""

    image: Pixels
    outputs: Sequence[str]
    future: asyncio.Future[Result]
    started: float = 0.0  # perf_counter when its batch began
    finished: float = 0.0


class Batcher(Admission):
    """One encoder, its queue, and the one thread that runs it. All methods belong to one event loop.

    heartbeat: `time.monotonic()` of the last batch that the encoder ran without failing; -inf before the first, and
    after one that failed.
    """

    def __init__(
        self,
        encoder: Encoder,
        max_batch: int = 32,
        max_queue: int = 256,
        on_batch: Callable[[int], object] = lambda _: None,
    ) -> None:
        self.encoder = encoder
        super().__init__(max_queue)
        self.max_batch = max_batch
        self.heartbeat = float("-inf")
        self._on_batch = on_batch  # told the size of each batch, in the worker's thread
        self._queue: deque[_Item] = deque()
        self._running: list[_Item] = []  # the batch in the encoder
        self._wake = threading.Condition()
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._proving = asyncio.Lock()

    # The life of the worker

    async def __aenter__(self) -> Self:
        self._thread = threading.Thread(target=self._supervise, name=f"encode {self.encoder.manifest.name}")
        self._thread.daemon = True  # an encoder that hangs must not keep the process alive
        self._thread.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Answer what is queued, then end the worker."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, 10.0)

    @property
    def alive(self) -> bool:
        """The worker thread runs."""
        return self._thread is not None and self._thread.is_alive()

    # Requests, on the event loop

    async def run(self, images: Sequence[Pixels], outputs: Sequence[str]) -> tuple[list[Result], Timing]:
        """As in `Engine`. Cancelling takes the images out of the queue. Raises NotReady if the worker is dead."""
        if not self.alive:
            raise NotReady(f"the worker of encoder {self.encoder.manifest.name!r} is not running")
        loop = asyncio.get_running_loop()
        items = [_Item(image, outputs, loop.create_future()) for image in images]
        submitted = time.perf_counter()
        with self._wake:
            self._queue.extend(items)
            self._wake.notify()
        try:
            results = await asyncio.gather(*(item.future for item in items))
        except asyncio.CancelledError:
            with self._wake:  # gather cancelled the futures; their images must not wait for a worker that may hang
                self._queue = deque(item for item in self._queue if not item.future.done())
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
            if isinstance(result, PatchsightError):
                raise NotReady(result.message)

    # The worker's thread

    def _supervise(self) -> None:
        while True:
            try:
                return self._work()
            except BaseException:  # whatever it was, the next request must be answered
                logger.exception("the worker of encoder %r starts again", self.encoder.manifest.name)
                self.heartbeat = float("-inf")
                self._deliver(self._running, [_failed() for _ in self._running])

    def _work(self) -> None:
        while True:
            with self._wake:
                while not self._queue and not self._stopping:
                    self._wake.wait()
                if not self._queue:
                    return
                self._running = self._take()
            self._running = [item for item in self._running if not item.future.done()]  # the others were given up
            if self._running:
                self._deliver(self._running, self._encode(self._running))
            self._running = []

    def _take(self) -> list[_Item]:
        """The next batch out of the queue: images of the first one's shape. All others keep their order."""
        first = self._queue[0].image
        most = room(self.max_batch, first, self.encoder.manifest)
        taken: list[_Item] = []
        others: deque[_Item] = deque()
        for item in self._queue:
            (taken if len(taken) < most and item.image.shape == first.shape else others).append(item)
        self._queue = others
        return taken

    def _encode(self, batch: Sequence[_Item]) -> list[Result]:
        """Results of a batch, one per item; if the batch fails, each item is tried alone."""
        started = time.perf_counter()
        for item in batch:
            item.started = item.started or started
        # Requests that ask for different outputs share the batch: the graph is run for all that anybody wants.
        names = list(dict.fromkeys(name for item in batch for name in item.outputs))
        try:
            values = self.encoder.run(np.stack([item.image for item in batch]), names)
        except Exception as error:
            self.heartbeat = float("-inf")
            if len(batch) > 1:
                logger.warning("a batch of %d failed (%s); trying its images one by one", len(batch), error)
                return [result for item in batch for result in self._encode([item])]
            logger.exception("encoder %r failed on an image", self.encoder.manifest.name)
            return [error if isinstance(error, PatchsightError) else _failed()]
        finished = time.perf_counter()
        self.heartbeat = time.monotonic()
        self.encoded(len(batch), finished - started)
        self._on_batch(len(batch))
        return [{name: values[name][i] for name in item.outputs} for i, item in enumerate(batch)]

    def _deliver(self, batch: Sequence[_Item], results: Sequence[Result]) -> None:
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
