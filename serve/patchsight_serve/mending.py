"""SQLite's own indexes of a record, compared with its rows at each start, and made anew where they say something else.

Every row has a checksum; what leads to a row has none. A flipped byte there would hide images, or find them under
labels that they do not have.
"""

import logging
import threading
from collections.abc import Iterator
from typing import Any

from patchsight_serve.errors import PatchsightError
from patchsight_serve.record import Record, Row

log = logging.getLogger(__name__)

_INDEXES = {"id": "sqlite_autoindex_images_1", "label": "images_by_label"}
_CHUNK = 10_000
_WORD = 2**64


class Seen:
    """The rows of a record, of which 64 bits are kept for each index: they differ where one id, label or key does."""

    def __init__(self) -> None:
        self._sums = dict.fromkeys(_INDEXES, 0)

    def add(self, row: Row) -> None:
        self._add("id", row.key, row.id)
        if row.label is not None:
            self._add("label", row.key, row.label)

    def _add(self, column: str, key: int, value: Any) -> None:
        self._sums[column] = (self._sums[column] + hash((key, value))) % _WORD

    def mend(self, record: Record) -> list[str]:
        """Make those indexes of the record anew that hold anything else than its rows. Returns the ids of images whose
        rows are lost, which an index still knew."""
        lost: list[str] = []
        for column, index in _INDEXES.items():
            if self._matches(record, column):
                continue
            log.error("%s: the index of the images' %s is damaged, and made anew", record.path, column)
            if column == "id":
                lost = _lost(record)
            try:
                with record.transaction():
                    record.execute(f"REINDEX {index}")
            except PatchsightError as error:  # a full disk: what is intact is still answered
                log.error("%s: it cannot be made anew: %s", record.path, error)
        return lost

    def _matches(self, record: Record, column: str) -> bool:
        found = Seen()
        try:
            for key, value in _entries(record, column):
                found._add(column, key, value)
        except PatchsightError:  # SQLite cannot read it to its end
            return False
        return found._sums[column] == self._sums[column]


def _entries(record: Record, column: str) -> Iterator[tuple[int, Any]]:
    """Keys and values, from the index alone."""
    query = f"SELECT key, {column} FROM images INDEXED BY {_INDEXES[column]} WHERE {column} IS NOT NULL"
    with record.long_read(threading.Event()) as connection:
        cursor = connection.execute(query)
        while found := cursor.fetchmany(_CHUNK):
            yield from found


def _lost(record: Record) -> list[str]:
    """Ids that the index has, as far as it can be read, and no row."""
    there: dict[int, str] = {row.key: row.id for rows in record.scan() for row in rows}
    ids, lost = set(there.values()), []
    try:
        for key, id in _entries(record, "id"):
            if key not in there and id not in ids:
                lost.append(str(id))
    except PatchsightError:
        pass
    return lost
