"""A lock that many readers share and one writer takes alone; a waiting writer goes first."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class SharedLock:
    """`with lock.shared():` to read, `with lock.alone():` to write. Not reentrant."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._readers = 0
        self._waiting = 0
        self._writing = False

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Hold together with other readers."""
        with self._changed:
            # New readers queue behind a waiting writer, or a steady stream of them would starve it.
            self._changed.wait_for(lambda: not self._writing and not self._waiting)
            self._readers += 1
        try:
            yield
        finally:
            with self._changed:
                self._readers -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold with no reader and no other writer beside."""
        with self._changed:
            self._waiting += 1
            try:
                self._changed.wait_for(lambda: not self._writing and not self._readers)
                self._writing = True
            finally:
                self._waiting -= 1
        try:
            yield
        finally:
            with self._changed:
                self._writing = False
                self._changed.notify_all()
