"""What goes into a gallery and comes out of it: images with an id, a label and metadata, within limits."""

import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self, TypedDict

import orjson

from patchsight_serve.encoder import Values
from patchsight_serve.errors import InvalidRequest, NotFound

MAX_LABEL = 256  # characters
MAX_METADATA = 16 * 1024  # bytes as JSON
MAX_DEPTH = 32  # of objects and lists in metadata: what cannot be written inside of a reply must not get in
_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_GALLERY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")  # a folder's name: never hidden, never `..`


@dataclass(frozen=True)
class Item:
    """One image's description; an item that exists is valid.

    Raises:
        InvalidRequest: an id outside `[A-Za-z0-9._-]{1,128}`, a label that is empty or too long, or metadata that is
            no JSON object or too large; `param` names which.
    """

    id: str
    label: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_id(self.id)
        check_label(self.label)
        encode_metadata(self.metadata)


class Identity(NamedTuple):
    """Which encoder made a vector: its name and the sha256 of its ONNX file."""

    name: str
    sha256: str

    @property
    def text(self) -> str:
        """As galleries keep it."""
        return orjson.dumps(self._asdict()).decode()

    @classmethod
    def read(cls, text: str) -> Self:
        """Of such a text. Raises TypeError, ValueError where it is none."""
        return cls(**orjson.loads(text))


@dataclass(frozen=True)
class Added:
    """An image that is in the gallery now; `created` is False if its id was there before."""

    id: str
    created: bool


@dataclass(frozen=True)
class NewImage:
    """An image to add. data: the encoded image. thumbnail: JPEG. vector: float32 `(D,)`, of length 1."""

    item: Item
    data: bytes
    thumbnail: bytes
    vector: Values


@dataclass(frozen=True)
class NewVector:
    """An image to add without its picture. sha256: of the encoded image, where it is known. vector: float32 `(D,)`, of
    length 1."""

    item: Item
    sha256: str | None
    vector: Values


@dataclass(frozen=True)
class Image:
    """An indexed image as it is described to clients."""

    id: str
    label: str | None
    metadata: dict[str, Any]
    sha256: str | None  # of the encoded image; None where only its vector ever came


@dataclass(frozen=True)
class Neighbor:
    """A found image; `score` is the cosine similarity, -1 to 1."""

    id: str
    score: float
    label: str | None
    metadata: dict[str, Any]


@dataclass(frozen=True)
class RegionNeighbor:
    """An image that a region was looked for in. score: the mean cosine of the region's patches to their best matches in
    it, -1 to 1. box: where most of these are: left, top, right and bottom in fractions of the image."""

    id: str
    score: float
    label: str | None
    metadata: dict[str, Any]
    box: tuple[float, float, float, float]


class Changes(TypedDict, total=False):
    """What to change of an image; a key that is not there leaves things as they are."""

    label: str | None
    metadata: dict[str, Any]


def is_id(id: str) -> bool:
    """Whether an image may be called so."""
    return isinstance(id, str) and bool(_ID.fullmatch(id)) and id not in (".", "..")


def check_id(id: str) -> str:
    """The id itself. Raises InvalidRequest."""
    if not is_id(id):
        raise InvalidRequest(f"id {_short(id)} does not match [A-Za-z0-9._-]{{1,128}}", param="id")
    return id


def check_gallery(name: str) -> str:
    """The gallery's name itself. Raises NotFound, as there can be no gallery of another name."""
    if not _GALLERY.fullmatch(name):
        raise NotFound(f"gallery {_short(name)}: names match {_GALLERY.pattern}", param="gallery")
    return name


def check_label(label: str | None) -> str | None:
    """The label itself. Raises InvalidRequest."""
    if label is None:
        return None
    if not isinstance(label, str) or not 1 <= len(label) <= MAX_LABEL:
        size = f"has {len(label):,} characters" if isinstance(label, str) else "is no string"
        raise InvalidRequest(f"label {_short(label)} {size}; a label has 1 to {MAX_LABEL}", param="label")
    if not _encodable(label):
        raise InvalidRequest(f"label {_short(label)} is not valid Unicode text", param="label")
    return label


def encode_metadata(metadata: Any) -> str:
    """Metadata as JSON text.

    Raises InvalidRequest where it is no JSON object, more than `MAX_METADATA` bytes, or nested deeper than `MAX_DEPTH`.
    """
    if not isinstance(metadata, dict):
        raise InvalidRequest(f"metadata {_short(metadata)} is not a JSON object", param="metadata")
    try:
        text = orjson.dumps(metadata, option=orjson.OPT_SORT_KEYS)
    except (TypeError, RecursionError) as error:
        raise InvalidRequest(f"metadata cannot be written as JSON: {error}", param="metadata") from None
    if len(text) > MAX_METADATA:
        raise InvalidRequest(f"metadata has {len(text):,} bytes, the limit is {MAX_METADATA:,}", param="metadata")
    if _depth(metadata) > MAX_DEPTH:
        raise InvalidRequest(f"metadata is nested more than {MAX_DEPTH} deep", param="metadata")
    return text.decode()


def parse_metadata(text: str | bytes) -> dict[str, Any]:
    """JSON text to metadata. Raises InvalidRequest where it is no JSON object."""
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"metadata is not JSON: {error}", param="metadata") from None
    if not isinstance(value, dict):
        raise InvalidRequest(f"metadata {_short(value)} is not a JSON object", param="metadata")
    return value


def _depth(value: Any) -> int:
    """Objects and lists around the innermost value."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(_depth, inner), default=0)


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
