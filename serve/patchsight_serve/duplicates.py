"""`/gallery/duplicates`: groups of near-duplicates in a whole gallery."""

import asyncio
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated, NamedTuple

import numpy as np
from fastapi import APIRouter, Depends, Query, Request
from starlette.responses import Response

from patchsight_serve.collection import DEFAULT
from patchsight_serve.departure import while_connected
from patchsight_serve.errors import InvalidRequest
from patchsight_serve.galleries import GalleryQuery, described
from patchsight_serve.gallery import Gallery
from patchsight_serve.group import Group, Member
from patchsight_serve.group_schemas import SURVEY_ERRORS, DuplicatesReply
from patchsight_serve.linkage import Pause, central, components
from patchsight_serve.nearest import F32, I64
from patchsight_serve.replies import json_reply
from patchsight_serve.survey import Surveys

LEAST_SCORE = 0.5
MOST = 500_000  # images: every pair of them takes an hour or so of one core
_CURSOR = re.compile(r"([0-9]{1,18})\.([A-Za-z0-9._-]{1,128})")


@dataclass(frozen=True)
class Wanted:
    """What is asked for, from the query string."""

    min_score: Annotated[
        float,
        Query(
            description="pairs with a cosine similarity from this on are linked",
            json_schema_extra={"minimum": LEAST_SCORE, "maximum": 1},
        ),
    ] = 0.95
    limit: Annotated[int, Query(ge=1, le=1000, description="groups per page")] = 100
    members: Annotated[int, Query(ge=1, le=1000, description="images listed of a group; `size` counts all")] = 100
    cursor: Annotated[str, Query(description="`next_cursor` of the page before")] = ""


class Linked(NamedTuple):
    """A group as it is kept: without labels, which may change. keys int64 and scores float32 `(M,)`: the most central
    image first, then by score. copies: of which id a key has just the bytes."""

    id: str
    keys: I64
    scores: F32
    copies: dict[int, str]

    @property
    def place(self) -> tuple[int, str]:
        """Where it comes: the largest first, then by id."""
        return -len(self.keys), self.id


class Linkage(NamedTuple):
    """All groups of a gallery, in their order, and how many images were compared."""

    images: int
    groups: list[Linked]


def router() -> APIRouter:
    """The route."""
    routes = APIRouter(tags=["gallery"])
    routes.get(
        "/gallery/duplicates",
        summary="Near-duplicates in the whole gallery",
        responses={
            200: {"model": DuplicatesReply},
            **SURVEY_ERRORS,
        },
    )(duplicates)
    return routes


async def duplicates(
    request: Request, wanted: Annotated[Wanted, Depends()], gallery_name: GalleryQuery = DEFAULT
) -> Response:
    """Images are in one group if pairs lead from one to the other whose cosine similarity is `min_score` or more; alone
    they are in none. Every image is compared with every other, up to 500,000, which takes time by the square of their
    number, once: further pages, and the same question again, are answered at once until an image is added or removed.

    The largest group first, equally large ones in the order of their ids. It is the gallery as it was when the work
    began; what is removed meanwhile is left out.
    """
    if not LEAST_SCORE <= wanted.min_score <= 1:
        message = f"min_score is {wanted.min_score}, it must be {LEAST_SCORE} to 1: below, nearly all images are linked"
        raise InvalidRequest(message, "min_score")
    after = _place(wanted.cursor)
    surveys: Surveys = request.app.state.surveys
    gallery = await asyncio.to_thread(request.app.state.galleries.get, gallery_name)
    count = await asyncio.to_thread(len, gallery)
    if count > MOST:
        message = f"the gallery has {count:,} images; every pair is compared, which is done for {MOST:,} at most"
        raise InvalidRequest(message, "gallery")
    async with while_connected(request):
        work = partial(link, gallery, wanted.min_score)
        linkage = await surveys.ask(gallery, ("duplicates", wanted.min_score), work)
    return await asyncio.to_thread(_page, gallery, linkage, after, wanted)


def link(gallery: Gallery, min_score: float, keys: I64, vectors: F32, pause: Pause) -> Linkage:
    """All groups among the unit vectors `(N, D)` of these keys int64 `(N,)`."""
    component = components(vectors, min_score, pause)
    grouped = np.flatnonzero(np.bincount(component)[component] > 1)
    rows = grouped[np.argsort(component[grouped], kind="stable")]
    names = gallery.names(keys[rows])
    groups = []
    for group in np.split(rows, np.flatnonzero(np.diff(component[rows])) + 1):
        pause()
        # By id, so that nothing depends on the order in which images were added.
        named = sorted((*names[key], row) for key, row in zip(keys[group].tolist(), group, strict=True) if key in names)
        if len(named) > 1:
            groups.append(_linked(keys, vectors, named))
    return Linkage(len(keys), sorted(groups, key=lambda group: group.place))


def _linked(keys: I64, vectors: F32, named: Sequence[tuple[str, str, int]]) -> Linked:
    """A group, of id, sha256 and row of its images, by id."""
    rows = np.array([row for _, _, row in named])
    first, scores = central(vectors, rows)
    ids = np.arange(len(rows))
    best = np.lexsort((ids, -scores, ids != first))
    originals: dict[str, str] = {}
    copies: dict[int, str] = {}
    for (id, sha256, _), key in zip(named, keys[rows].tolist(), strict=True):
        if sha256 and originals.setdefault(sha256, id) != id:  # of what came as a vector it may be unknown
            copies[key] = originals[sha256]
    return Linked(named[0][0], keys[rows][best], scores[best], copies)


def _place(cursor: str) -> tuple[int, str] | None:
    """Behind which group a page begins. Raises InvalidRequest."""
    if not cursor:
        return None
    match = _CURSOR.fullmatch(cursor)
    if match is None:
        raise InvalidRequest(f"cursor {ascii(cursor)[:60]} is none that this server gave", "cursor")
    return -int(match[1]), match[2]


def _page(gallery: Gallery, linkage: Linkage, after: tuple[int, str] | None, wanted: Wanted) -> Response:
    groups = linkage.groups
    start = 0 if after is None else bisect_right(groups, after, key=lambda group: group.place)
    shown = groups[start : start + wanted.limit]
    more = start + len(shown) < len(groups)
    content = {
        "encoder": described(gallery.encoder),
        "images": linkage.images,
        "total": len(groups),
        "groups": [asdict(group) for group in _described(gallery, shown, wanted.members)],
        "next_cursor": f"{len(shown[-1].keys)}.{shown[-1].id}" if more else None,
    }
    return json_reply(content)


def _described(gallery: Gallery, groups: Sequence[Linked], most: int) -> Iterator[Group]:
    """The groups with up to `most` of their images, as these are now."""
    images = gallery.images(np.concatenate([group.keys[:most] for group in groups] or [np.empty(0, np.int64)]))
    for group in groups:
        listed = list(zip(group.keys[:most].tolist(), group.scores[:most].tolist(), strict=True))
        members = [
            Member(images[key].id, images[key].label, score, group.copies.get(key))
            for key, score in listed
            if key in images
        ]
        size = len(group.keys) - (len(listed) - len(members))
        if size > 1:
            yield Group(group.id, size, members)
