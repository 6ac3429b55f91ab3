"""The durable record of a gallery: one SQLite file. What it has committed survives a kill and a power cut.

A key names one vector for as long as a `Gallery` lives: keys are never used twice, a replaced image gets a new one, and
after another encoder has taken over there is another `Gallery`. Every row carries a checksum of itself, so a damaged
one is noticed. Pictures lie in their own table, which keeps reading all vectors fast.
"""

import errno
import json
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from pathlib import Path

import numpy as np

from patchsight_serve.errors import PatchsightError, StorageFull
from patchsight_serve.long_reads import LongReads
from patchsight_serve.nearest import I64
from patchsight_serve.record_file import NEW, SCHEMA, VERSION, connect, lock_out_others
from patchsight_serve.row import COLUMNS, Row, digest, row_checksum, to_row
from patchsight_serve.selections import Selections

_CHUNK = 500  # values per query: SQLite takes 999 variables in old builds
STEPS = 10_000  # of SQLite between two looks whether a long read is still wanted: a millisecond or less


class Record:
    """The file at `path`, created if missing. One process at a time; one writer and any number of readers in it."""

    def __init__(self, path: Path) -> None:
        """Raises Conflict if another process has it open, PatchsightError if it is no gallery we can read,
        StorageFull."""
        self.path = path
        self._ended: PatchsightError | None = None
        self._long_reads = LongReads()
        self._selections = Selections(self._holding)
        self._written: list[int] = []  # keys, in the transaction
        with self._explained():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = lock_out_others(path.with_suffix(".lock"))
            try:
                self._writer = connect(self.path)
                version = self._writer.execute("PRAGMA user_version").fetchone()[0]
                if version not in (0, VERSION):
                    raise PatchsightError(
                        f"{path}: written by a newer patchsight (format {version}, we read {VERSION})"
                    )
                self._writer.executescript(SCHEMA if version else NEW)
                self._reader = connect(self.path)
            except BaseException:
                self._lock.close()
                raise
        self._reading = threading.Lock()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """SQLite's and the system's errors in our words."""
        if self._ended is not None:
            raise copy(self._ended)
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            if self._ended is not None:
                raise copy(self._ended) from None
            code = getattr(error, "sqlite_errorcode", None)
            full = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_SHMSIZE)
            if code in full or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                message = f"no space left for gallery {self.path.parent.name!r}; nothing of this request was stored"
                raise StorageFull(message) from error
            raise PatchsightError(f"{self.path}: {error}") from error

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Commit what the block writes, durably and as a whole, or nothing of it. One thread at a time (the caller's
        part). Raises StorageFull."""
        with self._explained():
            self._writer.execute("BEGIN IMMEDIATE")
            self._written = []
            try:
                yield
                self._writer.execute("COMMIT")
                self._selections.changed(self._written)
            except BaseException:
                if self._writer.in_transaction:  # after some errors SQLite has rolled back on its own
                    self._writer.execute("ROLLBACK")
                raise

    def fact(self, name: str) -> str | None:
        """A fact about the gallery as a whole."""
        found = self.read("SELECT value FROM facts WHERE name = ?", (name,))
        return found[0][0] if found else None

    def set_fact(self, name: str, value: str) -> None:
        """Inside a transaction."""
        self._writer.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, value))

    def insert(
        self, id: str, label: str | None, metadata: str, sha256: str, vector: bytes, thumbnail: bytes,
        original: bytes | None,
    ) -> int:  # fmt: skip
        """Inside a transaction. Returns the new key."""
        key = self.insert_bare(id, label, metadata, sha256, vector)
        self._writer.execute("INSERT INTO pictures VALUES (?, ?, ?, ?)", (key, thumbnail, digest(thumbnail), original))
        return key

    def describe(self, row: Row, label: str | None, metadata: str) -> None:
        """Give a row another label and metadata, inside a transaction."""
        checksum = row_checksum(row.id, label, metadata, row.sha256, row.vector)
        change = "UPDATE images SET label = ?, metadata = ?, checksum = ? WHERE key = ?"
        self._writer.execute(change, (label, metadata, checksum, row.key))
        self._written.append(row.key)

    def delete(self, key: int) -> None:
        """Inside a transaction."""
        self._writer.execute("DELETE FROM images WHERE key = ?", (key,))
        self._written.append(key)

    def find(self, ids: Sequence[str]) -> dict[str, Row]:
        """The rows, damaged ones too, of those ids that are there."""
        return {row.id: row for row in map(to_row, self._find("id", ids))}

    def rows(self, keys: Sequence[int]) -> dict[int, Row]:
        """The rows of those keys that are there."""
        return {row.key: row for row in map(to_row, self._find("key", keys))}

    def _find(self, column: str, values: Sequence[str | int], wanted: str = COLUMNS) -> Iterator[tuple]:  # type: ignore[type-arg]
        for start in range(0, len(values), _CHUNK):
            some = values[start : start + _CHUNK]
            marks = ",".join("?" * len(some))
            yield from self.read(f"SELECT {wanted} FROM images WHERE {column} IN ({marks})", some)

    def page(self, after: str, limit: int) -> list[Row]:
        """Up to `limit` intact rows in the order of their ids, those behind the id `after`."""
        query, wanted = f"SELECT {COLUMNS} FROM images WHERE id > ? ORDER BY id LIMIT ?", limit
        while True:
            found = [to_row(values) for values in self.read(query, (after, wanted))]
            sound = [row for row in found if row.intact]
            if len(sound) >= limit or len(found) < wanted:
                return sound[:limit]
            wanted *= 2  # and not from the last one on: a damaged id says nothing of where it stands

    def scan(self, chunk: int = 10_000) -> Iterator[list[Row]]:
        """All rows in the order of their keys, in chunks."""
        for found in self._scan(COLUMNS, "TRUE", chunk):
            yield [to_row(values) for values in found]

    def _scan(self, wanted: str, where: str, chunk: int) -> Iterator[list[tuple]]:  # type: ignore[type-arg]
        """wanted: columns, the key first."""
        query, last = f"SELECT {wanted} FROM images WHERE key > ? AND {where} ORDER BY key LIMIT ?", -1
        while found := self.read(query, (last, chunk)):
            yield found
            before, last = last, max(key for key, *_ in found)
            if last <= before:  # a flipped bit: there would be no end
                raise PatchsightError(f"{self.path}: the file is damaged: its keys are not in order")

    def select(self, where: str, values: Sequence[str]) -> I64:
        """Keys of all rows for which a condition holds, ascending."""
        return self._selections.keys(where, values)

    def _holding(self, where: str, values: Sequence[str], among: I64 | None) -> I64:
        """Keys, of all rows or of some, for which a condition holds.

        On a connection of its own: it may have to read every row, and must not hold up those who want one.
        """
        some = "TRUE" if among is None else "key IN (SELECT value FROM json_each(?))"
        given = [] if among is None else [json.dumps(among.tolist())]
        with self.long_read(threading.Event()) as connection:
            found = connection.execute(f"SELECT key FROM images WHERE {some} AND ({where})", (*given, *values))
            return np.fromiter((key for (key,) in found), np.int64)

    def thumbnail(self, key: int) -> bytes | None:
        """JPEG bytes. Raises PatchsightError if they are damaged."""
        found = self.read("SELECT thumbnail, checksum FROM pictures WHERE key = ?", (key,))
        if found and (not isinstance(found[0][0], bytes) or digest(found[0][0]) != found[0][1]):
            raise PatchsightError("the stored thumbnail is damaged; add the image again with replace=true")
        return found[0][0] if found else None

    def original(self, key: int) -> bytes | None:
        """The encoded image as it came, or None where originals are not kept."""
        found = self.read("SELECT original FROM pictures WHERE key = ?", (key,))
        return found[0][0] if found else None

    def read(self, query: str, values: Sequence[str | int] = ()) -> list[tuple]:  # type: ignore[type-arg]
        """What is committed, by any query; a writer at work does not hold this up."""
        with self._explained(), self._reading:
            return self._reader.execute(query, values).fetchall()

    def close(self) -> None:
        """Fold the write-ahead log into the file and let go of it."""
        self._long_reads.end()
        with self._reading:
            self._reader.close()
        self._writer.close()
        self._lock.close()

    def names(self, keys: Sequence[int]) -> dict[int, tuple[str, str]]:
        """Id and sha256 of those keys that are there: what of a key never changes, beside its vector."""
        return {key: (id, sha256) for key, id, sha256 in self._find("key", keys, "key, id, sha256")}

    def labels(self, chunk: int = 10_000) -> Iterator[list[tuple[int, str]]]:
        """Keys and labels of all rows that have one, in the order of their keys, in chunks."""
        yield from self._scan("key, label", "label IS NOT NULL", chunk)

    def insert_bare(self, id: str, label: str | None, metadata: str, sha256: str, vector: bytes) -> int:
        """As `insert`, of an image whose picture is not here; sha256 may be empty then."""
        values = (id, label, metadata, sha256, vector, row_checksum(id, label, metadata, sha256, vector))
        columns = COLUMNS.removeprefix("key, ")
        key = self._writer.execute(f"INSERT INTO images ({columns}) VALUES (?, ?, ?, ?, ?, ?)", values).lastrowid
        assert key is not None
        self._written.append(key)
        return key

    @contextmanager
    def long_read(self, left: threading.Event) -> Iterator[sqlite3.Connection]:
        """A connection of its own, for what takes long: it holds up nobody, and nobody it. What it is asked ends with
        an error once `left` is set, or the record is closed, which waits for the block."""
        with self._explained(), self._long_reads.one():
            if self._long_reads.ended:
                raise sqlite3.ProgrammingError("the record is closed")
            connection = connect(self.path)
            try:
                connection.set_progress_handler(lambda: left.is_set() or self._long_reads.ended, STEPS)
                yield connection
            finally:
                connection.close()

    def end(self, error: PatchsightError) -> None:
        """Close for good: whoever still asks gets `error`. One thread at a time, with no transaction begun."""
        self._ended = error
        self.close()

    def execute(self, change: str, values: Sequence[str | int | bytes] = ()) -> None:
        """A change of one's own, inside a transaction."""
        self._writer.execute(change, values)

    def heir(self) -> "Record":
        """The same file and connections once more, for when this record is retired."""
        return copy(self)

    def retire(self, error: PatchsightError | None) -> None:
        """As `end`, and leave the file to the heir. None takes it back."""
        self._ended = error
