"""The gallery that needs no other server: its images in a durable record, searched through an index in memory.

The record (SQLite) is the truth; the index (FAISS, in memory) is a cache of it. A writer commits first and changes the
index then, so readers wait for it only while it changes memory, never while it waits for the disk.
"""

import hashlib
import logging
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from pathlib import Path

import numpy as np
import orjson

from patchsight_serve.bulk_add import add_vectors
from patchsight_serve.errors import Conflict, PatchsightError
from patchsight_serve.filters import Filter
from patchsight_serve.gallery import Gallery, check_size, checked_query, chosen_by, other_bytes, unknown
from patchsight_serve.index import EXACT_LIMIT, Index, IndexState
from patchsight_serve.index_file import IndexFile
from patchsight_serve.item import (
    Changes,
    Identity,
    Image,
    Neighbor,
    NewImage,
    NewVector,
    check_id,
    check_label,
    encode_metadata,
)
from patchsight_serve.mending import Seen
from patchsight_serve.nearest import F32, I64
from patchsight_serve.record import Record
from patchsight_serve.recorded_gallery import RecordedGallery

log = logging.getLogger(__name__)


class EmbeddedGallery(RecordedGallery):
    """One in its folder, of this process alone."""

    def __init__(self, folder: Path, keep_originals: bool = True, exact_limit: int = EXACT_LIMIT) -> None:
        """Open `folder/gallery.sqlite`, or create it, and fill the index.

        exact_limit: among as many images, or fewer, a search is exact.

        Raises Conflict where another process has it open, StorageFull, PatchsightError where the file is no record.
        """
        self.name = folder.name
        self.damaged: list[str] = []  # ids whose rows failed their checksum; they are left out of everything
        self._keep_originals = keep_originals
        self._record = Record(folder / "gallery.sqlite")
        self._writing = threading.Lock()  # one writer at a time
        self.busy = False  # with a write that takes seconds or more
        self._exact_limit = exact_limit
        self._index_file = IndexFile(folder / "gallery.index")
        self._index = self.new_index()
        bound = self._record.fact("encoder")
        try:
            self._encoder = Identity.read(bound) if bound else None
        except (TypeError, ValueError):
            raise PatchsightError(f"{self._record.path}: the name of the encoder is damaged: {bound!a}") from None
        self._fill()

    def _fill(self) -> None:
        """Put all intact rows into the index."""
        seen = Seen()
        for rows in self._record.scan():
            sound = seen.sound(rows)
            if sound:
                vectors = np.frombuffer(b"".join(row.vector for row in sound), dtype="<f4").reshape(len(sound), -1)
                self._index.extend(np.array([row.key for row in sound], dtype=np.int64), vectors)
        seen.mend(self._record)
        self.damaged = seen.damaged
        self._index.extend(np.empty(0, np.int64), None, seen.unclear)
        for id in self.damaged:
            log.error("gallery %s: the row of %r is damaged and left out; add the image again", self.name, id)
        self._index.take_up()
        self._index.fit()

    def __len__(self) -> int:
        return len(self._index)

    @property
    def index(self) -> IndexState:
        return self._index.state

    @property
    def encoder(self) -> Identity | None:
        return self._encoder if len(self) else None

    def add(
        self, images: Sequence[NewImage], encoder: Identity, replace: bool = False, facts: dict[str, str] | None = None
    ) -> list[bool | PatchsightError]:
        facts = dict(facts or {})
        if images:
            facts["encoder"] = encoder.text
        outcome: list[bool | PatchsightError] = []
        fresh: dict[int, F32] = {}
        gone: set[int] = set()
        with self._writing:
            self.require(encoder)
            known = self._record.find([image.item.id for image in images])
            latest = {id: (row.key, row.sha256) for id, row in known.items() if row.intact}
            with self._record.transaction():
                for name, value in facts.items():
                    self._record.set_fact(name, value)
                for image in images:
                    id, sha256 = image.item.id, hashlib.sha256(image.data).hexdigest()
                    if id in latest and not replace:
                        outcome.append(False if latest[id][1] == sha256 else other_bytes(id))
                        continue
                    # What goes: the image to replace, or a damaged row.
                    old = latest[id][0] if id in latest else known[id].key if id in known else None
                    if old is not None:
                        self._record.delete(old)
                        gone.add(old)
                    key = self._insert(image, sha256)
                    fresh[key] = image.vector
                    outcome.append(id not in latest)
                    latest[id] = key, sha256
            self._encoder = encoder if images else self._encoder
            self._index.change({key: vector for key, vector in fresh.items() if key not in gone}, gone)
            self.damaged = [id for id in self.damaged if id not in latest]
        return outcome

    def _insert(self, image: NewImage, sha256: str) -> int:
        """Inside a transaction. Returns the key."""
        check_size(image.vector, self.dim, "vectors")
        item, original = image.item, image.data if self._keep_originals else None
        metadata, vector = encode_metadata(item.metadata), image.vector.astype("<f4").tobytes()
        return self._record.insert(item.id, item.label, metadata, sha256, vector, image.thumbnail, original)

    def add_vectors(
        self, batches: Callable[[], Iterable[Sequence[NewVector]]], encoder: Identity, replace: bool = False
    ) -> dict[str, int]:
        return add_vectors(self, batches(), encoder, replace)

    def patch(self, id: str, changes: Changes) -> Image:
        with self._writing:
            row = self._row(id)
            label = check_label(changes["label"]) if "label" in changes else row.label
            metadata = encode_metadata(changes["metadata"]) if "metadata" in changes else row.metadata
            with self._record.transaction():
                self._record.describe(row, label, metadata)
            return self.get(id)

    def delete(self, id: str) -> None:
        with self._writing:
            row = self._record.find([check_id(id)]).get(id)
            if row is None:
                raise unknown(id, self.name)
            with self._record.transaction():
                self._record.delete(row.key)
            self._index.change({}, {row.key})
            self.damaged = [other for other in self.damaged if other != id]

    def neighbors(
        self,
        query: F32,
        k: int = 10,
        *,
        leave_out: Collection[str] = (),
        label: str | Collection[str] | None = None,
        filter: Filter | None = None,
        min_score: float = -1.0,
    ) -> list[Neighbor]:
        query = checked_query(query, k)
        chosen = chosen_by(label, filter)
        left = [row.key for row in self._record.find(list(leave_out)).values()]
        for _ in range(3):  # an image deleted between the two reads leaves a gap: then look again
            only = self._record.select(chosen.where, chosen.values) if chosen else None
            keys, scores = self._index.nearest(query, k, left, only)
            rows = self._record.rows(keys)
            if len(rows) == len(keys):
                break
        ranked = sorted((-float(s), rows[key].id, key) for key, s in zip(keys, scores, strict=True) if key in rows)
        found = [(rows[key], -score) for score, _, key in ranked[:k] if -score >= min_score]
        return [Neighbor(row.id, score, row.label, orjson.loads(row.metadata)) for row, score in found]

    def close(self) -> None:
        with self._writing:
            self._index.close()
            self._index.keep()
            self._record.close()

    def keys(self) -> I64:
        return self._index.keys()

    def snapshot(self) -> tuple[I64, F32]:
        return self._index.snapshot()

    def end(self, error: PatchsightError) -> None:
        with self._writing:
            self._index.close()
            self._record.end(error)

    @contextmanager
    def writing(self, long: bool = False) -> Iterator[Record]:
        """The record, for whoever alone may write to it during the block; `busy` tells of a `long` write."""
        with self._writing:
            before, self.busy = self.busy, self.busy or long
            try:
                yield self._record
            finally:
                self.busy = before

    def new_index(self) -> Index:
        """An empty one, for the other vectors of an heir."""
        return Index(self._exact_limit, self._index_file)

    def heir(self, record: Record, index: Index, encoder: Identity) -> "EmbeddedGallery":
        """This gallery with other vectors, which are in the record already. This one is not used any more."""
        other = copy(self)
        other._record, other._index, other._encoder, other.busy = record, index, encoder, False
        self._index.close()
        index.fit()
        return other

    @property
    def dim(self) -> int | None:
        return self._index.dim

    def commit(self, encoder: Identity, gone: Mapping[str, int], fresh: Iterable[Mapping[int, F32]]) -> None:
        """While `writing`: have in memory what is in the record now. gone: keys by id, in whose place others may be.
        fresh: unit vectors `(D,)` by key."""
        self._encoder = encoder
        self._index.change({}, gone.values())
        for vectors in fresh:
            if vectors:
                self._index.extend(np.array(list(vectors), dtype=np.int64), np.stack(list(vectors.values())))
        self._index.fit()
        self.damaged = [id for id in self.damaged if id not in gone]


def on_disk(gallery: Gallery) -> EmbeddedGallery:
    """The gallery itself, for what only one in a file of its own can do. Raises Conflict."""
    if isinstance(gallery, EmbeddedGallery):
        return gallery
    raise Conflict(f"gallery {gallery.name!r} is not in a file of this server, which this needs", param="gallery")
