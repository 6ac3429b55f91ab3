"""Is a model on Triton well, really? Triton says ready of a model whose worker is dead, so it is asked to infer.

Every success is a proof; where there was none for a while, a probe is sent, ahead of all that waits. A model that
fails is loaded anew, which takes Triton's `--model-control-mode=explicit`.
"""

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable

from patchsight_serve.errors import DeadlineExceeded, NotReady, PatchsightError
from patchsight_serve.pace import Pace
from patchsight_serve.triton_client import Triton, TritonFailure
from patchsight_serve.triton_config import MAX_BATCH

logger = logging.getLogger(__name__)

PATIENCE_S = 0.75  # at least, for the probe of a model that was well
LONG_PATIENCE_S = 5.0  # for one that was not: Triton itself needs a while to find a worker dead
LONGEST_PATIENCE_S = 30.0
HANGING_S = 10.0  # without any answer: as good as dead
UNLOAD_S, LOAD_S = 5.0, 60.0
LONGEST_PAUSE_S = 30.0  # between attempts to load a model that does not come up


class TritonHealth:
    """Watches one model.

    probe: runs one inference within so many seconds, and raises what is wrong.
    failure: what is wrong; None while the model is well.
    heartbeat: `time.monotonic()` of the last success; -inf before the first.
    """

    def __init__(
        self, triton: Triton, model: str, probe: Callable[[float], Awaitable[None]], pace: Pace, every_s: float
    ) -> None:
        self.failure: PatchsightError | None = None
        self.heartbeat = float("-inf")
        self._triton, self._model, self._probe, self._pace, self._every_s = triton, model, probe, pace, every_s
        self._began, self._checked = time.monotonic(), float("-inf")
        self._alarm = asyncio.Event()
        self._pause_s = 0.0  # before the model may be loaded anew
        self._pause_ends = float("-inf")

    def succeeded(self) -> None:
        """An inference was answered."""
        self.heartbeat = time.monotonic()

    def failed(self) -> None:
        """A request failed: look at once."""
        self._alarm.set()

    async def watch(self) -> None:
        """Until cancelled. Whatever goes wrong here must not end it."""
        while True:
            try:
                if await self._wait() or self._due() <= 0:
                    await self.check()
            except PatchsightError as error:
                logger.warning("encoder %s: %s", self._model, error)
            except Exception:
                logger.exception("the watch over encoder %s goes on", self._model)

    async def check(self) -> None:
        """One probe, and help where it fails."""
        try:
            await self._probe(self._patience())
        except (NotReady, DeadlineExceeded) as error:
            if self.failure is None:
                late = isinstance(error, DeadlineExceeded)
                logger.log(
                    logging.WARNING if late else logging.ERROR, "encoder %s is %s: %s", self._model,
                    "late" if late else "broken", error,
                )  # fmt: skip
            self.failure = error
            await self._help(error)
        else:
            if self.failure is not None:
                logger.info("encoder %s works again", self._model)
            self.failure, self._pause_s = None, 0.0
        finally:
            self._checked = time.monotonic()

    def _patience(self) -> float:
        """A probe waits for the one batch that runs when it comes, anybody's: half as long again as a full one should
        take, at the pace of those that were run, which are smaller and so not as quick by the image."""
        pace = self._pace.seconds_per_image
        if self.failure is not None or pace is None:
            return LONG_PATIENCE_S
        return min(max(PATIENCE_S, 1.5 * pace * MAX_BATCH), LONGEST_PATIENCE_S)

    def _due(self) -> float:
        """Seconds until the last proof is too old."""
        return max(self.heartbeat, self._checked, self._began) + self._every_s - time.monotonic()

    async def _wait(self) -> bool:
        """Until an alarm, which is true, or until a probe may be due: proofs that come meanwhile put it off."""
        try:
            async with asyncio.timeout(max(self._due(), 0.0)):
                await self._alarm.wait()
        except TimeoutError:
            return False
        self._alarm.clear()
        return True

    async def _help(self, error: PatchsightError) -> None:
        """Load the model anew where that may help, with longer and longer pauses where it does not."""
        hangs = isinstance(error, DeadlineExceeded) and time.monotonic() - max(self.heartbeat, self._began) > HANGING_S
        lost = isinstance(error, TritonFailure) and error.reason != "unreachable"
        if not (hangs or lost) or time.monotonic() < self._pause_ends:
            return
        self._pause_s = min(max(2 * self._pause_s, 1.0), LONGEST_PAUSE_S)
        await asyncio.sleep(random.uniform(0, 0.2))  # several gateways see the same at the same time
        logger.warning("encoder %s: Triton is asked to load it anew", self._model)
        try:
            await self._reload()
        finally:
            self._pause_ends = time.monotonic() + self._pause_s
        self._alarm.set()

    async def _reload(self) -> None:
        """A load alone does not heal a model that Triton believes to be ready."""
        if await self._triton.loaded(self._model, UNLOAD_S):
            await self._triton.unload(self._model, UNLOAD_S)
            async with asyncio.timeout(UNLOAD_S):
                while await self._triton.loaded(self._model, UNLOAD_S):
                    await asyncio.sleep(0.05)
        await self._triton.load(self._model, LOAD_S)
