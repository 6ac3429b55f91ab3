"""Vectors by the thousand into a gallery, without their pictures, all of them or none."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from patchsight_serve.errors import Conflict
from patchsight_serve.gallery import check_size
from patchsight_serve.item import Identity, NewVector, encode_metadata
from patchsight_serve.nearest import F32
from patchsight_serve.record import Record
from patchsight_serve.row import Row

if TYPE_CHECKING:  # it needs this module
    from patchsight_serve.embedded_gallery import EmbeddedGallery

SAME = 1e-4  # how far numbers of one image's vector may be apart: another batch moves their last digits


def add_vectors(
    gallery: "EmbeddedGallery", batches: Iterable[Sequence[NewVector]], encoder: Identity, replace: bool = False
) -> dict[str, int]:
    """As `Gallery.add_vectors`, in one transaction."""
    outcome = {"created": 0, "replaced": 0, "unchanged": 0}
    fresh: list[dict[int, F32]] = []
    gone: dict[str, int] = {}
    with gallery.writing(long=True) as record:
        gallery.require(encoder)
        with record.transaction():
            record.set_fact("encoder", encoder.text)
            for batch in batches:
                known = record.find([new.item.id for new in batch])
                fresh.append({})
                for new in batch:
                    check_size(new.vector, gallery.dim, "embedding")
                    row = known.get(new.item.id)
                    said, key = _add(record, new, row, replace)
                    outcome[said] += 1
                    if key is not None:
                        fresh[-1][key] = new.vector
                    if key is not None and row is not None:
                        gone[row.id] = row.key
        gallery.commit(encoder, gone, fresh)
    return outcome


def _add(record: Record, new: NewVector, row: Row | None, replace: bool) -> tuple[str, int | None]:
    """Inside a transaction. What became of it, and its key, if it has a new one. row: what is under its id."""
    item, metadata = new.item, encode_metadata(new.item.metadata)
    there = row is not None and row.intact
    if row is not None and there and same_image(row.sha256, np.frombuffer(row.vector, dtype="<f4"), new):
        if not replace or (row.label, row.metadata) == (item.label, metadata):
            return "unchanged", None
        record.describe(row, item.label, metadata)
        return "replaced", None
    if there and not replace:
        raise Conflict(f"id {item.id!r} is taken by another image; replace=true replaces it", param="id")
    if row is not None:
        record.delete(row.key)
    vector = new.vector.astype("<f4").tobytes()
    key = record.insert_bare(item.id, item.label, metadata, new.sha256 or "", vector)
    return "replaced" if there else "created", key


def same_image(sha256: str, vector: F32, new: NewVector) -> bool:
    """By the bytes of the picture where both are known, else by the vector."""
    if sha256 and new.sha256:
        return sha256 == new.sha256
    return bool(np.allclose(vector, new.vector, rtol=0, atol=SAME))
