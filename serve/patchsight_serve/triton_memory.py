"""Shared memory with a Triton on the same host: pixels and outputs of large calls do not go through gRPC.

A slot is one region that holds a batch and all its outputs. It is used again only after a call that ended well: after
one that was cancelled or failed, Triton may still write into it, and the next request's numbers would be wrong.
"""

import asyncio
import logging
import math
import mmap
import os
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress

import numpy as np
from tritonclient.grpc import InferInput, InferRequestedOutput
from tritonclient.grpc.aio import InferResult

from patchsight_serve.encoder import Pixels, Values
from patchsight_serve.errors import PatchsightError
from patchsight_serve.manifest import Manifest
from patchsight_serve.triton_client import CALL_S, Triton, TritonFailure, said
from patchsight_serve.triton_config import MAX_BATCH
from patchsight_serve.triton_leftovers import MEMORY, PREFIX, hold

logger = logging.getLogger(__name__)

SLOTS = 8  # at the same time; pages that no call has touched cost nothing
REST_S = 60.0  # before Triton is told to forget a region that it may still be writing into


class Slot:
    """One region: `(MAX_BATCH, S, S, 3)` uint8, and behind it each output, float32. Raises OSError.

    A plain file: what Python's `multiprocessing` makes, a helper process of Python takes away when this one is killed,
    and nobody could tell any more that Triton still has it mapped.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.name = f"{PREFIX}{os.getpid()}-{uuid.uuid4().hex[:12]}"
        self._manifest = manifest
        self._offsets, end = {}, _aligned(MAX_BATCH * manifest.transform.crop**2 * 3)
        for name, shape in manifest.outputs.items():
            self._offsets[name] = end
            end = _aligned(end + 4 * MAX_BATCH * math.prod(shape))
        self.size = end
        descriptor = os.open(MEMORY / self.name, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        try:
            os.ftruncate(descriptor, end)
            self._memory = mmap.mmap(descriptor, end)
            self._lock = hold(self.name)
        except OSError:
            (MEMORY / self.name).unlink()
            raise
        finally:
            os.close(descriptor)

    def destroy(self) -> None:
        """Its name is gone at once, its memory with this slot."""
        (MEMORY / self.name).unlink(missing_ok=True)
        os.close(self._lock)

    def image(self, images: Sequence[Pixels]) -> InferInput:
        """The call's input; the pixels are in the region when this returns."""
        shape = (len(images), *images[0].shape)
        pixels: Pixels = np.ndarray(shape, np.uint8, self._memory)
        np.stack(images, out=pixels)
        image = InferInput("image", shape, "UINT8")
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
        return np.ndarray(shape, np.float32, self._memory, self._offsets[name]).copy()


class TritonMemory:
    """The slots of one encoder. Made at their first use, and no more once Triton turns out to be on another host."""

    def __init__(self, triton: Triton, manifest: Manifest) -> None:
        self._triton, self._manifest = triton, manifest
        self._free: list[Slot] = []
        self._count = 0  # free, in use and resting
        self._off = False
        self._resting: dict[Slot, asyncio.Task[None]] = {}

    async def aclose(self) -> None:
        """Forget all regions, here and at Triton."""
        self._off = True
        for task in self._resting.values():
            task.cancel()
        for slot in [*self._resting, *self._free]:
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
        except BaseException as error:
            lost = [slot]
            if isinstance(error, TritonFailure):  # a server that started anew knows none of the others either
                lost, self._free = [slot, *self._free], []
            for each in lost:
                self._resting[each] = asyncio.create_task(self._rest(each))
            raise
        self._free.append(slot)

    async def _new(self) -> Slot | None:
        if self._off or self._count == SLOTS:
            return None
        try:
            slot = Slot(self._manifest)
        except OSError as error:
            self._give_up(error)
            return None
        self._count += 1
        try:
            await said(
                self._triton.client.register_system_shared_memory(
                    slot.name, f"/{slot.name}", slot.size, client_timeout=CALL_S
                )
            )
        except BaseException as error:
            self._count -= 1
            slot.destroy()
            if not isinstance(error, PatchsightError):
                raise
            # Of a Triton that is gone or late the call itself will tell.
            if isinstance(error, TritonFailure) and error.reason != "unreachable":
                self._give_up(error)
            return None
        return slot

    def _give_up(self, error: Exception) -> None:
        """There will be no more of them."""
        logger.info("no shared memory with Triton for encoder %s: %s", self._manifest.name, error)
        self._off = True

    async def _rest(self, slot: Slot) -> None:
        await asyncio.sleep(REST_S)
        del self._resting[slot]
        self._count -= 1
        await self._forget(slot)

    async def _forget(self, slot: Slot) -> None:
        """Here and at Triton. Not sooner than that: a thread of ours may still be copying pixels into it as well."""
        with suppress(PatchsightError):  # a Triton that is gone, or has started anew, does not know it any more
            await said(self._triton.client.unregister_system_shared_memory(slot.name, client_timeout=CALL_S))
        slot.destroy()


def _aligned(size: int) -> int:
    return -(-size // 64) * 64
