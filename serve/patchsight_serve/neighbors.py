"""`/neighbors`: the most similar images of a gallery, to an indexed image, an uploaded one, or examples."""

import asyncio
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Depends, Query, Request
from starlette.responses import Response

from patchsight_serve.bodies import media_type, parse_json, read_body, read_images
from patchsight_serve.collection import DEFAULT
from patchsight_serve.departure import while_connected
from patchsight_serve.errors import InvalidRequest, PatchsightError
from patchsight_serve.filters import MAX_LABELS, Filter
from patchsight_serve.galleries import EncoderQuery, GalleryQuery, described
from patchsight_serve.gallery import MAX_K, Gallery
from patchsight_serve.gallery_schemas import NEIGHBORS_BODY, NeighborsReply
from patchsight_serve.indexer import encoder_of
from patchsight_serve.item import Identity, Neighbor
from patchsight_serve.nearest import F32, normalize
from patchsight_serve.replies import json_reply
from patchsight_serve.schemas import IMAGE_ERRORS, ErrorReply
from patchsight_serve.service import Service
from patchsight_serve.vote import votes

MAX_EXAMPLES = 1000
FILTER_EXAMPLE = '{"camera": "x100", "place.city": "Rome", "year": {"gte": 2010, "lt": 2020}}'
FILTER = (
    "only images with such metadata: a JSON object, all of which must hold. Under a key, with dots into objects, is "
    "what it is equal to, or an object with `gt`, `gte`, `lt`, `lte`, `ne`, `in` (a list) or `exists` (a boolean)"
)
_ERRORS: dict[int | str, dict[str, Any]] = {
    404: {"model": ErrorReply, "description": "Unknown gallery or id."},
    409: {"model": ErrorReply, "description": "A gallery of another encoder."},
}


@dataclass(frozen=True)
class Choice:
    """Which images may be found, from the query string."""

    label: Annotated[
        list[str] | None,
        Query(max_length=MAX_LABELS, description="only images of this label; given several times, of any of them"),
    ] = None
    filter: Annotated[str | None, Query(description=FILTER, examples=[FILTER_EXAMPLE])] = None

    def chosen(self) -> Filter | None:
        """What `filter` says. Raises InvalidRequest."""
        return None if self.filter is None else Filter.parse(self.filter)


@dataclass(frozen=True)
class Wanted(Choice):
    """What both routes ask for."""

    k: Annotated[int, Query(ge=1, le=MAX_K, description="how many; more than there are returns all")] = 10
    min_score: Annotated[float, Query(ge=-1, le=1, description="only scores from this on")] = -1.0
    vote: Annotated[bool, Query(description="add the class that the neighbors vote for")] = False


def router() -> APIRouter:
    """The two routes."""
    routes = APIRouter(tags=["gallery"])
    routes.get(
        "/neighbors", summary="Neighbors of an indexed image", responses={200: {"model": NeighborsReply}, **_ERRORS}
    )(of_indexed)
    routes.post(
        "/neighbors",
        summary="Neighbors of an uploaded image, or of examples",
        openapi_extra={"requestBody": NEIGHBORS_BODY},
        responses={200: {"model": NeighborsReply}, **IMAGE_ERRORS, **_ERRORS},
    )(of_uploaded)
    return routes


async def of_indexed(
    request: Request,
    wanted: Annotated[Wanted, Depends()],
    id: Annotated[str, Query(description="of an image in the gallery; it is left out itself")],
    gallery_name: GalleryQuery = DEFAULT,
    encoder: EncoderQuery = None,
) -> Response:
    """Best first, equal scores in the order of their ids."""
    filter = wanted.chosen()
    gallery = await asyncio.to_thread(request.app.state.galleries.get, gallery_name)
    if encoder is not None:
        await asyncio.to_thread(encoder_of, request.app.state.service, gallery, encoder)
    (query,) = await asyncio.to_thread(gallery.vectors, [id])
    return await _reply(gallery, query, wanted, filter, [id])


async def of_uploaded(
    request: Request,
    wanted: Annotated[Wanted, Depends()],
    gallery_name: GalleryQuery = DEFAULT,
    encoder: EncoderQuery = None,
) -> Response:
    """Best first, equal scores in the order of their ids. Of an empty gallery, none.

    As JSON: the mean of the indexed images `ids` and of `vectors`, each scaled to length 1, less the mean of
    `negative`, which holds ids or vectors. The images named are left out themselves.
    """
    service: Service = request.app.state.service
    filter = wanted.chosen()  # what is wrong with it is said before anything is embedded
    gallery = await asyncio.to_thread(request.app.state.galleries.get, gallery_name)
    if media_type(request) == "application/json":
        if encoder is not None:
            await asyncio.to_thread(encoder_of, service, gallery, encoder)
        body = await read_body(request, service.body_limits)
        query, ids = await asyncio.to_thread(_of_examples, gallery, body)
        return await _reply(gallery, query, wanted, filter, ids)
    loaded = await asyncio.to_thread(encoder_of, service, gallery, encoder)
    service.refuse_if_full(loaded)
    images = await read_images(request, replace(service.body_limits, max_images=1))
    request.state.timing.images = len(images)
    async with while_connected(request):
        (result,) = await service.embed_images(images, loaded, ("embedding",), request.state.timing)
    if isinstance(result, PatchsightError):
        result.param = result.param or "images[0]"
        raise result
    await asyncio.to_thread(gallery.require, loaded.identity)  # it may have been filled by another encoder meanwhile
    return await _reply(gallery, result["embedding"], wanted, filter, [], loaded.identity)


async def _reply(
    gallery: Gallery,
    query: F32,
    wanted: Wanted,
    filter: Filter | None,
    leave_out: Sequence[str],
    encoder: Identity | None = None,
) -> Response:
    """encoder: as told in the reply; by default the one that the gallery is bound to."""

    def search() -> tuple[list[Neighbor], Identity | None]:
        found = gallery.neighbors(
            query, wanted.k, leave_out=leave_out, label=wanted.label, filter=filter, min_score=wanted.min_score
        )
        return found, encoder or gallery.encoder

    found, made_by = await asyncio.to_thread(search)
    content: dict[str, Any] = {"encoder": described(made_by), "neighbors": [asdict(neighbor) for neighbor in found]}
    if wanted.vote:
        content["vote"] = elect(found)
    return json_reply(content)


def elect(neighbors: Sequence[Neighbor]) -> dict[str, Any]:
    """The vote of all neighbors that have a label: which label, and its share of the weights."""
    labelled = [(n.label, n.score) for n in neighbors if n.label is not None]
    if not labelled:
        return {"label": None, "confidence": 0.0}
    classes = sorted({label for label, _ in labelled})
    numbers = np.array([[classes.index(label) for label, _ in labelled]], dtype=np.int64)
    scores = np.array([[score for _, score in labelled]], dtype=np.float32)
    (weights,) = votes(scores, numbers, len(classes), len(labelled))
    winner = int(weights.argmax())
    return {"label": classes[winner], "confidence": float(weights[winner] / weights.sum())}


def _of_examples(gallery: Gallery, body: bytes) -> tuple[F32, list[str]]:
    """The query that a JSON body describes, `(D,)`, and the ids in it. Raises InvalidRequest, NotFound."""
    content = parse_json(body)
    keys = {"ids", "vectors", "negative"}
    if not isinstance(content, dict) or set(content) - keys:
        raise InvalidRequest('the JSON body must be an object with "ids", "vectors" and "negative", each optional')
    parts = {key: content.get(key) or [] for key in sorted(keys)}
    for key, part in parts.items():
        if not isinstance(part, list):
            raise InvalidRequest(f"{key!r} must be a list", key)
    if not parts["ids"] and not parts["vectors"]:
        raise InvalidRequest("there must be an id or a vector to look for", "ids")
    if sum(map(len, parts.values())) > MAX_EXAMPLES:
        raise InvalidRequest(f"{sum(map(len, parts.values())):,} examples, the limit is {MAX_EXAMPLES:,}")
    positive = [_vector(gallery, e, f"ids[{i}]", str) for i, e in enumerate(parts["ids"])]
    positive += [_vector(gallery, e, f"vectors[{i}]", list) for i, e in enumerate(parts["vectors"])]
    negative = [_vector(gallery, e, f"negative[{i}]", object) for i, e in enumerate(parts["negative"])]
    sizes = {vector.size for vector in positive + negative}
    if len(sizes) > 1:
        raise InvalidRequest(f"the vectors have different sizes: {sorted(sizes)}", "vectors")
    query = np.stack(positive).astype(np.float64).mean(axis=0)
    if negative:
        query -= np.stack(negative).astype(np.float64).mean(axis=0)
    if not query.any():
        raise InvalidRequest("the examples cancel each other out: nothing is left to look for")
    return query, [e for part in (parts["ids"], parts["negative"]) for e in part if isinstance(e, str)]


def _vector(gallery: Gallery, example: Any, where: str, kind: type) -> F32:
    """The unit vector of an id or of a list of numbers."""
    if not isinstance(example, kind) or not isinstance(example, str | list):
        raise InvalidRequest(f"{where} must be {'an id' if kind is str else 'a list of numbers'}", where)
    if isinstance(example, str):
        vector: F32 = gallery.vectors([example])[0]
        return vector
    if not example or not all(type(number) in (int, float) for number in example):
        raise InvalidRequest(f"{where} must be a list of numbers", where)
    try:
        return normalize(np.array(example, dtype=np.float64))
    except InvalidRequest as error:
        raise InvalidRequest(error.message.replace("vector 0", where), where) from None
