"""Clients of an HTTP server: a few that ask without end, or arrivals of a Poisson process, which wait for nobody.

Requests are bytes made beforehand, connections are kept open, and replies are parsed in C: a client costs about 0.1 ms
of CPU for a request, on a core that is not the server's.
"""

import asyncio
import time
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

import numpy as np
import uvloop
from httptools import HttpResponseParser

PATIENCE_S = 5.0  # after which a client gives up, and its request counts as failed
T = TypeVar("T")


@dataclass(frozen=True)
class Reply:
    """status: of HTTP; 0 where there was none within `PATIENCE_S`, or the connection broke. seconds: from when the
    request was due, not from when a connection was free. due: seconds from the beginning of an open loop."""

    status: int
    seconds: float
    due: float = 0.0


def http_request(path: str, headers: Mapping[str, str], body: bytes) -> bytes:
    """One POST as it goes over the wire."""
    lines = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", f"Content-Length: {len(body)}"]
    head = "\r\n".join(lines + [f"{name}: {value}" for name, value in headers.items()])
    return head.encode() + b"\r\n\r\n" + body


class Connection(asyncio.Protocol):
    """One connection, with one request under way."""

    def __init__(self) -> None:
        self.status, self.body = 0, b""
        self._transport: asyncio.Transport | None = None
        self._parser = HttpResponseParser(self)
        self._done: asyncio.Future[None] | None = None

    async def ask(self, request: bytes) -> int:
        """Send, and wait for the whole reply; its status. Raises ConnectionError."""
        if self._transport is None or self._transport.is_closing():
            raise ConnectionError("closed")
        self.status, self.body = 0, b""
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        await self._done
        return self.status

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    @property
    def usable(self) -> bool:
        """Another request may follow."""
        return self._transport is not None and not self._transport.is_closing()

    # asyncio's

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def connection_lost(self, _: Exception | None) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(ConnectionError("closed in the middle"))

    # the parser's

    def on_body(self, part: bytes) -> None:
        self.body += part

    def on_message_complete(self) -> None:
        self.status = self._parser.get_status_code()
        if not self._parser.should_keep_alive():
            self.close()
        self._parser = HttpResponseParser(self)
        if self._done is not None and not self._done.done():
            self._done.set_result(None)


async def connect(url: str) -> Connection:
    """Raises OSError."""
    address = urlsplit(url)
    loop = asyncio.get_running_loop()
    _, connection = await loop.create_connection(Connection, address.hostname or "", address.port or 80)
    return connection


async def ask_once(url: str, request: bytes) -> tuple[int, bytes]:
    """Status and body, on a connection of its own. Raises OSError, TimeoutError among them."""
    async with asyncio.timeout(PATIENCE_S):
        connection = await connect(url)
        status = await connection.ask(request)
        connection.close()
        return status, connection.body


class Pool:
    """Connections to one server, opened as they are needed."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._free: list[Connection] = []

    async def ask(self, request: bytes, due: float) -> Reply:
        """due: by `perf_counter`, when the client wanted to ask."""
        connection = None
        try:
            async with asyncio.timeout(PATIENCE_S - (time.perf_counter() - due)):
                while self._free and connection is None:
                    free = self._free.pop()
                    connection = free if free.usable else None
                connection = connection or await connect(self.url)
                status = await connection.ask(request)
        except (OSError, TimeoutError):
            if connection is not None:
                connection.close()
            return Reply(0, time.perf_counter() - due)
        if connection.usable:
            self._free.append(connection)
        return Reply(status, time.perf_counter() - due)

    def close(self) -> None:
        for connection in self._free:
            connection.close()


async def closed_loop(url: str, requests: Sequence[bytes], connections: int, seconds: float) -> list[Reply]:
    """Each of `connections` clients asks, waits for the reply, and asks again, until `seconds` are over."""
    replies: list[Reply] = []
    pool, turn = Pool(url), _in_turn(requests)
    ends = time.perf_counter() + seconds

    async def client() -> None:
        while (now := time.perf_counter()) < ends:
            reply = await pool.ask(next(turn), now)
            replies.append(reply)
            if reply.status == 0:
                await asyncio.sleep(0.05)  # a server that is gone must not be asked a million times

    await asyncio.gather(*(client() for _ in range(connections)))
    pool.close()
    return replies


async def open_loop(url: str, requests: Sequence[bytes], due: Sequence[float]) -> list[Reply]:
    """Ask at the times `due`, seconds from now, whether or not earlier requests are answered. A reply per request."""
    pool, turn = Pool(url), _in_turn(requests)
    began = time.perf_counter() + 0.05
    tasks = []
    for at in due:
        await asyncio.sleep(began + at - time.perf_counter())
        tasks.append(asyncio.create_task(pool.ask(next(turn), began + at)))
    replies = await asyncio.gather(*tasks)
    pool.close()
    return [Reply(reply.status, reply.seconds, at) for reply, at in zip(replies, due, strict=True)]


def poisson(rate: float, seconds: float, seed: int) -> list[float]:
    """Arrivals within `seconds`, `rate` a second on average, each independent of the others."""
    rng = np.random.default_rng(seed)
    count = rng.poisson(rate * seconds)
    return [float(at) for at in np.sort(rng.uniform(0, seconds, count))]


def percentile_ms(replies: Sequence[Reply], percent: float) -> float:
    """Nearest rank, of all replies: a request that got no 200 counts as one that took the client's whole patience."""
    if not replies:
        return float("nan")
    times = sorted(reply.seconds if reply.status == 200 else max(reply.seconds, PATIENCE_S) for reply in replies)
    rank = max(int(np.ceil(percent / 100 * len(times))), 1)
    return 1000 * times[rank - 1]


def goodput(replies: Sequence[Reply], limit_s: float, seconds: float) -> float:
    """Replies a second that were right, in time, and there before the load of `seconds` ended. The first `limit_s` are
    left out: until then a queue without end is still short."""
    good = (reply for reply in replies if reply.status == 200 and reply.seconds <= limit_s)
    return sum(limit_s < reply.due + reply.seconds <= seconds for reply in good) / (seconds - limit_s)


def run(work: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run`, on the faster loop."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)


def _in_turn(requests: Sequence[bytes]) -> Iterator[bytes]:
    while True:
        yield from requests
