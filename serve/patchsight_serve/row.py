"""One image as the record of a gallery has it: a row, which carries a checksum of itself, so that damage is noticed."""

import hashlib
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass

COLUMNS = "key, id, label, metadata, sha256, vector, checksum"


@dataclass(frozen=True)
class Row:
    """One image. metadata: JSON text. sha256: of the encoded image. vector: float32 bytes, a unit vector."""

    key: int
    id: str
    label: str | None
    metadata: str
    sha256: str
    vector: bytes
    checksum: bytes

    @property
    def intact(self) -> bool:
        """Whether the row is what was once written."""
        is_typed = isinstance(self.vector, bytes)  # a flipped bit may make it anything
        return is_typed and self.checksum == row_checksum(self.id, self.label, self.metadata, self.sha256, self.vector)


def row_checksum(id: str, label: str | None, metadata: str, sha256: str, vector: bytes) -> bytes:
    """16 bytes that change with any byte of the row."""
    return digest(repr((id, label, metadata, sha256)).encode() + bytes(vector))


def digest(data: bytes) -> bytes:
    """16 bytes that change with any byte of the data."""
    return hashlib.blake2b(data, digest_size=16).digest()


def to_row(values: tuple) -> Row:  # type: ignore[type-arg]
    """Of the values of `COLUMNS`."""
    return Row(*values)


def rows_in(connection: sqlite3.Connection, chunk: int) -> Iterator[list[Row]]:
    """All rows in the order of their keys, as they were at one moment; in chunks, and without a long list of any."""
    cursor = connection.execute(f"SELECT {COLUMNS} FROM images ORDER BY key")
    while found := cursor.fetchmany(chunk):
        yield [to_row(values) for values in found]
