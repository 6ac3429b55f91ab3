"""The clients of the serving benchmark, against numpy and against small servers that do as they are told."""

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import load_generator
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from load_generator import PATIENCE_S, Reply, closed_loop, goodput, http_request, open_loop, percentile_ms, poisson

REQUEST = http_request("/embed", {"Content-Type": "image/jpeg"}, b"photo")
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi"
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n"
CLOSING = b"HTTP/1.1 429 Too Many Requests\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"

Streams = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def test_arrivals_are_those_of_a_poisson_process() -> None:
    rate, seconds = 50.0, 200.0
    arrivals = np.array(poisson(rate, seconds, seed=3))
    assert arrivals.min() >= 0
    assert arrivals.max() < seconds
    gaps = np.diff(arrivals)
    assert (gaps >= 0).all()
    expected = rate * seconds
    assert abs(len(arrivals) - expected) < 5 * math.sqrt(expected)
    # Gaps of an exponential distribution: their standard deviation is their mean, and e^-1 of them are longer than it.
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)
    assert (gaps > gaps.mean()).mean() == pytest.approx(math.exp(-1), abs=0.02)


def test_arrivals_are_the_same_for_a_seed_and_others_for_another() -> None:
    assert poisson(20, 5, seed=1) == poisson(20, 5, seed=1)
    assert poisson(20, 5, seed=1) != poisson(20, 5, seed=2)


@given(st.lists(st.floats(0.001, 4.9), min_size=1, max_size=60), st.sampled_from([1, 50, 95, 99, 100]))
def test_a_percentile_is_the_nearest_rank_as_numpy_has_it(seconds: list[float], percent: float) -> None:
    replies = [Reply(200, each) for each in seconds]
    expected = 1000 * np.percentile(seconds, percent, method="inverted_cdf")
    assert percentile_ms(replies, percent) == pytest.approx(expected)


def test_a_request_without_200_counts_as_all_of_the_clients_patience() -> None:
    replies = [Reply(200, 0.1)] * 98 + [Reply(429, 0.002), Reply(0, PATIENCE_S + 0.3)]
    assert percentile_ms(replies, 98) == pytest.approx(100)
    assert percentile_ms(replies, 99) == pytest.approx(1000 * PATIENCE_S)
    assert percentile_ms(replies, 100) == pytest.approx(1000 * (PATIENCE_S + 0.3))
    assert math.isnan(percentile_ms([], 50))


def test_goodput_counts_what_was_right_in_time_and_under_load() -> None:
    early, late_reply, refused = Reply(200, 0.5), Reply(200, 2.5), Reply(429, 0.01, due=3.0)
    after_the_end, good = Reply(200, 1.0, due=3.1), Reply(200, 2.0, due=1.9)
    assert goodput([early, late_reply, refused, after_the_end, good], limit_s=2.0, seconds=4.0) == 0.5


@asynccontextmanager
async def serving(answer: Streams) -> AsyncIterator[str]:
    tasks = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.current_task())
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                assert b"Content-Length: 5\r\n" in head
                assert await reader.readexactly(5) == b"photo"
                await answer(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.transport.abort()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks)
        await asyncio.sleep(0.02)  # transports are gone one turn later


def saying(reply: bytes, pause_s: float = 0.0) -> Streams:
    """A server that answers one request after the other."""
    turn = asyncio.Lock()

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with turn:
            await asyncio.sleep(pause_s)
        writer.write(reply)
        if b"connection: close" in reply:
            writer.close()

    return answer


@pytest.mark.parametrize(("reply", "status"), [(OK, 200), (CHUNKED, 200), (CLOSING, 429)])
def test_each_client_asks_again_and_again_whatever_the_reply_looks_like(reply: bytes, status: int) -> None:
    async def run() -> list[Reply]:
        async with serving(saying(reply)) as url:
            return await closed_loop(url, [REQUEST], connections=3, seconds=0.2)

    replies = load_generator.run(run())
    assert len(replies) > 6
    assert {each.status for each in replies} == {status}


def test_an_open_loop_waits_for_nobody_and_counts_from_when_a_request_was_due() -> None:
    async def run() -> list[Reply]:
        async with serving(saying(OK, pause_s=0.1)) as url:
            return await open_loop(url, [REQUEST], [0.0, 0.0, 0.0, 0.0])

    seconds = sorted(reply.seconds for reply in load_generator.run(run()))
    # All four were due at once, and the server takes 0.1 s for each: the last has waited for the three before it.
    for i, took in enumerate(seconds):
        assert took >= 0.1 * (i + 1) - 0.01
    assert seconds[-1] < 2


def test_a_client_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_generator, "PATIENCE_S", 0.3)

    async def run() -> list[Reply]:
        async with serving(saying(OK, pause_s=60)) as url:
            return await open_loop(url, [REQUEST], [0.0, 0.1])

    replies = load_generator.run(run())
    assert [reply.status for reply in replies] == [0, 0]
    assert all(0.29 < reply.seconds < 5 for reply in replies)


def test_nobody_there_is_a_reply_without_status() -> None:
    replies = load_generator.run(open_loop("http://127.0.0.1:1", [REQUEST], [0.0]))
    assert [reply.status for reply in replies] == [0]
