"""What the record of a gallery alone answers, without any index."""

import hashlib
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import numpy as np
import orjson

from patchsight_serve.errors import NotFound, PatchsightError
from patchsight_serve.gallery import Gallery, unknown
from patchsight_serve.item import Identity, Image, check_id
from patchsight_serve.nearest import F32, I64
from patchsight_serve.record import Record
from patchsight_serve.row import Row, rows_in


class RecordedGallery(Gallery):
    """A gallery whose images are in a record."""

    _record: Record

    def holds(self, items: Sequence[tuple[str, str]]) -> list[bool]:
        rows = self._record.find([id for id, _ in items])
        return [id in rows and rows[id].sha256 == sha256 and rows[id].intact for id, sha256 in items]

    def get(self, id: str) -> Image:
        return _image(self._row(id))

    def page(self, after: str = "", limit: int = 100) -> tuple[list[Image], str | None]:
        rows = self._record.page(after, limit + 1)
        more = rows[limit - 1].id if len(rows) > limit else None
        return [_image(row) for row in rows[:limit]], more

    def thumbnail(self, id: str) -> bytes:
        thumbnail = self._record.thumbnail(self._row(id).key)
        if thumbnail is None:
            self._row(id)  # it may have been removed since
            raise NotFound(f"image {id!r} came as a vector, without its picture", param="id")
        return thumbnail

    def original(self, id: str) -> bytes:
        row = self._row(id)
        original = self._record.original(row.key)
        if original is None:
            self.thumbnail(id)
            raise NotFound(f"the original of image {id!r} was not kept; there is its thumbnail", param="id")
        if not isinstance(original, bytes) or hashlib.sha256(original).hexdigest() != row.sha256:
            raise PatchsightError("the stored original is damaged; add the image again with replace=true")
        return original

    def vectors(self, ids: Sequence[str]) -> F32:
        rows = [self._row(id) for id in ids]
        return np.stack([np.frombuffer(row.vector, dtype="<f4").astype(np.float32) for row in rows])

    def fact(self, name: str) -> str | None:
        return self._record.fact(name)

    def _row(self, id: str) -> Row:
        row = self._record.find([check_id(id)]).get(id)
        if row is None:
            raise unknown(id, self.name)
        if not row.intact:
            raise NotFound(f"the row of image {id!r} is damaged; add the image again, or delete it", param="id")
        return row

    def names(self, keys: I64) -> dict[int, tuple[str, str]]:
        return self._record.names(keys.tolist())

    def images(self, keys: I64) -> dict[int, Image]:
        return {key: _image(row) for key, row in self._record.rows(keys.tolist()).items() if row.intact}

    @contextmanager
    def all_rows(self, left: threading.Event, chunk: int) -> Iterator[tuple[Identity | None, Iterator[list[Row]]]]:
        with self.long_read(left) as connection:
            connection.execute("BEGIN")  # one moment for all that is read
            bound = connection.execute("SELECT value FROM facts WHERE name = 'encoder'").fetchone()
            encoder = Identity.read(bound[0]) if bound else None
            yield encoder, ([row for row in rows if row.intact] for rows in rows_in(connection, chunk))

    def labels(self) -> Iterator[list[tuple[int, str]]]:
        return self._record.labels()

    @property
    def record(self) -> Record:
        """What is on the disk, to read from."""
        return self._record

    def long_read(self, left: threading.Event) -> AbstractContextManager[sqlite3.Connection]:
        """As `Record.long_read`."""
        return self._record.long_read(left)


def _image(row: Row) -> Image:
    return Image(row.id, row.label, orjson.loads(row.metadata), row.sha256 or None)
