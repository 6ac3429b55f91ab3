"""`POST /v1/embeddings` and `GET /v1/models`: OpenAI's shape, for programs that speak it, with images as input."""

import base64
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Path, Request
from pydantic import BaseModel, Field
from starlette.responses import Response

from patchsight_serve.bodies import BodyLimits, from_base64, media_type, parse_json, read_body, too_many
from patchsight_serve.departure import while_connected
from patchsight_serve.encoder import Values
from patchsight_serve.errors import InvalidRequest, NotFound, PatchsightError, UnsupportedImage
from patchsight_serve.loaded import Loaded
from patchsight_serve.outputs import available, to_unit_length
from patchsight_serve.replies import JSON, json_reply
from patchsight_serve.schemas import IMAGE_ERRORS, PIXEL, ErrorReply
from patchsight_serve.service import Service

KEYS = {"input", "model", "encoding_format", "dimensions", "user"}  # all that OpenAI's own endpoint knows


class Embedding(BaseModel):
    """One image's embedding, of length 1."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str = Field(description="numbers, or base64 of little-endian float32")


class Usage(BaseModel):
    """An image counts as one token."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(BaseModel):
    """One embedding per input, in order."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: Usage


class Model(BaseModel):
    """An encoder. `created` is 0: a bundle does not record it."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(BaseModel):
    """All loaded encoders, by name."""

    object: Literal["list"]
    data: list[Model]


_IMAGE = {"type": "string", "description": "base64 or data:image/…;base64,…"}
_BODY: dict[str, Any] = {
    "required": True,
    "content": {
        JSON: {
            "schema": {
                "type": "object",
                "required": ["input", "model"],
                "additionalProperties": False,
                "properties": {
                    "input": {"oneOf": [_IMAGE, {"type": "array", "minItems": 1, "items": _IMAGE}]},
                    "model": {"type": "string", "description": "name of an encoder"},
                    "encoding_format": {"enum": ["float", "base64", None], "default": "float"},
                    "dimensions": {"type": ["integer", "null"], "description": "the encoder's own, or left out"},
                    "user": {"type": ["string", "null"], "description": "ignored"},
                },
            },
            "example": {"input": f"data:image/png;base64,{PIXEL}", "model": "simclr-vit-tiny-photos"},
        }
    },
}


@dataclass(frozen=True)
class Asked:
    """A valid request. An input that is no base64 is an error in its place."""

    encoder: Loaded
    images: list[bytes | PatchsightError]
    alone: bool  # `input` was one string
    as_base64: bool


def router() -> APIRouter:
    """The routes below `/v1`."""
    routes = APIRouter(prefix="/v1", tags=["OpenAI's shape"])
    routes.post(
        "/embeddings",
        summary="Embed images",
        openapi_extra={"requestBody": _BODY},
        responses={200: {"model": EmbeddingList}, **IMAGE_ERRORS},
    )(embeddings)
    routes.get("/models", summary="List the encoders", responses={200: {"model": ModelList}})(models)
    unknown: dict[int | str, dict[str, Any]] = {404: {"model": ErrorReply, "description": "Unknown encoder."}}
    routes.get("/models/{model}", summary="One encoder", responses={200: {"model": Model}, **unknown})(model)
    return routes


async def embeddings(request: Request) -> Response:
    """The recommended embedding of each image, of length 1. The first image that fails has the request fail as a
    whole, and `param` names it."""
    service: Service = request.app.state.service
    if media_type(request) not in (JSON, ""):
        raise UnsupportedImage(f"the body must be {JSON}, not {media_type(request)!r}", "Content-Type")
    asked = _asked(parse_json(await read_body(request, service.body_limits)), service, service.body_limits)
    name = asked.encoder.manifest.name
    request.state.timing.images = len(asked.images)
    async with while_connected(request):
        results = await service.embed_images(asked.images, asked.encoder, ("embedding",), request.state.timing)
    vectors: list[Values] = []
    for i, result in enumerate(results):
        if isinstance(result, PatchsightError):
            result.param = "input" if asked.alone else f"input[{i}]"
            raise result
        vectors.append(result["embedding"])
    with request.state.timing.encoding(service.metrics.encode.observe):
        data = [
            {"object": "embedding", "index": i, "embedding": _packed(vector) if asked.as_base64 else vector}
            for i, vector in enumerate(to_unit_length(np.stack(vectors)))
        ]
        usage = {"prompt_tokens": len(data), "total_tokens": len(data)}
        return json_reply(
            {"object": "list", "data": data, "model": name, "usage": usage},
            headers={"X-Encoder": name, "X-Encoder-Sha256": asked.encoder.manifest.sha256},
        )


async def models(request: Request) -> Response:
    """Names of encoders to ask for as `model`."""
    service: Service = request.app.state.service
    return json_reply({"object": "list", "data": [_model(name) for name in service.loaded]})


async def model(request: Request, model: Annotated[str, Path(description="name of an encoder")]) -> Response:
    """404 if there is none of that name."""
    return json_reply(_model(_encoder(model, request.app.state.service).manifest.name))


def _asked(content: Any, service: Service, limits: BodyLimits) -> Asked:
    """The request in a JSON body; a key of null is one left out. Raises InvalidRequest, NotFound, TooLarge."""
    if not isinstance(content, dict):
        raise InvalidRequest('the body must be a JSON object with "input" and "model"')
    if unknown := set(content) - KEYS:
        raise InvalidRequest(f"unknown key {min(unknown)!r}; the keys are {', '.join(sorted(KEYS))}", min(unknown))
    encoder = _encoder(content.get("model"), service)
    encoding = "float" if content.get("encoding_format") is None else content["encoding_format"]
    if encoding not in ("float", "base64"):
        raise InvalidRequest(f"encoding_format is {encoding!r}; it can be 'float' or 'base64'", "encoding_format")
    _check_dimensions(content.get("dimensions"), encoder)
    given = content.get("input")
    inputs = [given] if isinstance(given, str) else given
    if not isinstance(inputs, list) or not inputs:
        raise InvalidRequest("input must be an image, or a list of at least one, as base64 or data URI", "input")
    if len(inputs) > limits.max_images:
        raise too_many(len(inputs), limits, "input")
    return Asked(encoder, [_image(each) for each in inputs], isinstance(given, str), encoding == "base64")


def _encoder(name: Any, service: Service) -> Loaded:
    """Raises InvalidRequest, NotFound."""
    if not isinstance(name, str) or not name:
        raise InvalidRequest(f"model must be the name of an encoder; there are {', '.join(service.loaded)}", "model")
    try:
        return service.encoder(name)
    except NotFound as error:
        raise NotFound(error.message, "model") from None


def _check_dimensions(asked: Any, encoder: Loaded) -> None:
    manifest = encoder.manifest
    (have,) = manifest.outputs[available(manifest)["embedding"]]
    if asked is not None and (type(asked) is not int or asked != have):
        raise InvalidRequest(
            f"dimensions is {asked!r}; embeddings of {manifest.name!r} have {have} numbers, and are not cut",
            "dimensions",
        )


def _image(text: Any) -> bytes | PatchsightError:
    data = from_base64(text)
    if isinstance(data, PatchsightError):
        return InvalidRequest(f"{data.message}; the encoder takes images, as base64 or data URI, and no text or tokens")
    return data


def _packed(vector: Values) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "patchsight"}
