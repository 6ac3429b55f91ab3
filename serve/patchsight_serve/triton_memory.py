"""Shared memory with a Triton on the same host: pixels and outputs of large calls do not go through gRPC.

A slot is one region that holds a batch and all its outputs. It is used again only after a call that ended well: after
one that was cancelled or failed, Triton may still write into it, and the next request's numbers would be wrong.
"""

import asyncio
import logging
import math
import os
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import numpy as np
from tritonclient.grpc import InferInput, InferRequestedOutput
from tritonclient.grpc.aio import InferResult
from tritonclient.utils import shared_memory

from patchsight_serve.encoder import Pixels, Values
from patchsight_serve.errors import PatchsightError
from patchsight_serve.manifest import Manifest
from patchsight_serve.triton_client import Triton, TritonFailure, said
from patchsight_serve.triton_config import MAX_BATCH

logger = logging.getLogger(__name__)

SLOTS = 8  # at the same time; pages that no call has touched cost nothing
REST_S = 60.0  # before Triton is told to forget a region that it may still be writing into
CALL_S = 5.0


class Slot:
    """One region: `(MAX_BATCH, S, S, 3)` uint8, and behind it each output, float32."""

    def __init__(self, manifest: Manifest) -> None:
        self.name = f"patchsight-{os.getpid()}-{uuid.uuid4().hex[:12]}"
        self._manifest = manifest
        self._offsets, end = {}, _aligned(MAX_BATCH * manifest.transform.crop**2 * 3)
        for name, shape in manifest.outputs.items():
            self._offsets[name] = end
            end = _aligned(end + 4 * MAX_BATCH * math.prod(shape))
        self.size = end
        self.handle: Any = shared_memory.create_shared_memory_region(self.name, f"/{self.name}", end, create_only=True)

    def image(self, images: Sequence[Pixels]) -> InferInput:
        """The call's input; the pixels are in the region when this returns."""
        pixels = np.stack(images)
        shared_memory.set_shared_memory_region(self.handle, [pixels])
        image = InferInput("image", pixels.shape, "UINT8")
        image.set_shared_memory(self.name, pixels.nbytes)
        return image

    def output(self, name: str, count: int) -> InferRequestedOutput:
        output = InferRequestedOutput(name)
        size = 4 * count * math.prod(self._manifest.outputs[name])
        output.set_shared_memory(self.name, size, self._offsets[name])
        return output

    def values(self, answer: InferResult, name: str, count: int) -> Values:
        """What Triton wrote, in memory of its own. Raises TritonFailure if it says that it is of another shape."""
        shape, told = (count, *self._manifest.outputs[name]), answer.get_output(name)
        if told is None or tuple(told.shape) != shape or told.datatype != "FP32":
            raise TritonFailure(f"Triton: {name} is {told and tuple(told.shape)}, not float32 {shape}", "broken")
        return np.array(shared_memory.get_contents_as_numpy(self.handle, np.float32, shape, self._offsets[name]))


class TritonMemory:
    """The slots of one encoder. Made at their first use, and no more once Triton turns out to be on another host."""

    def __init__(self, triton: Triton, manifest: Manifest) -> None:
        self._triton, self._manifest = triton, manifest
        self._free: list[Slot] = []
        self._count = 0  # free, in use and resting
        self._off = False
        self._resting: set[asyncio.Task[None]] = set()

    async def aclose(self) -> None:
        """Forget all regions, here and at Triton."""
        for task in self._resting:
            task.cancel()
        await asyncio.gather(*self._resting, return_exceptions=True)
        self._off = True
        for slot in self._free:
            await self._forget(slot)

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[Slot | None]:
        """A slot for one call; None where there is none, and the call goes over gRPC."""
        slot = self._free.pop() if self._free else await self._new()
        if slot is None:
            yield None
            return
        try:
            yield slot
        except BaseException:
            task = asyncio.create_task(self._rest(slot))
            self._resting.add(task)
            task.add_done_callback(self._resting.discard)
            raise
        self._free.append(slot)

    async def _new(self) -> Slot | None:
        if self._off or self._count == SLOTS:
            return None
        self._count += 1
        try:
            slot = Slot(self._manifest)
            await said(
                self._triton.client.register_system_shared_memory(
                    slot.name, f"/{slot.name}", slot.size, client_timeout=CALL_S
                )
            )
        except (TritonFailure, shared_memory.SharedMemoryException, OSError) as error:
            logger.info("no shared memory with Triton for encoder %s: %s", self._manifest.name, error)
            self._off = True
            return None
        return slot

    async def _rest(self, slot: Slot) -> None:
        shared_memory.destroy_shared_memory_region(slot.handle)  # our half; Triton keeps its own until it is told
        try:
            await asyncio.sleep(REST_S)
        finally:
            self._count -= 1
            await self._unregister(slot)

    async def _forget(self, slot: Slot) -> None:
        await self._unregister(slot)
        shared_memory.destroy_shared_memory_region(slot.handle)

    async def _unregister(self, slot: Slot) -> None:
        with suppress(PatchsightError):  # a Triton that is gone, or has started anew, does not know it any more
            await said(self._triton.client.unregister_system_shared_memory(slot.name, client_timeout=CALL_S))


def _aligned(size: int) -> int:
    return -(-size // 64) * 64
