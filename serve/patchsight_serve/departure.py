"""A client that leaves while its images wait: the work for it ends."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive

UNWATCHED_S = 0.05  # most requests end before, and need no watcher


async def left(receive: Receive) -> None:
    """Return once the client has closed the connection; the body must have been read before."""
    while (await receive())["type"] != "http.disconnect":
        pass


@asynccontextmanager
async def while_connected(request: Request) -> AsyncIterator[None]:
    """Cancel the block once the client has closed the connection; the body must have been read before. It is noticed at
    once, but not in the first `UNWATCHED_S`.

    Raises ClientDisconnect then. Threads that are at work finish what they have begun.
    """
    loop = asyncio.get_running_loop()
    watcher: asyncio.Task[None] | None = None

    async def watch() -> None:
        await left(request.receive)
        presence.reschedule(0)  # long past: now

    def begin() -> None:
        nonlocal watcher
        watcher = loop.create_task(watch())

    try:
        async with asyncio.timeout(None) as presence:
            alarm = loop.call_later(UNWATCHED_S, begin)
            try:
                yield
            finally:
                alarm.cancel()
                if watcher is not None:
                    watcher.cancel()
    except TimeoutError:
        if not presence.expired():
            raise  # one of the block's own
        raise ClientDisconnect from None
