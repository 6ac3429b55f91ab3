"""A body that is too large for the memory: onto the disk while it arrives."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

from starlette.requests import Request

from patchsight_serve.bodies import BodyLimits, counted, media_type
from patchsight_serve.connection import PROGRESS
from patchsight_serve.errors import DeadlineExceeded, InvalidRequest
from patchsight_serve.scratch import told


async def receive_file(request: Request, path: Path, limits: BodyLimits) -> None:
    """The body as a new file.

    limits: of time, what a client has for each MiB, or for what is left: a large file may take long, a client that
    sends nothing may not.

    Raises TooLarge as soon as it is known to be, DeadlineExceeded, StorageFull, InvalidRequest for a form.
    """
    if media_type(request) == "multipart/form-data":
        raise InvalidRequest("the file itself has to be the body, not a form with the file in it", "Content-Type")
    chunks = counted(request, limits)
    with told("the body"), path.open("xb") as file:
        while part := await _part(chunks, limits.timeout_s):
            await asyncio.to_thread(file.write, part)


async def _part(chunks: AsyncIterator[bytes], timeout_s: float) -> bytes:
    """The next MiB or a little more; empty at the end."""
    part = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            async for chunk in chunks:
                part += chunk
                if len(part) >= PROGRESS:
                    break
    except TimeoutError:
        raise DeadlineExceeded(f"of the body, less than {PROGRESS:,} bytes arrived within {timeout_s:g} s") from None
    return bytes(part)
