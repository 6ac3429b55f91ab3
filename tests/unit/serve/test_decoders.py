"""The pool that decodes: results, errors and cancellation, beside what asyncio itself would do."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from patchsight_serve.decoders import Decoders


def with_decoders(threads: int, work: Callable[[Decoders], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        decoders = Decoders(threads)
        try:
            await work(decoders)
        finally:
            decoders.close()

    asyncio.run(run())


def odd(number: int) -> int:
    if number % 2 == 0:
        raise ValueError(number)
    return number


@pytest.mark.parametrize("method", ["run", "run_as_bulk"])
def test_results_and_errors_are_those_of_the_loops_own_executor(method: str) -> None:
    async def work(decoders: Decoders) -> None:
        loop = asyncio.get_running_loop()
        ours = await asyncio.gather(*(getattr(decoders, method)(odd, i) for i in range(50)), return_exceptions=True)
        own = await asyncio.gather(*(loop.run_in_executor(None, odd, i) for i in range(50)), return_exceptions=True)
        assert [repr(result) for result in ours] == [repr(result) for result in own]

    with_decoders(3, work)


def test_what_is_cancelled_while_it_waits_is_not_begun() -> None:
    async def work(decoders: Decoders) -> None:
        gate, begun = threading.Event(), []
        first = decoders.run(gate.wait)
        second = decoders.run(begun.append, 2)
        third = decoders.run(begun.append, 3)
        second.cancel()
        gate.set()
        await asyncio.gather(first, third)
        assert begun == [3]
        assert second.cancelled()

    with_decoders(1, work)


def test_what_is_cancelled_while_it_runs_is_forgotten() -> None:
    """Its result comes to a future that is done, which must neither raise in the loop nor stop a thread."""

    async def work(decoders: Decoders) -> None:
        complaints: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        gate, running = threading.Event(), threading.Event()

        def slow() -> None:
            running.set()
            gate.wait()

        future = decoders.run(slow)
        await asyncio.to_thread(running.wait)
        future.cancel()
        gate.set()
        assert await decoders.run(odd, 3) == 3
        await asyncio.sleep(0)
        assert not complaints

    with_decoders(1, work)


def test_bulk_work_lets_others_go_first() -> None:
    """A hundred images of bulk work are before it, and yet it waits for no more than those in the threads and as many
    that are queued."""

    async def work(decoders: Decoders) -> None:
        done: list[str] = []
        gate = threading.Event()
        blocked = decoders.run(gate.wait)
        bulk = [asyncio.ensure_future(decoders.run_as_bulk(done.append, "bulk")) for _ in range(100)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        interactive = decoders.run(done.append, "interactive")
        gate.set()
        await asyncio.gather(blocked, interactive, *bulk)
        assert done.index("interactive") <= 1
        assert len(done) == 101

    with_decoders(1, work)
