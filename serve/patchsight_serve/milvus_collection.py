"""The collections of Milvus in which galleries are: how they are called, what is in a row, and what is said about them.

A gallery is an alias, `PREFIX__NAME`. Behind it is a collection that was made for just one encoder, under a name that
nobody used before: several gateways that make a gallery at once make a collection each, and one gets the alias. Who
still has a collection of before finds that it is gone, and never one that took its place.
"""

import base64
import re
import secrets
from collections.abc import Collection
from typing import Any

import numpy as np
import orjson
from pymilvus import CollectionSchema, DataType

from patchsight_serve.errors import InvalidRequest, NotFound
from patchsight_serve.item import Image, check_gallery, is_id
from patchsight_serve.milvus_connection import TIMEOUT_S, Fields, MilvusConnection
from patchsight_serve.milvus_filter import MAX_TOKENS, TOKEN, findable
from patchsight_serve.nearest import F32
from patchsight_serve.row import Row, row_checksum

MAX_NAME = 230  # of Milvus' 255 characters, the rest for what is behind it
MAX_TEXT = 65_535  # bytes of a VARCHAR
DESCRIPTION = ("id", "label", "metadata", "sha256")
ALL = ("id", "key", *DESCRIPTION[1:], "thumbnail", "vector")


def alias_of(prefix: str, gallery: str) -> str:
    """Raises NotFound where there can be none of that name."""
    name = re.sub(r"[^A-Za-z0-9]", lambda found: f"_{ord(found[0]):02x}", check_gallery(gallery))
    if len(prefix) + len(name) > MAX_NAME:
        raise NotFound(f"gallery {gallery[:60]!r}…: its name is too long for Milvus", param="gallery")
    return f"{prefix}__{name}"


def gallery_of(prefix: str, alias: str) -> str | None:
    """The name that `alias_of` was given; None where the alias is none of ours."""
    name = alias.removeprefix(f"{prefix}__")
    if name == alias or not re.fullmatch(r"(?:[A-Za-z0-9]|_[0-9a-f]{2})+", name):
        return None
    return re.sub(r"_([0-9a-f]{2})", lambda found: chr(int(found[1], 16)), name)


def make_collection(connection: MilvusConnection, alias: str, dim: int) -> str:
    """An empty one for vectors of `dim` numbers, which nobody knows yet. Its name."""
    schema = connection.client.create_schema(auto_id=False, enable_dynamic_field=False)
    schema.add_field("id", DataType.VARCHAR, is_primary=True, max_length=128)
    schema.add_field("key", DataType.INT64)  # names this vector for ever
    schema.add_field("label", DataType.VARCHAR, max_length=1024)  # empty: none
    schema.add_field("metadata", DataType.VARCHAR, max_length=MAX_TEXT)  # JSON text, to the last digit
    schema.add_field("sha256", DataType.VARCHAR, max_length=64)
    schema.add_field("thumbnail", DataType.VARCHAR, max_length=MAX_TEXT)  # base64: there are no binary fields
    tokens = {"element_type": DataType.VARCHAR, "max_capacity": MAX_TOKENS, "max_length": TOKEN}
    schema.add_field("tokens", DataType.ARRAY, **tokens)
    schema.add_field("ranges", DataType.JSON)
    schema.add_field("vector", DataType.FLOAT_VECTOR, dim=dim)
    name = create_collection(connection, f"{alias}__{secrets.token_hex(8)}", schema)
    for field in ("key", "tokens"):
        connection.quicken(name, field)
    return name


def create_collection(connection: MilvusConnection, name: str, schema: CollectionSchema) -> str:
    """Ready to be asked. Its name."""
    client = connection.client
    indexes = client.prepare_index_params()
    indexes.add_index("vector", index_type="FLAT", metric_type="IP")
    with connection.explained():
        client.create_collection(name, schema=schema, consistency_level="Strong", timeout=TIMEOUT_S)
        client.create_index(name, indexes, timeout=TIMEOUT_S, sync=False)
    connection.load(name)
    return name


def to_row(
    id: str, key: int, label: str | None, metadata: str, sha256: str, thumbnail: str, vector: F32
) -> dict[str, Any]:
    """What is stored of an image. thumbnail: as `encoded`. Raises InvalidRequest where it is more than Milvus takes."""
    tokens, ranges = findable(label, metadata)
    return {
        "id": id, "key": key, "label": label or "", "metadata": metadata, "sha256": sha256, "thumbnail": thumbnail,
        "tokens": tokens, "ranges": ranges, "vector": vector.astype(np.float32).tolist(),
    }  # fmt: skip


def new_key() -> int:
    """One that was never used, as far as anybody can tell: gateways have no counter in common."""
    return secrets.randbits(62)


def encoded(thumbnail: bytes) -> str:
    """Raises InvalidRequest where it is larger than a field of Milvus."""
    text = base64.b64encode(thumbnail).decode()
    if len(text) > MAX_TEXT:
        limit = MAX_TEXT // 4 * 3
        raise InvalidRequest(f"a thumbnail has {len(thumbnail):,} bytes, Milvus takes {limit:,}", param="images")
    return text


def to_image(row: Fields) -> Image:
    """Of a row's `DESCRIPTION`."""
    return Image(row["id"], row["label"] or None, orjson.loads(row["metadata"]), row["sha256"] or None)


def stored(row: Fields) -> Row:
    """As a record has it; of a row's `key`, `DESCRIPTION` and vector."""
    label, vector = row["label"] or None, np.array(row["vector"], "<f4").tobytes()
    checksum = row_checksum(row["id"], label, row["metadata"], row["sha256"], vector)
    return Row(row["key"], row["id"], label, row["metadata"], row["sha256"], vector, checksum)


def between_ids(text: str) -> str:
    """A text that is between the same two ids, and has nothing that an expression could stumble over. No character of
    an id is below `#` or above `~`."""
    kept = re.match(r"[#-~]*", text)[0].replace("\\", "[")  # type: ignore[index]
    return kept + ("~" if text[len(kept) : len(kept) + 1] > "~" else "")


def possible(ids: Collection[str]) -> list[str]:
    """Those of them that an image can have."""
    return sorted(id for id in set(ids) if is_id(id))
