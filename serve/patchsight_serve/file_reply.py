"""A reply that is a file, read from the disk while it is sent."""

import asyncio
import os
from typing import BinaryIO

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from patchsight_serve.departure import left
from patchsight_serve.replies import NO_SNIFFING

CHUNK = 1024 * 1024  # bytes


class FileReply(Response):
    """An open file, as a download of that name. It is closed at the end, or when the client has left; nothing else is
    left of one that has no name on the disk any more."""

    def __init__(self, file: BinaryIO, media_type: str, name: str) -> None:
        self._file = file
        size = os.fstat(file.fileno()).st_size
        headers = {"Content-Length": str(size), "Content-Disposition": f'attachment; filename="{name}"', **NO_SNIFFING}
        super().__init__(None, 200, headers, media_type)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - ASGI's signature
        """Send it. Raises ClientDisconnect."""
        leaving = asyncio.create_task(left(receive))
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            while chunk := await asyncio.to_thread(self._file.read, CHUNK):
                if leaving.done():
                    raise ClientDisconnect
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            leaving.cancel()
            self._file.close()
