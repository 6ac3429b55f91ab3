"""What runs one encoder for the server, in this process or elsewhere; and the admission that every engine has."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from contextvars import ContextVar
from typing import Protocol, Self

import numpy as np

from patchsight_serve.encoder import Pixels, Values
from patchsight_serve.errors import DeadlineExceeded, Overloaded, PatchsightError
from patchsight_serve.manifest import Manifest
from patchsight_serve.timing import Timing

Result = Mapping[str, Values] | PatchsightError

# The event loop's time by which the request at hand has to be answered; None outside of any request.
deadline: ContextVar[float | None] = ContextVar("deadline", default=None)


class Engine(Protocol):
    """One encoder's queue and whatever empties it. All methods belong to one event loop; entering starts the work."""

    @property
    def admitted(self) -> int:
        """Images of all admitted requests."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *_: object) -> None: ...

    def admit(self, images: int, timeout_s: float) -> AbstractAsyncContextManager[None]:
        """As in `Admission`."""

    async def run(self, images: Sequence[Pixels], outputs: Sequence[str]) -> tuple[list[Result], Timing]:
        """Encode images that are already admitted.

        images: each uint8 `(H, W, 3)` as the encoder's manifest says. outputs: names in the graph.

        Returns a result per image, in order: each output without the batch axis, or the image's error. Cancelling
        gives the images up. Raises NotReady if the engine cannot work.
        """

    async def prove(self, max_age_s: float, timeout_s: float) -> None:
        """Return once the encoder is known to work: by an inference at most `max_age_s` old, or else by one run now.

        Raises NotReady if it does not answer in time, or answers with an error.
        """


def probe(manifest: Manifest) -> tuple[Pixels, str]:
    """The cheapest proof that an encoder works: a gray picture, and the output to ask for."""
    side = manifest.transform.crop
    return np.full((side, side, 3), 128, np.uint8), next(iter(manifest.outputs))


def room(max_batch: int, pixels: Pixels, manifest: Manifest) -> int:
    """Images like this one in a batch. Pictures larger than the encoder's own make batches that are smaller by as much,
    so that memory stays bounded."""
    own, seen = manifest.transform.crop**2, pixels.shape[0] * pixels.shape[1]
    return int(max(max_batch * own // max(seen, own), 1))


class Admission:
    """Places for images, counted in images, all or nothing for a request.

    admitted: images of all admitted requests: being decoded, waiting or in the encoder.
    """

    def __init__(self, max_queue: int) -> None:
        self.max_queue = max_queue
        self.admitted = 0
        self._rate = 0.0  # images per second, smoothed; 0 until the first batch

    @asynccontextmanager
    async def admit(self, images: int, timeout_s: float) -> AsyncIterator[None]:
        """Hold `images` places for the block, which has `timeout_s` seconds.

        Raises Overloaded at once, and holds none, if there are not as many places; DeadlineExceeded when time is up.
        """
        if self.admitted + images > self.max_queue:
            wait_s = self.admitted / self._rate if self._rate else 1.0
            raise Overloaded(
                f"{self.admitted} images are in work, {images} more would pass the limit of {self.max_queue}",
                retry_after_s=int(min(max(wait_s + 1, 1), 60)),
            )
        self.admitted += images
        token = deadline.set(asyncio.get_running_loop().time() + timeout_s)
        try:
            async with asyncio.timeout(timeout_s):
                yield
        except TimeoutError:
            raise DeadlineExceeded(f"no answer within {timeout_s:g} s") from None
        finally:
            deadline.reset(token)
            self.admitted -= images

    def encoded(self, images: int, seconds: float) -> None:
        """Learn the rate from a batch: it is what a refused client is told to wait by."""
        rate = images / (seconds + 1e-9)
        self._rate = 0.8 * self._rate + 0.2 * rate if self._rate else rate
