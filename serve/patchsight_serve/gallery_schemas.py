"""The shapes of the gallery's requests and replies, for the OpenAPI page."""

from typing import Any, Literal

from pydantic import BaseModel, Field

from patchsight_serve.schemas import EncoderName, ErrorBody


class ImageFailure(BaseModel):
    """An image that another encoder cannot embed."""

    id: str
    message: str


class Reembedding(BaseModel):
    """How far another encoder is with the images of a gallery."""

    encoder: EncoderName
    done: int
    total: int
    failed: list[ImageFailure] = Field(description="the first 100")
    error: str | None = Field(description="why it has stopped; null while it is at work")


class IndexInfo(BaseModel):
    """How searches in a gallery are answered: by all vectors (flat), or by those of some lists (ivf)."""

    kind: Literal["flat", "ivf"]
    recall: float | None = Field(
        description="share of the 10 nearest that a search finds, as measured on the gallery's own images when the "
        "index was built; null: a flat one finds all"
    )
    lists: int | None = Field(description="how many lists there are")
    probes: int | None = Field(description="how many of them a search for 10 visits")
    building: bool = Field(description="another index is being built, and takes this one's place when it is done")


class GalleryInfo(BaseModel):
    """A gallery as a whole."""

    gallery: str
    count: int = Field(description="indexed images")
    encoder: EncoderName | None = Field(description="the encoder it is bound to; null while it is empty")
    index: IndexInfo
    damaged: list[str] = Field(description="ids whose rows failed their checksum and are left out; add them again")
    galleries: list[str] = Field(description="names of all galleries")
    reembedding: Reembedding | None = Field(description="by another encoder, at work or stopped by an error")


class GalleryOutline(BaseModel):
    """A gallery among others."""

    name: str
    count: int | None = Field(description="its images; null where it cannot be read")
    encoder: EncoderName | None = Field(description="the encoder it is bound to; null while it is empty")


class GalleriesReply(BaseModel):
    """All galleries, in the order of their names. The default one is among them once it has been used."""

    galleries: list[GalleryOutline]


class RestoreReply(BaseModel):
    """A gallery that came from its backup."""

    gallery: str
    count: int = Field(description="images in it")
    encoder: EncoderName | None = Field(description="the encoder it is bound to; null where it is empty")
    left_out: list[str] = Field(description="ids of damaged rows, with `skip_damaged`")


class ImportReply(BaseModel):
    """What became of the rows of a file."""

    gallery: str
    count: int = Field(description="images in it now")
    encoder: EncoderName
    created: int
    replaced: int = Field(description="with `replace`: of another image, or with another label or metadata")
    unchanged: int = Field(description="were there before")


class AddedImage(BaseModel):
    """One image's outcome: its id, or its error."""

    index: int
    id: str | None = None
    created: bool | None = Field(None, description="false if an image of this id was there before")
    error: ErrorBody | None = None


class AddReply(BaseModel):
    """One result per image, in order."""

    results: list[AddedImage]


class GalleryImage(BaseModel):
    """An indexed image."""

    id: str
    label: str | None
    metadata: dict[str, Any]
    sha256: str | None = Field(description="of the encoded image; null where a vector came without it")


class ImagePage(BaseModel):
    """Images in the order of their ids."""

    images: list[GalleryImage]
    next_cursor: str | None = Field(description="pass it as `cursor` for the next page; null at the end")


class NeighborImage(BaseModel):
    """A found image."""

    id: str
    score: float = Field(description="cosine similarity, -1 to 1")
    label: str | None
    metadata: dict[str, Any]


class Vote(BaseModel):
    """The class that the labelled neighbors vote for, with weight exp(score / 0.07)."""

    label: str | None = Field(description="null if no neighbor has a label; of equal ones the first by alphabet")
    confidence: float = Field(description="its share of all weights, 0 to 1")


class NeighborsReply(BaseModel):
    """Neighbors, best first, equal scores in the order of their ids."""

    encoder: EncoderName | None = Field(description="null if the gallery is empty and nothing was embedded")
    neighbors: list[NeighborImage]
    vote: Vote | None = Field(None, description="only if asked for")


_IMAGE: dict[str, Any] = {"type": "string", "format": "binary"}
_DESCRIPTION: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "id": {"type": "string", "pattern": "^[A-Za-z0-9._-]{1,128}$"},
        "label": {"type": ["string", "null"]},
        "metadata": {"type": "object"},
    },
}

ADD_BODY: dict[str, Any] = {
    "required": True,
    "description": "A raw body is one image, described by the query; a form carries several.",
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["images"],
                "properties": {
                    "images": {"type": "array", "minItems": 1, "items": _IMAGE},
                    "items": {
                        "type": "string",
                        "description": 'JSON, one object per image: [{"id", "label", "metadata"}, …], each optional',
                        "examples": ['[{"id": "shoes-1", "label": "shoes", "metadata": {"year": 2010}}]'],
                    },
                },
            }
        },
        "image/*": {"schema": _IMAGE},
        "application/octet-stream": {"schema": _IMAGE},
    },
}
PATCH_BODY: dict[str, Any] = {
    "required": True,
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "additionalProperties": False,
                "properties": {k: v for k, v in _DESCRIPTION["properties"].items() if k != "id"},
            },
            "example": {"label": "dress", "metadata": {"path": "dress/1.jpg"}},
        }
    },
}
_VECTOR = {"type": "array", "items": {"type": "number"}}
NEIGHBORS_BODY: dict[str, Any] = {
    "required": True,
    "description": "One image, or JSON: the mean of the images `ids` and the `vectors`, less the mean of `negative`.",
    "content": {
        "image/*": {"schema": _IMAGE},
        "application/octet-stream": {"schema": _IMAGE},
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["images"],
                "properties": {"images": {"type": "array", "minItems": 1, "maxItems": 1, "items": _IMAGE}},
            }
        },
        "application/json": {
            "schema": {
                "type": "object",
                "additionalProperties": False,
                "properties": {
                    "ids": {"type": "array", "items": {"type": "string"}},
                    "vectors": {"type": "array", "items": _VECTOR},
                    "negative": {"type": "array", "items": {"anyOf": [{"type": "string"}, _VECTOR]}},
                },
            },
            "example": {"ids": ["dress-1", "dress-2"], "negative": ["hat-1"]},
        },
    },
}
