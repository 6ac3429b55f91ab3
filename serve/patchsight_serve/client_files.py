"""What a client sends from the disk, and what it writes onto it: galleries as files, of which 1 MiB is in memory."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import httpx

from patchsight_serve.client_steps import Call
from patchsight_serve.durable import sync
from patchsight_serve.errors import PatchsightError

CHUNK = 1024 * 1024  # bytes


def send(http: httpx.Client, call: Call) -> httpx.Response:
    """The reply to a call; a good one is in `call.to`, if that is said. Raises httpx.HTTPError, PatchsightError."""
    arguments = call.arguments()
    if call.body is not None:
        arguments |= {"content": _pieces(call.body)}
    if call.to is None:
        return http.request(**arguments)
    with http.stream(**arguments) as reply:
        if not _comes(reply, call):
            reply.read()
            return reply
        arrival = Arrival(call.to)
        try:
            for chunk in reply.iter_bytes(CHUNK):
                arrival.write(chunk)
            arrival.finish()
        finally:
            arrival.close()
    return reply


async def send_in_loop(http: httpx.AsyncClient, call: Call) -> httpx.Response:
    """As `send`; files are read and written in threads."""
    arguments = call.arguments()
    if call.body is not None:
        arguments |= {"content": _pieces_in_loop(call.body)}
    if call.to is None:
        return await http.request(**arguments)
    async with http.stream(**arguments) as reply:
        if not _comes(reply, call):
            await reply.aread()
            return reply
        arrival = await asyncio.to_thread(Arrival, call.to)
        try:
            async for chunk in reply.aiter_bytes(CHUNK):
                await asyncio.to_thread(arrival.write, chunk)
            await asyncio.to_thread(arrival.finish)
        finally:
            arrival.close()
    return reply


class Arrival:
    """A file beside `path` that takes its place once all of it is on the disk; until then, what is there stays. Every
    method raises PatchsightError, which names the path."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
        try:
            self._file: BinaryIO = self._partial.open("xb")
        except OSError as error:
            raise unusable(path, error) from None

    def write(self, chunk: bytes) -> None:
        """The next bytes."""
        try:
            self._file.write(chunk)
        except OSError as error:
            raise unusable(self._path, error) from None

    def finish(self) -> None:
        """That was all."""
        try:
            self._file.close()
            sync(self._partial)
            self._partial.replace(self._path)
            sync(self._path.parent)
        except OSError as error:
            raise unusable(self._path, error) from None

    def close(self) -> None:
        """Leave nothing but a file that is finished."""
        try:
            self._file.close()
        except OSError:  # what a full disk did not take
            pass
        finally:
            self._partial.unlink(missing_ok=True)


def unusable(path: Path, error: OSError) -> PatchsightError:
    """Says which file it is."""
    return PatchsightError(f"{path}: {error.strerror or error}")


def check_source(path: Path) -> int:
    """Bytes of a file that is to be sent. Raises PatchsightError."""
    try:
        with path.open("rb") as file:
            return file.seek(0, 2)
    except OSError as error:
        raise unusable(path, error) from None


def check_target(path: Path) -> None:
    """Whether a file can be written there, before the server is asked for one. Raises PatchsightError."""
    if path.is_dir():
        raise PatchsightError(f"{path}: is a folder; name the file")
    Arrival(path).close()


def _comes(reply: httpx.Response, call: Call) -> bool:
    """Whether the file that was asked for is in the reply. Raises PatchsightError where something else is."""
    kind = reply.headers.get("Content-Type", "")
    if reply.is_success and kind != call.accept:
        raise PatchsightError(f"{reply.url}: replied with {kind!r} in place of {call.accept!r}")
    return reply.is_success


def _pieces(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                yield chunk
    except OSError as error:
        raise unusable(path, error) from None


async def _pieces_in_loop(path: Path) -> AsyncIterator[bytes]:
    pieces: Any = _pieces(path)
    try:
        while chunk := await asyncio.to_thread(next, pieces, b""):
            yield chunk
    finally:
        pieces.close()
