"""What runs one encoder for the server, in this process or elsewhere; and the admission that every engine has."""

import asyncio
import math
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np

from patchsight_serve.encoder import Pixels
from patchsight_serve.errors import DeadlineExceeded, Overloaded
from patchsight_serve.manifest import Manifest
from patchsight_serve.pace import Pace
from patchsight_serve.timing import Timing
from patchsight_serve.waiting import SHARE, Result


@dataclass(frozen=True)
class Terms:
    """What was agreed with the request at hand: when it has to be answered, by the event loop's clock, and whether it
    lets others go first."""

    deadline: float = math.inf
    bulk: bool = False


NOTHING_AGREED = Terms()
terms: ContextVar[Terms] = ContextVar("terms", default=NOTHING_AGREED)


class Engine(Protocol):
    """One encoder's queue and whatever empties it. All methods belong to one event loop; entering starts the work."""

    @property
    def admitted(self) -> int:
        """Images of all admitted requests."""

    @property
    def hung(self) -> bool:
        """It will never work again in this process, which has to be replaced."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *_: object) -> None: ...

    def admit(self, images: int, timeout_s: float, bulk: bool = False) -> AbstractAsyncContextManager[None]:
        """As in `Admission`."""

    def check(self, images: int, timeout_s: float, bulk: bool = False) -> None:
        """As in `Admission`."""

    async def run(self, images: Sequence[Pixels], outputs: Sequence[str]) -> tuple[list[Result], Timing]:
        """Encode images that are already admitted.

        images: each uint8 `(H, W, 3)` as the encoder's manifest says. outputs: names in the graph.

        Returns a result per image, in order: each output without the batch axis, or the image's error. Cancelling
        gives the images up. Raises NotReady if the engine cannot work, DeadlineExceeded if it hangs.
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

    max_queue: places. Bulk work gets three quarters of them, so that it never shuts others out; a request of it that
        is alone gets all. max_wait_s: a request that would wait longer, by the engine's pace, is refused at once.
    admitted: images of all admitted requests: being decoded, waiting or in the encoder.
    pace: of the encoder, which the engine keeps.
    """

    def __init__(self, max_queue: int, max_wait_s: float = math.inf) -> None:
        self.max_queue, self.max_wait_s = max_queue, max_wait_s
        self.admitted = 0
        self.pace = Pace()
        self._bulk = 0  # of the admitted

    @asynccontextmanager
    async def admit(self, images: int, timeout_s: float, bulk: bool = False) -> AsyncIterator[None]:
        """Hold `images` places for the block, which has `timeout_s` seconds.

        Raises Overloaded at once, and holds none, if there are not as many places, or those before it take too long;
        DeadlineExceeded when time is up.
        """
        self.check(images, timeout_s, bulk)
        self.admitted += images
        self._bulk += images * bulk
        token = terms.set(Terms(asyncio.get_running_loop().time() + timeout_s, bulk))
        try:
            async with asyncio.timeout(timeout_s):
                yield
        except TimeoutError:
            raise DeadlineExceeded(f"no answer within {timeout_s:g} s") from None
        finally:
            terms.reset(token)
            self.admitted -= images
            self._bulk -= images * bulk

    def check(self, images: int, timeout_s: float, bulk: bool = False) -> None:
        """Raise Overloaded where `admit` would."""
        patience_s = min(timeout_s, self.max_wait_s)
        wait_s = self._ahead(bulk) * (self.pace.seconds_per_image or 0.0)
        if self.admitted + images > self.max_queue:
            why = f"{self.admitted} images are in work, {images} more would pass the limit of {self.max_queue}"
        elif bulk and self._bulk and self._bulk + images > (most := self.max_queue * 3 // 4):
            why = f"{self._bulk} images of bulk work are in work, {images} more would pass the limit of {most}"
        elif wait_s > patience_s:
            why = f"{self.admitted} images are in work, which would take {wait_s:.1f} s; the limit is {patience_s:g} s"
        else:
            return
        raise Overloaded(why, retry_after_s=int(min(max(wait_s, 0.0) + 1, 60)))

    def _ahead(self, bulk: bool) -> float:
        """Images that go before a new request: for bulk work all, for others theirs and the share of bulk."""
        if bulk:
            return self.admitted
        return min(self.admitted, (self.admitted - self._bulk) * SHARE / (SHARE - 1))
