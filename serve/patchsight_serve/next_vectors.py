"""Vectors of another encoder, beside those that a record has, until all are there and take their place at once."""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from patchsight_serve.embedded_gallery import EmbeddedGallery
from patchsight_serve.errors import InvalidRequest, PatchsightError, Superseded
from patchsight_serve.item import Identity
from patchsight_serve.nearest import F32
from patchsight_serve.record import Record
from patchsight_serve.row import Row, digest, row_checksum

FACT = "next_encoder"  # in the record: whose vectors wait there
CHUNK = 4096  # rows at once


class Todo(NamedTuple):
    """An image whose next vector is not there, and its encoded bytes, or why there are none."""

    row: Row
    original: bytes | PatchsightError


class NextVectors:
    """Of one gallery. Every method may be called from any thread; a kill leaves the gallery as it was, and the vectors
    that are there already."""

    def __init__(self, gallery: EmbeddedGallery, encoder: Identity) -> None:
        """Begin, or go on where another has stopped. Raises what `Gallery` raises."""
        self._gallery, self._encoder = gallery, encoder
        with gallery.writing() as record, record.transaction():
            if record.fact(FACT) != encoder.text:
                record.execute("DELETE FROM next_vectors")
                record.set_fact(FACT, encoder.text)

    def done(self) -> int:
        """How many are there."""
        ((count,),) = self._gallery.record.read("SELECT count(*) FROM next_vectors")
        return int(count)

    def todo(self, after: int, limit: int) -> list[Todo]:
        """Images with a key beyond `after` that wait for theirs, in the order of their keys."""
        keys = self._gallery.record.read(
            "SELECT images.key FROM images LEFT JOIN next_vectors USING (key) "
            "WHERE next_vectors.key IS NULL AND images.key > ? ORDER BY images.key LIMIT ?",
            (after, limit),
        )
        rows = self._gallery.record.rows([key for (key,) in keys])
        return [Todo(rows[key], self._original(rows[key])) for (key,) in keys if key in rows]

    def _original(self, row: Row) -> bytes | PatchsightError:
        original = self._gallery.record.original(row.key)
        if original is None:
            return InvalidRequest("its original was not kept")
        sound = hashlib.sha256(original).hexdigest() == row.sha256
        return original if sound else PatchsightError("its original is damaged")

    def put(self, vectors: Mapping[int, F32]) -> None:
        """Store unit vectors `(D,)` by key; those of images that are gone are not kept."""
        query = "INSERT OR REPLACE INTO next_vectors SELECT key, ?, ? FROM images WHERE key = ?"
        with self._gallery.writing() as record, record.transaction():
            for key, vector in vectors.items():
                data = vector.astype("<f4").tobytes()
                record.execute(query, (data, digest(data), key))

    def take_over(self) -> EmbeddedGallery | None:
        """The gallery with these vectors, if all are there; else None. Whoever holds the gallery of before gets
        Superseded from now on. Readers wait for nothing, writers until it is done.

        Raises StorageFull; then all is as it was.
        """
        error = Superseded(f"gallery {self._gallery.name!r} was embedded anew meanwhile; ask again", param="gallery")
        with self._gallery.writing(long=True) as record:
            if any(todo.row.intact for todo in self._all_todo()) or self._without_damaged(record):
                return None
            index = self._gallery.new_index()
            heir = record.heir()
            try:
                with heir.transaction():
                    for rows, vectors in self._rows(record):
                        for row, vector in zip(rows, vectors, strict=True):
                            data = vector.tobytes()
                            checksum = row_checksum(row.id, row.label, row.metadata, row.sha256, data)
                            heir.execute(
                                "UPDATE images SET vector = ?, checksum = ? WHERE key = ?", (data, checksum, row.key)
                            )
                        index.extend(np.array([row.key for row in rows], dtype=np.int64), vectors)
                    heir.execute("DELETE FROM next_vectors")
                    heir.execute("DELETE FROM facts WHERE name = ?", (FACT,))
                    heir.set_fact("encoder", self._encoder.text)
                    record.retire(error)  # before anybody can read what is committed now
            except BaseException:
                record.retire(None)
                raise
            return self._gallery.heir(heir, index, self._encoder)

    def _all_todo(self) -> Iterator[Todo]:
        after = 0
        while todo := self.todo(after, 100):
            yield from todo
            after = todo[-1].row.key

    def _rows(self, record: Record) -> Iterator[tuple[list[Row], F32]]:
        """Sound rows, as they are now, and their next vectors, float32 `(N, D)`."""
        for found in self._scan(record):
            rows = record.rows([key for key, _, _ in found])
            kept = [(rows[key], vector) for key, vector, _ in found if rows[key].intact]
            if kept:
                flat: Any = np.frombuffer(b"".join(vector for _, vector in kept), dtype="<f4")
                yield [row for row, _ in kept], flat.reshape(len(kept), -1)

    def _without_damaged(self, record: Record) -> bool:
        """Whether there were damaged vectors, which are not there any more."""
        damaged = [key for found in self._scan(record) for key, vector, told in found if digest(vector) != told]
        with record.transaction():
            for key in damaged:
                record.execute("DELETE FROM next_vectors WHERE key = ?", (key,))
        return bool(damaged)

    def _scan(self, record: Record) -> Iterator[list[tuple[int, bytes, bytes]]]:
        after = 0
        query = "SELECT key, vector, checksum FROM next_vectors WHERE key > ? ORDER BY key LIMIT ?"
        while found := record.read(query, (after, CHUNK)):
            yield found
            after = found[-1][0]


def without_original(gallery: EmbeddedGallery) -> int:
    """How many images no other encoder could look at."""
    query = "SELECT count(*) FROM images LEFT JOIN pictures USING (key) WHERE original IS NULL"
    ((count,),) = gallery.record.read(query)
    return int(count)
