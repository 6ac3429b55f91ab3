"""A gallery: images with vectors of one encoder, kept in a durable record, searched through an index.

The record (SQLite) is the truth; the index (FAISS, in memory) is a cache of it. A writer commits first and changes the
index then, so readers wait for it only while it changes memory, never while it waits for the disk.
"""

import hashlib
import logging
import sqlite3
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import copy
from pathlib import Path

import numpy as np
import orjson

from patchsight_serve.errors import Conflict, InvalidRequest, NotFound, PatchsightError
from patchsight_serve.filters import Filter
from patchsight_serve.index import EXACT_LIMIT, Index, IndexState
from patchsight_serve.index_file import IndexFile
from patchsight_serve.item import (
    Changes,
    Identity,
    Image,
    Neighbor,
    NewImage,
    check_id,
    check_label,
    encode_metadata,
)
from patchsight_serve.mending import Seen
from patchsight_serve.nearest import F32, I64, normalize
from patchsight_serve.record import Record, Row

log = logging.getLogger(__name__)

MAX_K = 1000


class Gallery:
    """One named gallery in its folder. Every method may be called from any thread."""

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
            self._encoder = Identity(**orjson.loads(bound)) if bound else None
        except (TypeError, ValueError):
            raise PatchsightError(f"{self._record.path}: the name of the encoder is damaged: {bound!a}") from None
        self._fill()

    def _fill(self) -> None:
        """Put all intact rows into the index, or bring the one that was kept to them."""
        kept = self._index_file.read(self._sound(), self._exact_limit + 1)
        if kept is not None:
            self._index.adopt(kept.index, kept.plan, kept=not kept.changed)
        else:
            for keys, vectors in self._sound():
                self._index.extend(keys, vectors)
        self._seen.mend(self._record)
        self.damaged = self._seen.damaged
        if self._seen.unclear:
            self._index.extend(np.empty(0, np.int64), None, self._seen.unclear)
        for id in self.damaged:
            log.error("gallery %s: the row of %r is damaged and left out; add the image again", self.name, id)
        self._index.fit()

    def _sound(self) -> Iterator[tuple[I64, F32]]:
        """Keys and vectors of all sound rows, in chunks."""
        self._seen = Seen()
        for rows in self._record.scan():
            sound = self._seen.sound(rows)
            if sound:
                vectors = np.frombuffer(b"".join(row.vector for row in sound), dtype="<f4").reshape(len(sound), -1)
                yield np.array([row.key for row in sound], dtype=np.int64), vectors

    def __len__(self) -> int:
        """Number of indexed images."""
        return len(self._index)

    @property
    def index(self) -> IndexState:
        """How searches are answered right now."""
        return self._index.state

    @property
    def encoder(self) -> Identity | None:
        """The encoder this gallery is bound to; an empty gallery is free."""
        return self._encoder if len(self) else None

    def require(self, encoder: Identity) -> None:
        """Raises Conflict unless vectors of that encoder belong here."""
        bound = self.encoder
        if bound is not None and bound != encoder:
            raise Conflict(
                f"gallery {self.name!r} holds vectors of encoder {bound.name!r} (sha256 {bound.sha256[:12]}…), not of "
                f"{encoder.name!r} (sha256 {encoder.sha256[:12]}…); use another gallery for it",
                param="encoder",
            )

    def holds(self, items: Sequence[tuple[str, str]]) -> list[bool]:
        """For each (id, sha256) whether just that image is indexed, so that it need not be embedded again."""
        rows = self._record.find([id for id, _ in items])
        return [id in rows and rows[id].sha256 == sha256 and rows[id].intact for id, sha256 in items]

    def add(
        self, images: Sequence[NewImage], encoder: Identity, replace: bool = False, facts: dict[str, str] | None = None
    ) -> list[bool | PatchsightError]:
        """Add images, durably once this returns. For each: True if it is new, False if it was there already, or
        Conflict if its id has other bytes.

        An image that is there already keeps its label and metadata, unless `replace` is set. facts: stored with the
        images, or not at all. Raises Conflict (another encoder) and StorageFull; then nothing was stored.
        """
        facts = dict(facts or {})
        if images:
            facts["encoder"] = orjson.dumps(encoder._asdict()).decode()
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
                        outcome.append(False if latest[id][1] == sha256 else _other_bytes(id))
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
        if self._index.dim not in (None, image.vector.size):
            message = f"a vector has {image.vector.size} values, those of the gallery have {self._index.dim}"
            raise InvalidRequest(message, param="vectors")
        item, original = image.item, image.data if self._keep_originals else None
        metadata, vector = encode_metadata(item.metadata), image.vector.astype("<f4").tobytes()
        return self._record.insert(item.id, item.label, metadata, sha256, vector, image.thumbnail, original)

    def get(self, id: str) -> Image:
        """Raises NotFound."""
        return _image(self._row(id))

    def page(self, after: str = "", limit: int = 100) -> tuple[list[Image], str | None]:
        """Up to `limit` images in the order of their ids, those behind the id `after`; and what to pass as `after` for
        the rest, None at the end."""
        rows = self._record.page(after, limit + 1)
        more = rows[limit - 1].id if len(rows) > limit else None
        return [_image(row) for row in rows[:limit]], more

    def thumbnail(self, id: str) -> bytes:
        """JPEG bytes. Raises NotFound, also where the image came without its picture."""
        thumbnail = self._record.thumbnail(self._row(id).key)
        if thumbnail is None:
            self._row(id)  # it may have been removed since
            raise NotFound(f"image {id!r} came as a vector, without its picture", param="id")
        return thumbnail

    def original(self, id: str) -> bytes:
        """The encoded image as it came. Raises NotFound, also where it was not kept; PatchsightError if it is
        damaged."""
        row = self._row(id)
        original = self._record.original(row.key)
        if original is None:
            self.thumbnail(id)
            raise NotFound(f"the original of image {id!r} was not kept; there is its thumbnail", param="id")
        if not isinstance(original, bytes) or hashlib.sha256(original).hexdigest() != row.sha256:
            raise PatchsightError("the stored original is damaged; add the image again with replace=true")
        return original

    def patch(self, id: str, changes: Changes) -> Image:
        """Change label or metadata, durably. Raises NotFound, InvalidRequest, StorageFull."""
        with self._writing:
            row = self._row(id)
            label = check_label(changes["label"]) if "label" in changes else row.label
            metadata = encode_metadata(changes["metadata"]) if "metadata" in changes else row.metadata
            with self._record.transaction():
                self._record.describe(row, label, metadata)
            return self.get(id)

    def delete(self, id: str) -> None:
        """Remove an image, also one whose row is damaged, durably. Raises NotFound, StorageFull."""
        with self._writing:
            row = self._record.find([check_id(id)]).get(id)
            if row is None:
                raise _unknown(id, self.name)
            with self._record.transaction():
                self._record.delete(row.key)
            self._index.change({}, {row.key})
            self.damaged = [other for other in self.damaged if other != id]

    def vectors(self, ids: Sequence[str]) -> F32:
        """Unit vectors float32 `(N, D)` of indexed images. Raises NotFound."""
        rows = [self._row(id) for id in ids]
        return np.stack([np.frombuffer(row.vector, dtype="<f4").astype(np.float32) for row in rows])

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
        """The `k` most similar images by cosine, best first, equal scores in the order of their ids; of a large
        gallery, those of them that an approximate index finds.

        query: float `(D,)`, of any length but 0. leave_out: ids not to be found. label: only images of this label, or
        of one of these. filter: only images with such metadata. Where k of them exist, k are found. min_score: only
        scores from this on.

        Raises:
            InvalidRequest: k outside 1 to 1000, too many labels, or a query of another size, of length 0, or with NaN.
        """
        if not 1 <= k <= MAX_K:
            raise InvalidRequest(f"k is {k}, it must be 1 to {MAX_K}", param="k")
        query = normalize(query)
        chosen = _chosen(label, filter)
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

    def fact(self, name: str) -> str | None:
        """A fact that was stored with `add`."""
        return self._record.fact(name)

    def _row(self, id: str) -> Row:
        row = self._record.find([check_id(id)]).get(id)
        if row is None:
            raise _unknown(id, self.name)
        if not row.intact:
            raise NotFound(f"the row of image {id!r} is damaged; add the image again, or delete it", param="id")
        return row

    def close(self) -> None:
        """Wait for the writer, then let go of the files."""
        with self._writing:
            self._index.close()
            self._index.keep()
            self._record.close()

    def keys(self) -> I64:
        """Keys of all indexed images, int64 `(N,)`, ascending. A key names one vector for ever."""
        return self._index.keys()

    def snapshot(self) -> tuple[I64, F32]:
        """Those keys and their unit vectors float32 `(N, D)`, a copy; writers hardly wait for it."""
        return self._index.snapshot()

    def names(self, keys: I64) -> dict[int, tuple[str, str]]:
        """Id and sha256 of those keys that are still there."""
        return self._record.names(keys.tolist())

    def images(self, keys: I64) -> dict[int, Image]:
        """The images of those keys that are still there and intact."""
        return {key: _image(row) for key, row in self._record.rows(keys.tolist()).items() if row.intact}

    def labels(self) -> Iterator[list[tuple[int, str]]]:
        """Keys and labels of all images that have one, in the order of their keys, in chunks."""
        return self._record.labels()

    def end(self, error: PatchsightError) -> None:
        """As `close`, for good: whoever still holds this gallery, and asks it for something, gets `error`."""
        with self._writing:
            self._index.close()
            self._record.end(error)

    @property
    def record(self) -> Record:
        """What is on the disk, to read from."""
        return self._record

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
        return Index(self._exact_limit, self._index_file.write)

    def heir(self, record: Record, index: Index, encoder: Identity) -> "Gallery":
        """This gallery with other vectors, which are in the record already. This one is not used any more."""
        other = copy(self)
        other._record, other._index, other._encoder, other.busy = record, index, encoder, False
        self._index.close()
        index.fit()
        return other

    def long_read(self, left: threading.Event) -> AbstractContextManager[sqlite3.Connection]:
        """As `Record.long_read`."""
        return self._record.long_read(left)

    @property
    def dim(self) -> int | None:
        """Numbers per vector; None while it is empty."""
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


def _image(row: Row) -> Image:
    return Image(row.id, row.label, orjson.loads(row.metadata), row.sha256 or None)


def _chosen(label: str | Collection[str] | None, filter: Filter | None) -> Filter | None:
    """One filter for both; None chooses from all."""
    if label is None:
        return filter
    labels = Filter.labels([label] if isinstance(label, str) else label)
    return labels & filter if filter else labels


def _unknown(id: str, gallery: str) -> NotFound:
    return NotFound(f"no image {id!r} in gallery {gallery!r}", param="id")


def _other_bytes(id: str) -> Conflict:
    return Conflict(f"id {id!r} is taken by an image with other bytes; replace=true replaces it", param="id")
