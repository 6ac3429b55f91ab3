"""Reads that take long, and the end that they come to when what they read is closed."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class LongReads:
    """Who reads right now. A reader looks at `ended` now and then, and gives up once it is set."""

    def __init__(self) -> None:
        self.ended = False
        self._changed = threading.Condition()
        self._count = 0

    @contextmanager
    def one(self) -> Iterator[None]:
        """Read in the block."""
        with self._changed:
            self._count += 1
        try:
            yield
        finally:
            with self._changed:
                self._count -= 1
                self._changed.notify_all()

    def end(self) -> None:
        """Have all give up, and return when they have."""
        self.ended = True
        with self._changed:
            self._changed.wait_for(lambda: not self._count)
