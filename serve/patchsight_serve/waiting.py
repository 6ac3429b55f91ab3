"""Images that wait for an encoder, and which of them are next."""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from patchsight_serve.encoder import Pixels, Values
from patchsight_serve.errors import PatchsightError

Result = Mapping[str, Values] | PatchsightError

SHARE = 4  # while both classes wait, every fourth place is for bulk


@dataclass(eq=False)
class Item:
    """One image on its way through."""

    image: Pixels  # uint8 (H, W, 3)
    outputs: tuple[str, ...]
    future: asyncio.Future[Result]  # done before there is a result: nobody waits for one any more
    bulk: bool = False
    deadline: float = float("inf")  # of the event loop's clock
    started: float = 0.0  # perf_counter when its batch began
    finished: float = 0.0


class Waiting:
    """Two classes, in each first come, first served. Interactive images go before bulk, which gets every fourth place
    all the same: neither class ever starves, however many of the other there are. Belongs to one thread at a time."""

    def __init__(self) -> None:
        self._interactive: deque[Item] = deque()
        self._bulk: deque[Item] = deque()
        self._turn = 0  # places given while both waited

    def __len__(self) -> int:
        return len(self._interactive) + len(self._bulk)

    def extend(self, items: Iterable[Item]) -> None:
        """They come last of their class."""
        for item in items:
            (self._bulk if item.bulk else self._interactive).append(item)

    def take(self, room: Callable[[Item], int], alike: Callable[[Item, Item], bool]) -> list[Item]:
        """The next item, and those that go with it: at most `room(next)` with `alike(next, item)`. All others keep
        their order. What was given up is dropped."""
        self.drop()
        waiting = self._in_turn()
        if not waiting:
            return []
        head = waiting[0]
        batch = [item for item in waiting if alike(head, item)][: room(head)]
        if self._interactive and self._bulk:
            self._turn += len(batch)
        taken = set(batch)
        self._interactive = deque(item for item in self._interactive if item not in taken)
        self._bulk = deque(item for item in self._bulk if item not in taken)
        return batch

    def clear(self) -> list[Item]:
        """All of them, which wait no longer."""
        items = [*self._interactive, *self._bulk]
        self._interactive.clear()
        self._bulk.clear()
        return items

    def drop(self) -> None:
        """Forget the items that nobody waits for."""
        self.extend(item for item in self.clear() if not item.future.done())

    def _in_turn(self) -> list[Item]:
        interactive, bulk, turn = deque(self._interactive), deque(self._bulk), self._turn
        merged = []
        while interactive and bulk:
            turn += 1
            merged.append((interactive if turn % SHARE else bulk).popleft())
        return [*merged, *interactive, *bulk]
