"""What is done of a work on many images, in one file: a kill at any moment costs what was in work, and no more."""

import errno
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from patchsight_serve.errors import Conflict, InvalidRequest, PatchsightError, StorageFull
from patchsight_serve.nearest import F32

_SCHEMA = """
CREATE TABLE IF NOT EXISTS plan (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS done (row INTEGER PRIMARY KEY, vector BLOB, reason TEXT);
"""
FETCHED = 4096  # rows at once
FULL = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE)


class Done(NamedTuple):
    """An image that was worked on: its row in the source, and its embedding float32 `(D,)`, or why there is none."""

    row: int
    result: F32 | str


class Journal:
    """An SQLite file, written by one thread of one process.

    plan: what the work is, by name. Rows of two plans must not be mixed.

    Raises, and so does every method:
        Conflict: another process works with the file. InvalidRequest: it belongs to another plan, or is no journal.
        StorageFull; what was put before is safe.
    """

    def __init__(self, path: Path, plan: Mapping[str, str]) -> None:
        self.path = path
        with self._explained():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = sqlite3.connect(path, isolation_level=None, timeout=0)
        try:
            with self._explained():
                # Alone, it needs no shared memory, which network file systems do not have. Without a wait for the disk
                # at each commit a power cut costs the last seconds; what is left is whole all the same.
                self._file.execute("PRAGMA locking_mode = EXCLUSIVE")
                self._file.execute("PRAGMA journal_mode = WAL")
                self._file.execute("PRAGMA synchronous = NORMAL")
                self._file.execute("BEGIN IMMEDIATE")
                for statement in _SCHEMA.split(";"):
                    self._file.execute(statement)
                self._begin(plan)
                self._file.execute("COMMIT")
        except BaseException:
            self._file.close()
            raise

    def _begin(self, plan: Mapping[str, str]) -> None:
        before = dict(self._file.execute("SELECT name, value FROM plan"))
        if not before:
            self._file.executemany("INSERT INTO plan VALUES (?, ?)", plan.items())
            return
        other = [name for name in plan if before.get(name) != plan[name]]
        if other:
            name, (count,) = other[0], self._file.execute("SELECT count(*) FROM done").fetchone()
            raise InvalidRequest(
                f"{self.path} holds {count:,} images of a work that was begun with {name} {before.get(name)}, this is "
                f"{name} {plan[name]}; go on as it was begun, or throw them away with --restart"
            )

    def put(self, done: Sequence[Done]) -> None:
        """All of them, or none."""
        rows = [
            (one.row, None, one.result)
            if isinstance(one.result, str)
            else (one.row, one.result.astype("<f4").tobytes(), None)
            for one in done
        ]
        with self._explained():
            self._file.execute("BEGIN")
            try:
                self._file.executemany("INSERT INTO done VALUES (?, ?, ?)", rows)
                self._file.execute("COMMIT")
            except BaseException:
                if self._file.in_transaction:
                    self._file.execute("ROLLBACK")
                raise

    def has(self, count: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Which of `count` rows are done, `(count,)`."""
        found = np.zeros(count, bool)
        with self._explained():
            cursor = self._file.execute("SELECT row FROM done")
            while rows := cursor.fetchmany(FETCHED):
                found[[row for (row,) in rows]] = True
        return found

    def rows(self, where: str = "TRUE") -> Iterator[Done]:
        """All that is done, in the order of the source."""
        with self._explained():
            cursor = self._file.execute(f"SELECT row, vector, reason FROM done WHERE {where} ORDER BY row")
            while rows := cursor.fetchmany(FETCHED):
                for row, vector, reason in rows:
                    yield Done(row, reason if vector is None else np.frombuffer(vector, "<f4").astype(np.float32))

    def bad(self) -> Iterator[Done]:
        """Those that have no embedding, in the order of the source."""
        return self.rows("vector IS NULL")

    def close(self) -> None:
        """Let go of the file."""
        with self._explained():
            self._file.close()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            code = getattr(error, "sqlite_errorcode", None)
            if code == sqlite3.SQLITE_BUSY:
                raise Conflict(f"{self.path}: another process is at this work") from None
            if code == sqlite3.SQLITE_NOTADB:
                raise InvalidRequest(f"{self.path} is no file of ours, or damaged; --restart removes it") from None
            if code in FULL or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                raise StorageFull(f"no space left for {self.path}; what is done is safe: go on when there is") from None
            raise PatchsightError(f"{self.path}: {error}") from error


def discard(path: Path) -> None:
    """Remove a journal, or whatever is in its place, if it is there. Raises Conflict where a process works with it."""
    if path.exists():
        with suppress(InvalidRequest):  # it is none
            Journal(path, {}).close()
        remove(path)


def remove(path: Path) -> None:
    """A journal that nobody works with, if it is there."""
    for beside in ("", "-wal", "-shm"):  # SQLite ignores a log without its file
        path.with_name(path.name + beside).unlink(missing_ok=True)
