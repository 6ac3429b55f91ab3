"""A client that leaves while its images wait: the work for it ends."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.requests import ClientDisconnect, Request


@asynccontextmanager
async def while_connected(request: Request) -> AsyncIterator[None]:
    """Cancel the block as soon as the client closes the connection; the body must have been read before.

    Raises ClientDisconnect then. Threads that are at work finish what they have begun.
    """

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        presence.reschedule(0)  # long past: now

    try:
        async with asyncio.timeout(None) as presence:
            watcher = asyncio.create_task(watch())
            try:
                yield
            finally:
                watcher.cancel()
    except TimeoutError:
        if not presence.expired():
            raise  # one of the block's own
        raise ClientDisconnect from None
