"""Where files lie that are no gallery yet, or none any more. Nothing in here outlives its process for long: what one
that was killed left behind, the next one removes."""

import errno
import os
import secrets
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from patchsight_serve.errors import StorageFull
from patchsight_serve.lock import locked

FULL = (errno.ENOSPC, errno.EDQUOT)


class Scratch:
    """Folders of this process below `parent`, on the file system of the galleries: a rename brings a file in or out.

    Each process has a folder of its own, and holds it locked; one whose lock is free belongs to nobody any more.
    """

    def __init__(self, parent: Path) -> None:
        self._parent = parent
        self._own: Path | None = None  # made when it is needed
        self._lock: int | None = None
        self._making = threading.Lock()

    def clear(self) -> None:
        """Remove what processes left that are gone."""
        for folder in self._parent.iterdir() if self._parent.is_dir() else ():
            lock = locked(folder)
            if lock is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(lock)

    def make(self) -> Path:
        """A new folder, for `remove`. Raises StorageFull."""
        with told("the files of a gallery"):
            folder = self._home() / secrets.token_hex(8)
            folder.mkdir()
            return folder

    def remove(self, folder: Path) -> None:
        """A folder that `make` made, with all that is in it."""
        shutil.rmtree(folder, ignore_errors=True)

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """A new folder for the block. Raises StorageFull."""
        folder = self.make()
        try:
            yield folder
        finally:
            self.remove(folder)

    def _home(self) -> Path:
        with self._making:
            while self._own is None:
                folder = self._parent / secrets.token_hex(8)
                folder.mkdir(parents=True)
                lock = locked(folder)
                if lock is not None and folder.is_dir():  # else another process was quicker, and removed it
                    self._own, self._lock = folder, lock
                elif lock is not None:
                    os.close(lock)
            return self._own

    def close(self) -> None:
        """Remove the folder of this process."""
        with self._making:
            if self._own is not None and self._lock is not None:
                shutil.rmtree(self._own, ignore_errors=True)
                os.close(self._lock)
                self._own = self._lock = None


@contextmanager
def told(what: str) -> Iterator[None]:
    """A disk without space as StorageFull, which says for what there is none."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise StorageFull(f"no space left for {what}; nothing of this request was stored") from error
        raise
