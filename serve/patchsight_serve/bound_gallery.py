"""What a gallery on Milvus answers without a search, and without writing anything."""

import base64
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager

import numpy as np

from patchsight_serve.errors import NotFound
from patchsight_serve.gallery import Gallery, unknown
from patchsight_serve.item import Identity, Image, check_id
from patchsight_serve.milvus_binding import Binding
from patchsight_serve.milvus_collection import DESCRIPTION, between_ids, possible, stored, to_image
from patchsight_serve.milvus_connection import Fields
from patchsight_serve.nearest import F32, I64
from patchsight_serve.row import Row


class BoundGallery(Gallery):
    """A gallery whose images are in the collection of a binding."""

    _binding: Binding

    def __len__(self) -> int:
        return self._binding.count()

    @property
    def encoder(self) -> Identity | None:
        bound = self._binding.bound()
        return bound.encoder if bound else None

    @property
    def dim(self) -> int | None:
        bound = self._binding.bound()
        return bound.dim if bound else None

    def holds(self, items: Sequence[tuple[str, str]]) -> list[bool]:
        known = self._find([id for id, _ in items], ("id", "sha256"))
        return [id in known and known[id]["sha256"] == sha256 for id, sha256 in items]

    def get(self, id: str) -> Image:
        return to_image(self._row(id, DESCRIPTION))

    def page(self, after: str = "", limit: int = 100) -> tuple[list[Image], str | None]:
        rows = [
            row for rows in self._binding.scan(f'id > "{between_ids(after)}"', DESCRIPTION, limit + 1) for row in rows
        ]
        return [to_image(row) for row in rows[:limit]], rows[limit - 1]["id"] if len(rows) > limit else None

    def thumbnail(self, id: str) -> bytes:
        thumbnail = self._row(id, ("thumbnail",))["thumbnail"]
        if not thumbnail:
            raise NotFound(f"image {id!r} came as a vector, without its picture", param="id")
        return base64.b64decode(thumbnail)

    def original(self, id: str) -> bytes:
        self.thumbnail(id)
        raise NotFound(f"the original of image {id!r} was not kept; there is its thumbnail", param="id")

    def vectors(self, ids: Sequence[str]) -> F32:
        known = self._find([check_id(id) for id in ids], ("id", "vector"))
        for id in ids:
            if id not in known:
                raise unknown(id, self.name)
        return np.array([known[id]["vector"] for id in ids], np.float32)

    def fact(self, name: str) -> str | None:
        return self._binding.fact(name)

    def keys(self) -> I64:
        chunks = [[row["key"] for row in rows] for rows in self._binding.scan("", ("key",))]
        return np.sort(np.array([key for chunk in chunks for key in chunk], np.int64))

    def snapshot(self) -> tuple[I64, F32]:
        keys: list[I64] = [np.empty(0, np.int64)]
        vectors: list[F32] = [np.empty((0, self.dim or 0), np.float32)]
        for rows in self._binding.scan("", ("key", "vector")):
            keys.append(np.array([row["key"] for row in rows], np.int64))
            vectors.append(np.array([row["vector"] for row in rows], np.float32))
        every = np.concatenate(keys)
        order = np.argsort(every)
        return every[order], np.concatenate(vectors)[order]

    def names(self, keys: I64) -> dict[int, tuple[str, str]]:
        rows = self._binding.find("key", keys.tolist(), ("key", "id", "sha256"))
        return {row["key"]: (row["id"], row["sha256"]) for row in rows}

    def images(self, keys: I64) -> dict[int, Image]:
        rows = self._binding.find("key", keys.tolist(), ("key", *DESCRIPTION))
        return {row["key"]: to_image(row) for row in rows}

    def labels(self) -> Iterator[list[tuple[int, str]]]:
        for rows in self._binding.scan('label != ""', ("key", "label")):
            yield [(row["key"], row["label"]) for row in rows]

    @contextmanager
    def all_rows(self, left: threading.Event, chunk: int) -> Iterator[tuple[Identity | None, Iterator[list[Row]]]]:
        yield self.encoder, (list(map(stored, rows)) for rows in self._scan(left, chunk))

    def _scan(self, left: threading.Event, chunk: int) -> Iterator[list[Fields]]:
        for rows in self._binding.scan("", ("key", *DESCRIPTION, "vector"), chunk=chunk):
            if left.is_set():
                raise CancelledError
            yield rows

    def _find(self, ids: Sequence[str], fields: Sequence[str]) -> dict[str, Fields]:
        """The rows of those ids that are there."""
        return {row["id"]: row for row in self._binding.find("id", possible(ids), fields)}

    def _row(self, id: str, fields: Sequence[str]) -> Fields:
        row = self._find([check_id(id)], ("id", *fields)).get(id)
        if row is None:
            raise unknown(id, self.name)
        return row
