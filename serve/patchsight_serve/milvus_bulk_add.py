"""Vectors by the thousand into a gallery on Milvus. There are no transactions: all are looked over before the first is
written, and what a kill in between leaves out, the same file brings in when it is added again."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from patchsight_serve.bulk_add import same_image
from patchsight_serve.errors import Conflict
from patchsight_serve.gallery import check_size
from patchsight_serve.item import Identity, NewVector, encode_metadata
from patchsight_serve.milvus_binding import Binding
from patchsight_serve.milvus_collection import ALL, new_key, to_row
from patchsight_serve.milvus_connection import Fields

SOME = 500  # rows in one call


def add_vectors(
    binding: Binding, batches: Callable[[], Iterable[Sequence[NewVector]]], encoder: Identity, replace: bool
) -> dict[str, int]:
    """As `Gallery.add_vectors`, of a gallery that is free, or bound to that encoder."""
    bound = binding.bound()
    dim = bound.dim if bound else None
    for some in _parts(batches()):
        for new in some:
            check_size(new.vector, dim, "embedding")
            dim = new.vector.size
        _changes(binding, some, replace)
    outcome = {"created": 0, "replaced": 0, "unchanged": 0}
    if dim is None:
        return outcome
    if binding.bind(encoder, dim).encoder != encoder:
        raise Conflict("another encoder was quicker to bind this gallery; ask again", param="encoder")
    for some in _parts(batches()):
        changes = _changes(binding, some, replace)
        binding.upsert([row for _, row in changes if row is not None])
        for said, _ in changes:
            outcome[said] += 1
    return outcome


def _parts(batches: Iterable[Sequence[NewVector]]) -> Iterable[Sequence[NewVector]]:
    for batch in batches:
        for start in range(0, len(batch), SOME):
            yield batch[start : start + SOME]


def _changes(binding: Binding, some: Sequence[NewVector], replace: bool) -> list[tuple[str, dict[str, Any] | None]]:
    """Of each what becomes of it, and the row to write, if there is one. Raises Conflict, InvalidRequest."""
    known = {row["id"]: row for row in binding.find("id", [new.item.id for new in some], ALL)}
    return [_change(new, known.get(new.item.id), replace) for new in some]


def _change(new: NewVector, there: Fields | None, replace: bool) -> tuple[str, dict[str, Any] | None]:
    item, metadata = new.item, encode_metadata(new.item.metadata)
    if there is not None and same_image(there["sha256"], np.array(there["vector"], np.float32), new):
        if not replace or (there["label"] or None, there["metadata"]) == (item.label, metadata):
            return "unchanged", None
        vector = np.array(there["vector"], np.float32)
        picture = there["sha256"], there["thumbnail"]
        return "replaced", to_row(item.id, there["key"], item.label, metadata, *picture, vector)
    if there is not None and not replace:
        raise Conflict(f"id {item.id!r} is taken by another image; replace=true replaces it", param="id")
    row = to_row(item.id, new_key(), item.label, metadata, new.sha256 or "", "", new.vector)
    return "created" if there is None else "replaced", row
