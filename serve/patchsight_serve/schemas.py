"""The shapes of requests and replies, for the OpenAPI page. Vectors never pass through these: they would cost more than
the encoder does."""

from typing import Any, Literal

from pydantic import BaseModel, Field

from patchsight_serve.replies import JSON, NPY, NPZ, PNG, RAW


class ErrorBody(BaseModel):
    """What went wrong, for one request or one image."""

    code: str = Field(description="stable name for programs", examples=["damaged_image"])
    message: str = Field(description="for people; names the value and the limit")
    param: str | None = Field(description="the part of the request that is to blame", examples=["images[3]", "encoder"])


class ErrorReply(BaseModel):
    """Every error reply of this server."""

    error: ErrorBody


class EncoderName(BaseModel):
    """Which encoder made the numbers: they only compare with numbers of the same sha256."""

    name: str
    sha256: str


class PackedArray(BaseModel):
    """An array of several axes: base64 of its little-endian values in C order."""

    shape: list[int] = Field(examples=[[3, 8, 8]])
    dtype: Literal["float32"]
    data: str = Field(description="base64")


class EmbedResult(BaseModel):
    """One image's outputs, those that were asked for, or its error."""

    index: int
    embedding: list[float] | None = None
    cls: list[float] | None = None
    mean: list[float] | None = None
    both: list[float] | None = Field(None, description="CLS and mean side by side, where the encoder has that")
    attention: PackedArray | None = Field(None, description="(heads, h, w), from the CLS token to the patches")
    patch_tokens: PackedArray | None = Field(None, description="(h, w, D)")
    error: ErrorBody | None = None


class EmbedReply(BaseModel):
    """One result per image, in order."""

    encoder: EncoderName
    results: list[EmbedResult]


class AttentionReply(BaseModel):
    """The bare attention map, (h, w)."""

    encoder: EncoderName
    attention: PackedArray


class EncoderRuntime(BaseModel):
    """What computes an encoder."""

    engine: str = Field(examples=["onnxruntime", "openvino"])
    precision: str = Field(description="what it computes in", examples=["fp32", "bf16"])
    cosine: float | None = Field(
        description="the least of its embeddings to ONNX Runtime's in fp32, on the pictures of a trial; null: not tried"
    )


class EncoderInfo(BaseModel):
    """A loaded encoder: its manifest, and what can be asked of it."""

    name: str
    sha256: str
    default: bool = Field(description="answers requests that name no encoder")
    outputs: dict[str, list[int]] = Field(description="shape for one image, by what the query calls it")
    runtime: EncoderRuntime
    manifest: dict[str, Any] = Field(description="encoder.json")


class EncoderList(BaseModel):
    """All loaded encoders, by name."""

    encoders: list[EncoderInfo]
    failed: dict[str, str] = Field(description="by name, what the last reload could not load, and why")


_BINARY = {"type": "string", "format": "binary"}
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGOoAAAAegB5s2G1ewAAAABJRU5ErkJggg=="


def image_body(several: bool) -> dict[str, Any]:
    """OpenAPI of a body that carries images in one of the three ways."""
    many: dict[str, Any] = {} if several else {"maxItems": 1}
    return {
        "required": True,
        "description": "A raw body is one image: JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF, told from its bytes.",
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["images"],
                    "properties": {"images": {"type": "array", "minItems": 1, "items": _BINARY, **many}},
                }
            },
            "image/*": {"schema": _BINARY},
            RAW: {"schema": _BINARY},
            JSON: {
                "schema": {
                    "type": "object",
                    "required": ["images"],
                    "additionalProperties": False,
                    "properties": {
                        "images": {
                            "type": "array",
                            "minItems": 1,
                            "items": {"type": "string", "description": "base64 or data:image/…;base64,…"},
                            **many,
                        }
                    },
                },
                "example": {"images": [f"data:image/png;base64,{PIXEL}"]},
            },
        },
    }


def array_content(*media_types: str) -> dict[str, Any]:
    """OpenAPI of the binary replies."""
    text = {
        NPY: "A numpy file, float32.",
        NPZ: "A numpy archive, one float32 array per output.",
        RAW: "Little-endian float32 in C order; `X-Shape` and `X-Dtype` say how to read it.",
        PNG: "The picture with its attention on it.",
    }
    return {kind: {"schema": _BINARY | {"description": text[kind]}} for kind in media_types}


IMAGE_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorReply, "description": text}
    for status, text in {
        400: "Malformed or out of range.",
        404: "Unknown encoder.",
        413: "Over a limit on bytes, pixels or images.",
        415: "Not an image format that the server reads.",
        422: "A damaged image.",
        429: "The queue is full; `Retry-After` says when to come back.",
        503: "The encoder's worker is not running.",
        504: "Not answered in time.",
    }.items()
}
