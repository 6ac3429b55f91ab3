"""One encoder on a Triton server. A call takes whatever waits at the moment a channel is free; Triton joins the calls
of all gateways into its batches.

So 64 requests at once are a few calls, and a lone one waits for nobody. Deadlines and cancellations go along: a call
that nobody waits for any more is cancelled, and Triton does not run what it has not begun.
"""

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, suppress
from functools import partial
from typing import Self

import numpy as np
from tritonclient.grpc import InferInput, InferRequestedOutput
from tritonclient.grpc.aio import InferResult

from patchsight_serve.encoder import Pixels, RemoteEncoder, Values
from patchsight_serve.engine import Admission, probe, room, terms
from patchsight_serve.errors import DeadlineExceeded, NotReady, PatchsightError
from patchsight_serve.timing import Timing
from patchsight_serve.triton_client import Triton, TritonFailure, on_this_host
from patchsight_serve.triton_config import BULK, INTERACTIVE, MAX_BATCH, PROBE
from patchsight_serve.triton_health import TritonHealth
from patchsight_serve.triton_leftovers import sweep
from patchsight_serve.triton_memory import Slot, TritonMemory
from patchsight_serve.waiting import Item, Result, Waiting

NO_DEADLINE_S = 30.0  # outside of any request
LARGE = 1 << 18  # bytes of pixels; copying more would hold the event loop up
SHARED = 1 << 20  # bytes of pixels and outputs, from which on shared memory is worth its handling


class TritonEngine(Admission):
    """As in `Engine`, on `channels` connections with a call each at most.

    probe_s: how long silence is trusted before a probe is sent. memory: share it with a Triton on this host.
    """

    hung = False  # a model that hangs is loaded anew

    def __init__(
        self,
        model: RemoteEncoder,
        max_queue: int = 256,
        on_batch: Callable[[int], object] = lambda _: None,
        channels: int = 4,
        probe_s: float = 0.5,
        memory: bool = True,
        max_wait_s: float = math.inf,
    ) -> None:
        super().__init__(max_queue, max_wait_s)
        self.manifest = model.manifest
        self._on_batch = on_batch  # told the size of each call that succeeded
        self._triton = Triton(model.address, channels)
        self._channels = channels
        self._waiting = Waiting()
        self._calls: set[asyncio.Task[None]] = set()
        self.health = TritonHealth(self._triton, self.manifest.name, self._probe, self.pace, probe_s)
        self._memory = TritonMemory(self._triton, self.manifest) if memory and on_this_host(model.address) else None
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        await self._stack.enter_async_context(self._triton)
        if self._memory is not None:
            self._stack.push_async_callback(self._memory.aclose)
        background = [asyncio.create_task(self.health.watch(), name=f"watch {self.manifest.name}")]
        if self._memory is not None:
            background.append(asyncio.create_task(sweep(self._triton), name=f"sweep for {self.manifest.name}"))

        async def end() -> None:
            tasks = [*background, *self._calls]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        self._stack.push_async_callback(end)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def run(self, images: Sequence[Pixels], outputs: Sequence[str]) -> tuple[list[Result], Timing]:
        """As in `Engine`. Images of one call stand and fall together, as Triton gives it one answer."""
        # At once: what is known not to work is not worth a client's wait. What is merely late may be busy.
        if isinstance(self.health.failure, NotReady):
            raise NotReady(f"encoder {self.manifest.name!r} is being brought back: {self.health.failure}")
        loop, agreed = asyncio.get_running_loop(), terms.get()
        ends = agreed.deadline if math.isfinite(agreed.deadline) else loop.time() + NO_DEADLINE_S
        items = [Item(image, tuple(outputs), loop.create_future(), agreed.bulk, ends) for image in images]
        submitted = time.perf_counter()
        self._waiting.extend(items)
        self._pump()
        results = await asyncio.gather(*(item.future for item in items))  # cancelled, it cancels them all
        if not items:
            return [], Timing()
        started, finished = min(i.started for i in items), max(i.finished for i in items)
        return list(results), Timing(queue=started - submitted, infer=finished - started)

    async def prove(self, max_age_s: float, timeout_s: float) -> None:
        """As in `Engine`; the watch runs the probes."""
        if self.health.failure is None and time.monotonic() - self.health.heartbeat > max_age_s:
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self.health.check()
        if self.health.failure is not None:
            raise NotReady(f"encoder {self.manifest.name!r}: {self.health.failure}")
        if time.monotonic() - self.health.heartbeat > max(max_age_s, timeout_s):
            raise NotReady(f"encoder {self.manifest.name!r} did not answer within {timeout_s:g} s")

    def _pump(self) -> None:
        """Send what waits, as long as a channel is free."""
        while len(self._calls) < self._channels and (batch := self._next()):
            call = asyncio.create_task(self._call(batch))
            self._calls.add(call)
            call.add_done_callback(self._returned)
            for item in batch:
                item.future.add_done_callback(partial(_give_up, batch, call))

    def _next(self) -> list[Item]:
        """Who is next, and those behind it that fit into its call: equal outputs, equal size, equal urgency."""
        return self._waiting.take(
            lambda item: room(MAX_BATCH, item.image, self.manifest),
            lambda one, other: (
                (one.outputs, one.image.shape, one.bulk) == (other.outputs, other.image.shape, other.bulk)
            ),
        )

    def _returned(self, call: asyncio.Task[None]) -> None:
        self._calls.discard(call)
        self._pump()

    async def _call(self, batch: Sequence[Item]) -> None:
        """One call to Triton; its answer, or what is wrong, to everybody in it."""
        started = time.perf_counter()
        left = max(item.deadline for item in batch) - asyncio.get_running_loop().time()
        try:
            priority = BULK if batch[0].bulk else INTERACTIVE
            values = await self._infer([item.image for item in batch], batch[0].outputs, max(left, 1e-3), priority)
        except PatchsightError as error:
            if isinstance(error, TritonFailure | DeadlineExceeded):
                self.health.failed()
            for item in batch:
                if not item.future.done():
                    item.future.set_exception(error)
            return
        finished = time.perf_counter()
        self._on_batch(len(batch))
        for i, item in enumerate(batch):
            item.started, item.finished = started, finished
            if not item.future.done():
                item.future.set_result({name: values[name][i] for name in item.outputs})

    async def _probe(self, timeout_s: float) -> None:
        gray, name = probe(self.manifest)
        await self._infer([gray], [name], timeout_s, PROBE)

    async def _infer(
        self, images: Sequence[Pixels], outputs: Sequence[str], timeout_s: float, priority: int
    ) -> dict[str, Values]:
        """`(n, *shape)` of each output. Raises also TritonFailure where Triton answers with something else."""
        size = sum(image.nbytes for image in images)
        size += sum(4 * len(images) * math.prod(self.manifest.outputs[name]) for name in outputs)
        own = images[0].shape[:2] == (self.manifest.transform.crop,) * 2  # what the slots are made for
        if self._memory is None or size < SHARED or not own:
            values = await self._over_grpc(images, outputs, timeout_s, priority)
        else:
            async with self._memory.slot() as slot:
                if slot is None:
                    values = await self._over_grpc(images, outputs, timeout_s, priority)
                else:
                    values = await self._over_memory(slot, images, outputs, timeout_s, priority)
        self.health.succeeded()
        return values

    async def _over_grpc(
        self, images: Sequence[Pixels], outputs: Sequence[str], timeout_s: float, priority: int
    ) -> dict[str, Values]:
        if sum(image.nbytes for image in images) > LARGE:
            image = await asyncio.to_thread(_image, images)
        else:
            image = _image(images)
        wanted = [InferRequestedOutput(name) for name in outputs]
        answer = await self._answer(image, wanted, timeout_s, priority)
        rows, columns = (side // self.manifest.size_step for side in images[0].shape[:2])
        shapes = self.manifest.outputs_on(rows, columns)
        return {name: _values(answer, name, (len(images), *shapes[name])) for name in outputs}

    async def _over_memory(
        self, slot: Slot, images: Sequence[Pixels], outputs: Sequence[str], timeout_s: float, priority: int
    ) -> dict[str, Values]:
        image = await asyncio.to_thread(slot.image, images)
        wanted = [slot.output(name, len(images)) for name in outputs]
        answer = await self._answer(image, wanted, timeout_s, priority)
        return {name: slot.values(answer, name, len(images)) for name in outputs}

    async def _answer(
        self, image: InferInput, wanted: Sequence[InferRequestedOutput], timeout_s: float, priority: int
    ) -> InferResult:
        count, answer = int(image.shape()[0]), None
        self.pace.left(count)
        try:
            answer = await self._triton.infer(self.manifest.name, [image], wanted, timeout_s, priority)
        finally:
            self.pace.came(count, answered=answer is not None)
        return answer


def _give_up(batch: Sequence[Item], call: asyncio.Task[None], _: object) -> None:
    """Nobody waits for the call any more: Triton need not run it."""
    if all(item.future.cancelled() for item in batch):
        call.cancel()


def _image(images: Sequence[Pixels]) -> InferInput:
    pixels = np.stack(images)
    image = InferInput("image", pixels.shape, "UINT8")
    image.set_data_from_numpy(pixels)
    return image


def _values(answer: InferResult, name: str, shape: tuple[int, ...]) -> Values:
    """A worker that runs under the wrong numpy answers with nothing, and calls that a success."""
    try:
        values: Values | None = answer.as_numpy(name)
    except ValueError as error:  # as many bytes as its shape says it has
        raise TritonFailure(f"Triton: {name}: {error}", "broken") from None
    if values is None or values.shape != shape or values.dtype != np.float32:
        found = "nothing" if values is None else f"{values.dtype} {values.shape}"
        raise TritonFailure(f"Triton: {name} is {found}, not float32 {shape}", "broken")
    return values
