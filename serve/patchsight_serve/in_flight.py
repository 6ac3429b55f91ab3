"""Equal images that are in work at the same time are computed once."""

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Sequence
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")
SAMPLE = 64  # bytes of each piece that is hashed


class Content:
    """Bytes as part of a key: equal only if all of them are, yet hashed by three small pieces, as megabytes would hold
    up the event loop."""

    __slots__ = ("_hash", "data")

    def __init__(self, data: bytes) -> None:
        self.data = data
        middle = len(data) // 2
        self._hash = hash((len(data), data[:SAMPLE], data[middle : middle + SAMPLE], data[-SAMPLE:]))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Content) and self.data == other.data


class InFlight(Generic[K, V]):
    """Who computes what right now. Belongs to one event loop."""

    def __init__(self) -> None:
        # None in place of a value: whoever was at it has given up
        self._futures: dict[K, asyncio.Future[tuple[V] | None]] = {}

    async def run(self, keys: Sequence[K], work: Callable[[Sequence[int]], Awaitable[Sequence[V]]]) -> list[V]:
        """A value for each key, in order.

        work: is called with indices of keys that nobody is at, and gives a value for each. What it raises is raised
            here alone: others who wait for these keys try for themselves, and so they do if this call is cancelled.
        """
        values: dict[int, V] = {}
        while left := [i for i in range(len(keys)) if i not in values]:
            mine = self._claim(keys, left)
            others = {i: self._futures[keys[i]] for i in left if i not in mine}
            if mine:
                values |= await self._compute(keys, mine, work)
            if others:
                # Unlike `await future`, this cancels none of them.
                await asyncio.wait(set(others.values()), return_when=asyncio.FIRST_COMPLETED)
            for i, future in others.items():
                if future.done() and (value := future.result()) is not None:
                    values[i] = value[0]
        return [values[i] for i in range(len(keys))]

    def _claim(self, keys: Sequence[K], indices: Sequence[int]) -> list[int]:
        mine = []
        for i in indices:
            if keys[i] not in self._futures:
                self._futures[keys[i]] = asyncio.get_running_loop().create_future()
                mine.append(i)
        return mine

    async def _compute(
        self, keys: Sequence[K], mine: Sequence[int], work: Callable[[Sequence[int]], Awaitable[Sequence[V]]]
    ) -> dict[int, V]:
        values: dict[int, V] = {}
        try:
            values = dict(zip(mine, await work(mine), strict=True))
        finally:
            for i in mine:
                self._futures.pop(keys[i]).set_result((values[i],) if i in values else None)
        return values
