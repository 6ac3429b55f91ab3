"""`/neighbors/region`: the images of a gallery that contain a region of a picture."""

import asyncio
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from starlette.responses import Response

from patchsight_serve.bodies import read_images
from patchsight_serve.collection import DEFAULT
from patchsight_serve.departure import while_connected
from patchsight_serve.errors import Conflict, InvalidRequest, NotFound, PatchsightError
from patchsight_serve.galleries import EncoderQuery, GalleryQuery, described
from patchsight_serve.gallery import Gallery
from patchsight_serve.indexer import encoder_of
from patchsight_serve.loaded import Loaded
from patchsight_serve.neighbors import Choice
from patchsight_serve.outputs import graph_name
from patchsight_serve.region import Box
from patchsight_serve.region_schemas import REGION_ERRORS, RegionReply
from patchsight_serve.region_search import RegionSearches
from patchsight_serve.replies import json_reply
from patchsight_serve.schemas import IMAGE_ERRORS, image_body
from patchsight_serve.service import Service

MAX_CANDIDATES = 500


@dataclass(frozen=True)
class Wanted(Choice):
    """What both routes ask for, from the query string."""

    k: Annotated[int, Query(ge=1, le=MAX_CANDIDATES, description="how many, of the candidates")] = 10
    candidates: Annotated[
        int,
        Query(
            ge=1, le=MAX_CANDIDATES,
            description="how many of the nearest images are looked at patch by patch: each costs an inference",
        ),
    ] = 200  # fmt: skip


BoxQuery = Annotated[
    str,
    Query(
        description="the region: left, top, right and bottom as fractions, 0 to 1, of the upright picture's width and "
        "height",
        examples=["0.25,0.1,0.6,0.5"],
    ),
]


def router() -> APIRouter:
    """The two routes."""
    routes = APIRouter(tags=["gallery"])
    routes.get(
        "/neighbors/region",
        summary="Images that contain a region of an indexed image",
        responses={200: {"model": RegionReply}, **IMAGE_ERRORS, **REGION_ERRORS},
    )(of_indexed)
    routes.post(
        "/neighbors/region",
        summary="Images that contain a region of an uploaded image",
        openapi_extra={"requestBody": image_body(several=False)},
        responses={200: {"model": RegionReply}, **IMAGE_ERRORS, **REGION_ERRORS},
    )(of_uploaded)
    return routes


async def of_indexed(
    request: Request,
    wanted: Annotated[Wanted, Depends()],
    id: Annotated[str, Query(description="of an image in the gallery that has its original; it is left out itself")],
    box: BoxQuery,
    gallery_name: GalleryQuery = DEFAULT,
    encoder: EncoderQuery = None,
) -> Response:
    """As for an uploaded image."""
    gallery, loaded = await _subject(request, gallery_name, encoder)
    place = _checked(box, wanted)
    data = await asyncio.to_thread(_original, gallery, id)
    return await _reply(request, gallery, loaded, wanted, data, place, [id])


async def of_uploaded(
    request: Request,
    wanted: Annotated[Wanted, Depends()],
    box: BoxQuery,
    gallery_name: GalleryQuery = DEFAULT,
    encoder: EncoderQuery = None,
) -> Response:
    """The nearest images, by the picture and by the region's surroundings in turn, are computed anew from their
    originals and compared with the region patch by patch. Best first, equal scores in the order of their ids; `box`
    says where in an image the region was found.

    It is looked for in the part of each image that the encoder sees, as a rule its central square.
    """
    service: Service = request.app.state.service
    gallery, loaded = await _subject(request, gallery_name, encoder)
    place = _checked(box, wanted)
    service.refuse_if_full(loaded)
    (data,) = await read_images(request, replace(service.body_limits, max_images=1))
    if isinstance(data, PatchsightError):
        data.param = "images[0]"
        raise data
    return await _reply(request, gallery, loaded, wanted, data, place, [])


async def _subject(request: Request, gallery_name: str, encoder: str | None) -> tuple[Gallery, Loaded]:
    """Raises NotFound, Conflict, and InvalidRequest for an encoder without patch tokens."""
    gallery = await asyncio.to_thread(request.app.state.galleries.get, gallery_name)
    loaded = await asyncio.to_thread(encoder_of, request.app.state.service, gallery, encoder)
    graph_name("patch_tokens", loaded.manifest, "encoder")
    return gallery, loaded


def _checked(box: str, wanted: Wanted) -> Box:
    if wanted.k > wanted.candidates:
        raise InvalidRequest(f"k is {wanted.k}, of {wanted.candidates} candidates", "k")
    wanted.chosen()  # what is wrong with it is said before anything is embedded
    return Box.parse(box)


def _original(gallery: Gallery, id: str) -> bytes:
    """Raises NotFound where there is no such image, Conflict where its original was not kept."""
    gallery.get(id)
    try:
        return gallery.original(id)
    except NotFound as error:
        raise Conflict(error.message, "id") from None


async def _reply(
    request: Request, gallery: Gallery, loaded: Loaded, wanted: Wanted, data: bytes, box: Box, leave_out: list[str]
) -> Response:
    searches: RegionSearches = request.app.state.region_searches
    timing = request.state.timing
    timing.images = 1
    nearest = partial(
        gallery.neighbors, k=wanted.candidates, leave_out=leave_out, label=wanted.label, filter=wanted.chosen()
    )
    async with while_connected(request), searches.admitted():
        region = await searches.region(data, box, loaded, timing)
        await asyncio.to_thread(gallery.require, loaded.identity)  # another encoder may have filled it meanwhile
        found = await searches.search(gallery, region, loaded, wanted.k, nearest, timing)
    content: dict[str, Any] = {"encoder": described(loaded.identity), **found._asdict()}
    return json_reply(content | {"neighbors": [asdict(neighbor) for neighbor in found.neighbors]})
