"""Who is here right now? What is taken out of use must wait for everybody who may still hold it."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.types import ASGIApp, Receive, Scope, Send


class Visits:
    """Requests that are being answered, and whatever else works with the encoders. Belongs to one event loop."""

    def __init__(self) -> None:
        self._present: set[asyncio.Future[None]] = set()

    @contextmanager
    def visit(self) -> Iterator[None]:
        """Be here for the block."""
        leaving = asyncio.get_running_loop().create_future()
        self._present.add(leaving)
        try:
            yield
        finally:
            self._present.remove(leaving)
            leaving.set_result(None)

    async def over(self, timeout_s: float) -> None:
        """Return once everybody who is here now has left, or when time is up. Who comes later is not waited for."""
        if self._present:
            await asyncio.wait(set(self._present), timeout=timeout_s)


class Visiting:
    """ASGI middleware: every request is a visit, to its last byte."""

    def __init__(self, app: ASGIApp, visits: Visits) -> None:
        self.app = app
        self.visits = visits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One visit."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        with self.visits.visit():
            await self.app(scope, receive, send)
        return None
