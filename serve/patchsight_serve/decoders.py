"""The threads that decode and draw, so that the event loop does not."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")


class Decoders:
    """As many threads as decoding may use, first come, first served. Belongs to one event loop.

    `run_in_executor` would do the same by two futures and a chain of callbacks between them, for a tenth of what a
    small photo costs this server beside its pixels.
    """

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        # Bulk work that filled the pool's queue would hold everybody up.
        self._bulk = asyncio.Semaphore(threads)

    def run(self, work: Callable[..., T], *given: Any) -> "asyncio.Future[T]":
        """`work(*given)` in a thread. It is not begun any more once the future is cancelled; what is begun is finished,
        and forgotten."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def do() -> None:
            if future.cancelled():
                return
            try:
                result, error = work(*given), None
            except BaseException as raised:  # it belongs to the caller, whatever it is
                result, error = None, raised
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(_settle, future, result, error)

        self._pool.submit(do)
        return future

    async def run_as_bulk(self, work: Callable[..., T], *given: Any) -> T:
        """The same for work that lets others go first: no more of it is queued than there are threads."""
        async with self._bulk:
            return await self.run(work, *given)

    def close(self) -> None:
        """Begin nothing more."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _settle(future: "asyncio.Future[Any]", result: Any, error: BaseException | None) -> None:
    if future.done():  # cancelled
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
