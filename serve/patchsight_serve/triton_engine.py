"""One encoder on a Triton server. Triton makes the batches, of the requests of all gateways; nothing waits here.

A request's images go in one call, or a few where they are more than a batch. Its deadline and its cancellation go with
them, so that Triton does no work that nobody waits for.
"""

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, suppress
from typing import Self

import numpy as np
from tritonclient.grpc import InferInput, InferRequestedOutput
from tritonclient.grpc.aio import InferResult

from patchsight_serve.encoder import Pixels, RemoteEncoder, Values
from patchsight_serve.engine import Admission, Result, deadline, probe
from patchsight_serve.errors import DeadlineExceeded, NotReady
from patchsight_serve.pace import Pace
from patchsight_serve.timing import Timing
from patchsight_serve.triton_client import Triton, TritonFailure, on_this_host
from patchsight_serve.triton_config import INTERACTIVE, MAX_BATCH, PROBE
from patchsight_serve.triton_health import TritonHealth
from patchsight_serve.triton_memory import Slot, TritonMemory

LARGE = 1 << 18  # bytes of pixels; copying more would hold the event loop up
SHARED = 1 << 20  # bytes of pixels and outputs, from which on shared memory is worth its handling


class TritonEngine(Admission):
    """As in `Engine`, on `channels` connections. probe_s: how long silence is trusted before a probe is
    sent. memory: share it with a Triton on this host."""

    def __init__(
        self,
        model: RemoteEncoder,
        max_queue: int = 256,
        on_batch: Callable[[int], object] = lambda _: None,
        channels: int = 4,
        probe_s: float = 0.5,
        memory: bool = True,
    ) -> None:
        super().__init__(max_queue)
        self.manifest = model.manifest
        self._on_batch = on_batch  # told the size of each call that succeeded
        self._triton = Triton(model.address, channels)
        self._pace = Pace()
        self.health = TritonHealth(self._triton, self.manifest.name, self._probe, self._pace, probe_s)
        self._memory = TritonMemory(self._triton, self.manifest) if memory and on_this_host(model.address) else None
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        await self._stack.enter_async_context(self._triton)
        if self._memory is not None:
            self._stack.push_async_callback(self._memory.aclose)
        watch = asyncio.create_task(self.health.watch(), name=f"watch {self.manifest.name}")

        async def end() -> None:
            watch.cancel()
            with suppress(asyncio.CancelledError):
                await watch

        self._stack.push_async_callback(end)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def run(self, images: Sequence[Pixels], outputs: Sequence[str]) -> tuple[list[Result], Timing]:
        """As in `Engine`. Images stand and fall together: Triton gives one answer to a call."""
        # At once: what is known not to work is not worth a client's wait. What is merely late may be busy.
        if isinstance(self.health.failure, NotReady):
            raise NotReady(f"encoder {self.manifest.name!r} is being brought back: {self.health.failure}")
        started = time.perf_counter()
        calls = [
            asyncio.ensure_future(self._call(images[i : i + MAX_BATCH], outputs))
            for i in range(0, len(images), MAX_BATCH)
        ]
        try:
            answers = await asyncio.gather(*calls)
        except BaseException:
            for call in calls:
                call.cancel()
            raise
        seconds = time.perf_counter() - started
        self.encoded(len(images), seconds)
        results: list[Result] = [
            {name: values[name][i] for name in outputs} for values in answers for i in range(len(values[outputs[0]]))
        ]
        return results, Timing(infer=seconds)

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

    async def _call(self, images: Sequence[Pixels], outputs: Sequence[str]) -> dict[str, Values]:
        ends = deadline.get()
        left = 30.0 if ends is None else max(ends - asyncio.get_running_loop().time(), 1e-3)
        try:
            values = await self._infer(images, outputs, left, INTERACTIVE)
        except (TritonFailure, DeadlineExceeded):
            self.health.failed()
            raise
        self._on_batch(len(images))
        return values

    async def _probe(self, timeout_s: float) -> None:
        gray, name = probe(self.manifest)
        await self._infer([gray], [name], timeout_s, PROBE)

    async def _infer(
        self, images: Sequence[Pixels], outputs: Sequence[str], timeout_s: float, priority: int
    ) -> dict[str, Values]:
        """`(n, *shape)` of each output. Raises also TritonFailure where Triton answers with something else."""
        size = sum(image.nbytes for image in images)
        size += sum(4 * len(images) * math.prod(self.manifest.outputs[name]) for name in outputs)
        if self._memory is None or size < SHARED:
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
        return {name: _values(answer, name, (len(images), *self.manifest.outputs[name])) for name in outputs}

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
        self._pace.left(count)
        try:
            answer = await self._triton.infer(self.manifest.name, [image], wanted, timeout_s, priority)
        finally:
            self._pace.came(count, answered=answer is not None)
        return answer


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
