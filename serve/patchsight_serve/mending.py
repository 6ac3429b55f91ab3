"""What of a record is sound, looked over at each start.

Every row has a checksum; its key and what leads to it have none. So keys must be in order; and SQLite's own indexes are
compared with the rows, and made anew where they say something else: a flipped byte there would hide images, or find
them under labels that they do not have.
"""

import logging
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

from patchsight_serve.errors import PatchsightError
from patchsight_serve.record import Record
from patchsight_serve.row import Row

log = logging.getLogger(__name__)

_INDEXES = {"id": "sqlite_autoindex_images_1", "label": "images_by_label"}
_CHUNK = 10_000
_WORD = 2**64


class Seen:
    """The rows of a record, of which 64 bits are kept for each index: they differ where one id, label or key does.

    damaged: ids of rows that are not sound. unclear: keys that name nothing, as two rows may have them.
    """

    def __init__(self) -> None:
        self.damaged: list[str] = []
        self.unclear: set[int] = set()
        self._sums = dict.fromkeys(_INDEXES, 0)

    def sound(self, rows: list[Row]) -> list[Row]:
        """Those of the next rows that are; all come in the order in which they are stored."""
        for row in rows:
            self._add("id", row.key, row.id)
            if row.label is not None:
                self._add("label", row.key, row.label)
        falls = np.diff([row.key for row in rows]) <= 0
        strange = np.append(falls, False) | np.append(False, falls)  # one of the two is what it was
        self.unclear |= {row.key for row, s in zip(rows, strange, strict=True) if s}
        sound = [row for row, s in zip(rows, strange, strict=True) if row.intact and not s]
        if len(sound) < len(rows):
            kept = {id(row) for row in sound}
            self.damaged += [str(row.id) for row in rows if id(row) not in kept]
        return sound

    def _add(self, column: str, key: int, value: Any) -> None:
        self._sums[column] = (self._sums[column] + hash((key, value))) % _WORD

    def mend(self, record: Record) -> None:
        """Make those indexes of the record anew that hold anything else than its rows. Images that only an index still
        knows are damaged, too."""
        self.damaged += [str(row.id) for row in record.rows(sorted(self.unclear)).values()]
        for column, index in _INDEXES.items():
            if self._matches(record, column):
                continue
            log.error("%s: the index of the images' %s is damaged, and made anew", record.path, column)
            if column == "id":
                self.damaged += _lost(record)
            try:
                with record.transaction():
                    record.execute(f"REINDEX {index}")
            except PatchsightError as error:  # a full disk: what is intact is still answered
                log.error("%s: it cannot be made anew: %s", record.path, error)
        self.damaged = list(dict.fromkeys(self.damaged))

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
