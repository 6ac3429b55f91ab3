"""`POST /embed` and `POST /attention`: images in, numbers or a picture out."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from patchsight_serve.bodies import read_images
from patchsight_serve.decode import fit, open_rgb
from patchsight_serve.departure import while_connected
from patchsight_serve.encoder import Pixels, Values
from patchsight_serve.errors import InvalidRequest, PatchsightError
from patchsight_serve.heatmap import keep_mass, overlay, shown_crop
from patchsight_serve.manifest import Manifest, Transform
from patchsight_serve.outputs import OUTPUTS, VECTORS, graph_name, to_unit_length
from patchsight_serve.plain_route import PlainRoute
from patchsight_serve.replies import (
    JSON,
    NPY,
    NPZ,
    PNG,
    RAW,
    array_reply,
    error_body,
    identity,
    json_reply,
    negotiate,
    packed,
)  # fmt: skip
from patchsight_serve.schemas import IMAGE_ERRORS, AttentionReply, EmbedReply, array_content, image_body
from patchsight_serve.service import INTERACTIVE_IMAGES, Service

EncoderQuery = Annotated[str | None, Query(description="name of the encoder; the default one if left out")]
SizeQuery = Annotated[
    int | None,
    Query(
        description="pixels of the square that the encoder sees, a multiple of its patch size; its own if left out. "
        "More of them show the same part of the picture more finely. For encoders whose manifest has `dynamic_size`",
        examples=[448],
    ),
]
PriorityQuery = Annotated[
    Literal["interactive", "bulk"] | None,
    Query(
        description="interactive images go first, and bulk ones get every fourth place while both wait; "
        f"if left out, more than {INTERACTIVE_IMAGES} images are bulk"
    ),
]
FittedQuery = Annotated[
    bool,
    Query(
        description="the images are what the encoder sees already: squares, of which no margin is cut away. One of "
        "exactly its size is taken as it is, pixel by pixel"
    ),
]


def router() -> APIRouter:
    """The two routes."""
    routes = APIRouter(tags=["images"], route_class=PlainRoute)
    routes.post(
        "/embed",
        summary="Embed images",
        openapi_extra={"requestBody": image_body(several=True)},
        responses={200: {"model": EmbedReply, "content": array_content(NPY, NPZ, RAW)}, **IMAGE_ERRORS},
    )(embed)
    routes.post(
        "/attention",
        summary="Show where the encoder looks",
        openapi_extra={"requestBody": image_body(several=False)},
        responses={200: {"model": AttentionReply, "content": array_content(PNG, NPY, RAW)}, **IMAGE_ERRORS},
    )(attention)
    return routes


async def embed(
    request: Request,
    encoder: EncoderQuery = None,
    outputs: Annotated[
        str, Query(description=f"comma-separated: {', '.join(OUTPUTS)}", examples=["embedding,attention"])
    ] = "embedding",
    normalize: Annotated[bool, Query(description="scale embeddings to length 1")] = True,
    size: SizeQuery = None,
    priority: PriorityQuery = None,
    fitted: FittedQuery = False,
) -> Response:
    """One result per image, in order.

    A request with one image that fails gets that error's status. With several images the reply is 200, and an image
    that fails has its error in its place. Binary replies fail as a whole, and `param` names the image.
    """
    service: Service = request.app.state.service
    loaded = service.encoder(encoder)
    manifest = loaded.manifest
    wanted = _names(outputs, manifest)
    transform = _transform(service.transform(manifest, size), fitted)
    media_type = negotiate(request.headers.get("accept"), (JSON, NPY, NPZ, RAW))
    if media_type in (NPY, RAW) and len(wanted) > 1:
        raise InvalidRequest(f"{media_type} holds one output, {len(wanted)} were asked for; {NPZ} holds all", "outputs")
    service.refuse_if_full(loaded, priority == "bulk")
    images = await read_images(request, service.body_limits)
    request.state.timing.images = len(images)
    async with while_connected(request):
        results = await service.embed_images(
            images,
            loaded,
            wanted,
            request.state.timing,
            transform,
            None if priority is None else priority == "bulk",
        )
    failures = {i: _located(r, i) for i, r in enumerate(results) if isinstance(r, PatchsightError)}
    if failures and (len(results) == 1 or media_type != JSON):
        raise next(iter(failures.values()))
    with request.state.timing.encoding(service.metrics.encode.observe):
        arrays = _stack([r for r in results if not isinstance(r, PatchsightError)], wanted, normalize)
        if media_type != JSON:
            return array_reply(arrays, media_type, manifest)
        return json_reply({"encoder": identity(manifest), "results": _entries(len(results), failures, arrays)})


async def attention(
    request: Request,
    encoder: EncoderQuery = None,
    head: Annotated[str, Query(description="number of a head, from 0, or `mean`", examples=["0"])] = "mean",
    mass: Annotated[
        float | None, Query(gt=0, le=1, description="keep the strongest patches that hold this share", examples=[0.6])
    ] = None,
    size: SizeQuery = None,
    fitted: FittedQuery = False,
) -> Response:
    """PNG of what the encoder saw of the picture, with the encoder's attention from CLS to the patches on it.

    Asked for JSON, npy or octet-stream, the map `(h, w)` itself; patches cut away by `mass` are 0.
    """
    service: Service = request.app.state.service
    loaded = service.encoder(encoder)
    manifest = loaded.manifest
    name = graph_name("attention", manifest, param="encoder")
    number = _head(head, manifest)
    transform = _transform(service.transform(manifest, size), fitted)
    grid = transform.crop // manifest.size_step
    media_type = negotiate(request.headers.get("accept"), (PNG, JSON, NPY, RAW))
    service.refuse_if_full(loaded)
    images = await read_images(request, replace(service.body_limits, max_images=1))
    request.state.timing.images = len(images)

    def prepare(data: bytes) -> tuple[Pixels, Pixels | None]:
        picture = open_rgb(data, service.limits, transform.scaled_side)
        shown = shown_crop(picture, transform, grid) if media_type == PNG else None
        return fit(picture, transform), shown

    async with while_connected(request), service.admitted(1, loaded):
        (prepared,) = await service.decode_images(images, prepare, request.state.timing)
        if isinstance(prepared, PatchsightError):
            raise _located(prepared, 0)
        pixels, shown = prepared
        (result,) = await service.infer([pixels], loaded, [name], request.state.timing)
    if isinstance(result, PatchsightError):
        raise _located(result, 0)
    heads = result[name]
    chosen: Values = heads.mean(axis=0) if number is None else heads[number]
    if mass is not None:
        chosen = keep_mass(chosen, mass)
    if shown is not None:
        png = await service.decoders.run(overlay, shown, chosen, mass is not None)
        return Response(png, media_type=PNG)
    if media_type == JSON:
        return json_reply({"encoder": identity(manifest), "attention": packed(chosen)})
    return array_reply({"attention": chosen}, media_type, manifest)


def _transform(transform: Transform, fitted: bool) -> Transform:
    """Without its margin for pictures that are fitted: one of size `crop` then goes through `fit` as it is."""
    return transform.model_copy(update={"resize": transform.crop}) if fitted else transform


def _names(outputs: str, manifest: Manifest) -> list[str]:
    names = list(dict.fromkeys(name.strip() for name in outputs.split(",")))
    for name in names:
        graph_name(name, manifest)
    return names


def _head(head: str, manifest: Manifest) -> int | None:
    """Number of a head, None for their mean. Raises InvalidRequest."""
    if head == "mean":
        return None
    heads = manifest.outputs["attention"][0]
    if not (head.isascii() and head.isdigit() and int(head) < heads):
        raise InvalidRequest(f"head is {head!r}; {manifest.name!r} has heads 0 to {heads - 1}, and `mean`", "head")
    return int(head)


def _located(error: PatchsightError, index: int) -> PatchsightError:
    error.param = error.param or f"images[{index}]"
    return error


def _stack(results: Sequence[Mapping[str, Values]], outputs: Sequence[str], unit_length: bool) -> dict[str, Values]:
    """By output, `(N, …)` over the images that went well; nothing if there are none."""
    if not results:
        return {}
    arrays = {output: np.concatenate([result[output][None] for result in results]) for output in outputs}
    return {o: to_unit_length(a) if unit_length and o in VECTORS else a for o, a in arrays.items()}


def _entries(count: int, failures: Mapping[int, PatchsightError], arrays: Mapping[str, Values]) -> list[dict[str, Any]]:
    """The results of the JSON reply: vectors as lists, what has more axes packed."""
    entries: list[dict[str, Any]] = []
    row = 0
    for index in range(count):
        if index in failures:
            entries.append({"index": index, "error": error_body(failures[index])})
            continue
        values = {o: a[row] if o in VECTORS else packed(a[row]) for o, a in arrays.items()}
        entries.append({"index": index, **values})
        row += 1
    return entries
