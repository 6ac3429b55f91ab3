"""A gallery on Milvus. It keeps nothing here but what never changes: any number of gateways may have the same one open,
and each finds what another was told is stored.
"""

import hashlib
import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import numpy as np
import orjson

from patchsight_serve.bound_gallery import BoundGallery
from patchsight_serve.errors import InvalidRequest, PatchsightError
from patchsight_serve.filters import Filter
from patchsight_serve.gallery import check_size, checked_query, chosen_by, other_bytes
from patchsight_serve.index import IndexState
from patchsight_serve.item import (
    Changes,
    Identity,
    Image,
    Neighbor,
    NewImage,
    NewVector,
    check_label,
    encode_metadata,
)  # fmt: skip
from patchsight_serve.milvus_binding import Binding
from patchsight_serve.milvus_bulk_add import add_vectors
from patchsight_serve.milvus_collection import (
    ALL,
    encoded,
    new_key,
    possible,
    to_image,
    to_row,
)  # fmt: skip
from patchsight_serve.milvus_filter import expression
from patchsight_serve.milvus_search import search
from patchsight_serve.nearest import F32


class MilvusGallery(BoundGallery):
    """One that need not exist yet: its first image makes it. Originals are not kept."""

    def __init__(self, binding: Binding, name: str) -> None:
        self.name, self.busy = name, False
        self.damaged = []  # Milvus has checksums of its own
        self._binding = binding
        self._writing = threading.Lock()  # one writer at a time, of this process

    @property
    def ended(self) -> bool:
        """Nobody gets an answer from it any more."""
        return self._binding.ended is not None

    @property
    def index(self) -> IndexState:
        return IndexState("flat", None, None, None, False)

    def add(
        self, images: Sequence[NewImage], encoder: Identity, replace: bool = False, facts: dict[str, str] | None = None
    ) -> list[bool | PatchsightError]:
        facts = dict(facts or {})
        if images:
            facts["encoder"] = encoder.text
        outcome: list[bool | PatchsightError] = []
        with self._writing:
            self._check_encoder(images, encoder)
            known = self._find([image.item.id for image in images], ("id", "sha256"))
            latest = {id: row["sha256"] for id, row in known.items()}
            rows: dict[str, dict[str, Any]] = {}
            for image in images:
                item, sha256 = image.item, hashlib.sha256(image.data).hexdigest()
                if item.id in latest and not replace:
                    outcome.append(False if latest[item.id] == sha256 else other_bytes(item.id))
                    continue
                metadata, thumbnail = encode_metadata(item.metadata), encoded(image.thumbnail)
                row = to_row(item.id, new_key(), item.label, metadata, sha256, thumbnail, image.vector)
                outcome.append(item.id not in latest)
                rows[item.id], latest[item.id] = row, sha256
            self._binding.upsert(list(rows.values()))
            self._binding.set_facts(facts)  # behind the images: who is killed in between does them again
        return outcome

    def add_vectors(
        self, batches: Callable[[], Iterable[Sequence[NewVector]]], encoder: Identity, replace: bool = False
    ) -> dict[str, int]:
        with self._writing:
            self.busy = True
            try:
                self.require(encoder)
                outcome = add_vectors(self._binding, batches, encoder, replace)
                self._binding.set_facts({"encoder": encoder.text})
                return outcome
            finally:
                self.busy = False

    def _check_encoder(self, images: Sequence[NewImage], encoder: Identity) -> None:
        """Have the gallery bound to this encoder. Raises Conflict, InvalidRequest."""
        self.require(encoder)
        dim = self.dim
        for image in images:
            check_size(image.vector, dim, "vectors")
            dim = image.vector.size
        if dim is not None:
            self._binding.bind(encoder, dim)
            self.require(encoder)  # another gateway may have been quicker

    def patch(self, id: str, changes: Changes) -> Image:
        with self._writing:
            row = self._row(id, ALL)
            label = check_label(changes["label"]) if "label" in changes else row["label"] or None
            metadata = encode_metadata(changes["metadata"]) if "metadata" in changes else row["metadata"]
            vector = np.array(row["vector"], np.float32)
            changed = to_row(id, row["key"], label, metadata, row["sha256"], row["thumbnail"], vector)
            self._binding.upsert([changed])
            return to_image(changed)

    def delete(self, id: str) -> None:
        with self._writing:
            self._row(id, ("id",))
            self._binding.delete(id)

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
        dim = self.dim
        if dim is None:
            return []
        if query.shape != (dim,):
            message = f"the query has {query.size} values, the gallery's vectors have {dim}"
            raise InvalidRequest(message, param="vectors")
        wanted = expression(chosen_by(label, filter))
        if left := possible(leave_out):
            wanted = f"{wanted} and " * bool(wanted) + f"id not in {orjson.dumps(left).decode()}"
        found = search(self._binding, query, k, wanted)
        return [
            Neighbor(row["id"], score, row["label"] or None, orjson.loads(row["metadata"]))
            for score, row in found
            if score >= min_score
        ]

    def close(self) -> None:
        """There is nothing to let go of: the connection is that of all galleries."""

    def end(self, error: PatchsightError) -> None:
        with self._writing:
            self._binding.ended = error
