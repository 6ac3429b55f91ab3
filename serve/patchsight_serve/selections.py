"""Which images filters let through, remembered: a filter reads every row once, and from then on what was written."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from patchsight_serve.nearest import I64

REMEMBERED = 32  # filters; each takes a byte for every key up to the largest
CHANGES = 100_000  # keys written since: a filter that is asked for more seldom reads every row again

Question = tuple[str, tuple[str, ...]]  # a condition in SQL, and its values
Read = Callable[[str, Sequence[str], I64 | None], I64]


@dataclass
class _Selection:
    """seen: so many changes are in it. chosen: bool, by key."""

    seen: int
    chosen: np.ndarray[Any, np.dtype[np.bool_]]
    turn: threading.Lock = field(default_factory=threading.Lock)


class Selections:
    """Of one record. Any thread may ask; `changed` is for whoever has just committed."""

    def __init__(self, read: Read) -> None:
        """read: keys, of all or of those given, for which a condition holds right now."""
        self._read = read
        self._lock = threading.Lock()
        self._known: OrderedDict[Question, _Selection] = OrderedDict()
        self._changes: list[int] = []
        self._forgotten = 0  # changes before those

    def changed(self, keys: Sequence[int]) -> None:
        """These rows have come, gone or been described anew."""
        with self._lock:
            self._changes += keys if self._known else ()
            if len(self._changes) > CHANGES:
                self._forget()

    def keys(self, where: str, values: Sequence[str]) -> I64:
        """Of all rows for which the condition holds, int64 `(N,)`, ascending."""
        question = where, tuple(values)
        while True:
            with self._lock:
                selection = self._known.get(question)
                if selection is None:
                    # What is committed while it is read is read again: the changes count from here on.
                    selection = _Selection(-1, np.zeros(0, bool))
                    self._known[question] = selection
                    while len(self._known) > REMEMBERED:
                        self._known.popitem(last=False)
                self._known.move_to_end(question)
            with selection.turn:
                if self._bring_up(question, selection):
                    return np.flatnonzero(selection.chosen)

    def _bring_up(self, question: Question, selection: _Selection) -> bool:
        """False where the changes that it lacks are forgotten, and it with them."""
        with self._lock:
            now = self._forgotten + len(self._changes)
            if 0 <= selection.seen < self._forgotten:
                return False
            written = None if selection.seen < 0 else self._changes[selection.seen - self._forgotten :]
        if written is None:
            selection.chosen = _marked(selection.chosen, self._read(*question, None))
        elif written:
            keys = np.unique(np.array(written, np.int64))
            chosen = _marked(selection.chosen, np.array([], np.int64), int(keys[-1]) + 1)
            chosen[keys] = False
            selection.chosen = _marked(chosen, self._read(*question, keys))
        selection.seen = now
        return True

    def _forget(self) -> None:
        self._forgotten += len(self._changes)
        self._changes = []
        self._known.clear()


def _marked(
    chosen: np.ndarray[Any, np.dtype[np.bool_]], keys: I64, size: int = 0
) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """With these keys; longer where they are larger."""
    size = max(size, int(keys.max(initial=-1)) + 1)
    if size > len(chosen):
        chosen = np.concatenate([chosen, np.zeros(size - len(chosen), bool)])
    chosen[keys] = True
    return chosen
