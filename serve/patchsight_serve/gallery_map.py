"""`/gallery/map`: where on a plane the images of a gallery are, so that what is alike lies together."""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from fastapi import APIRouter, Depends, Query, Request
from starlette.responses import Response

from patchsight_serve.collection import DEFAULT
from patchsight_serve.departure import while_connected
from patchsight_serve.galleries import GalleryQuery, described
from patchsight_serve.gallery import Gallery
from patchsight_serve.group_schemas import SURVEY_ERRORS, MapReply
from patchsight_serve.linkage import Pause
from patchsight_serve.nearest import F32, I64
from patchsight_serve.principal import principal, scaled
from patchsight_serve.replies import json_reply
from patchsight_serve.survey import Surveys
from patchsight_serve.umaps import Outcome, Umaps

MOST = 20_000  # images on a map; more are no more to the eye, and minutes more to UMAP


@dataclass(frozen=True)
class Wanted:
    """What is asked for, from the query string."""

    method: Annotated[
        Literal["umap", "pca"],
        Query(
            description="umap: as soon as it is ready; until then the answer is by principal components, and says so. "
            "pca: by these alone; no UMAP is begun",
            examples=["pca"],
        ),
    ] = "umap"
    limit: Annotated[int, Query(ge=0, le=MOST, description="images at most; with 0 it tells how UMAP stands")] = MOST


class Plane(NamedTuple):
    """Positions by principal components. keys int64 `(N,)`, positions float32 `(N, 2)` from 0 to 1; images: of the
    gallery, of which those are a sample."""

    images: int
    keys: I64
    positions: F32


class Maps:
    """What a server needs for maps. They have a thread of their own: the first one comes at once, and near-duplicates
    may take an hour."""

    def __init__(self) -> None:
        self.surveys, self.umaps = Surveys(), Umaps()

    def close(self) -> None:
        """End what is in work."""
        self.umaps.close()
        self.surveys.close()


def router() -> APIRouter:
    """The route."""
    routes = APIRouter(tags=["gallery"])
    routes.get(
        "/gallery/map", summary="The whole gallery on a plane", responses={200: {"model": MapReply}, **SURVEY_ERRORS}
    )(map_of_gallery)
    return routes


async def map_of_gallery(
    request: Request, wanted: Annotated[Wanted, Depends()], gallery_name: GalleryQuery = DEFAULT
) -> Response:
    """By principal components at once; by UMAP (arXiv:1802.03426) when it is ready, which takes from ten seconds to
    minutes: it is begun by the first request for it, in a process of its own, and kept until images come or go.

    Up to 20,000 images all are shown; of more a sample, always the same one, in which an image that is added or removed
    changes one place at most. Equal galleries of up to 20,000 images have equal maps.
    """
    maps: Maps = request.app.state.maps
    gallery = await asyncio.to_thread(request.app.state.galleries.get, gallery_name)
    async with while_connected(request):
        plane = await maps.surveys.ask(gallery, "map", place)
    outcome = await asyncio.to_thread(maps.umaps.look, gallery, plane.keys, wanted.method == "umap")
    return await asyncio.to_thread(_reply, gallery, plane, outcome, wanted)


def place(keys: I64, vectors: F32, pause: Pause, most: int = MOST) -> Plane:
    """The principal components of a sample of the unit vectors `(N, D)` of these keys int64 `(N,)`."""
    rows = sample(keys, most)
    pause()
    return Plane(len(keys), keys[rows], scaled(principal(vectors[rows])))


def sample(keys: I64, most: int = MOST) -> I64:
    """Rows of up to `most` of these keys `(N,)`: those whose hash (splitmix64) is lowest, lowest first."""
    mixed = keys.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    rows: I64 = np.argsort(mixed, kind="stable")[:most]
    return rows


def _reply(gallery: Gallery, plane: Plane, outcome: Outcome, wanted: Wanted) -> Response:
    keys, positions, method = plane.keys, plane.positions, "pca"
    if wanted.method == "umap" and outcome.keys is not None and outcome.plane is not None:
        keys, positions, method = outcome.keys, outcome.plane, "umap"
    keys, positions = keys[: wanted.limit], positions[: wanted.limit]
    names = gallery.names(keys)
    there = [row for row, key in enumerate(keys.tolist()) if key in names]
    shown = keys[there].tolist()
    labels = dict(_labels(gallery, set(shown)))
    xs, ys = np.ascontiguousarray(positions[there].T.reshape(2, -1))
    content: dict[str, Any] = {
        "encoder": described(gallery.encoder),
        "method": method,
        "umap": {"state": outcome.state, "error": outcome.error},
        "images": plane.images,
        "shown": len(shown),
        "ids": [names[key][0] for key in shown],
        "labels": [labels.get(key) for key in shown],
        "xs": xs,
        "ys": ys,
    }
    return json_reply(content)


def _labels(gallery: Gallery, keys: set[int]) -> Iterable[tuple[int, str]]:
    """The labels of those of the keys that have one."""
    if not keys:
        return ()
    return (pair for labelled in gallery.labels() for pair in labelled if pair[0] in keys)
