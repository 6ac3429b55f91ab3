"""`/gallery/clusters`: what a whole gallery is made of, with the most typical images of each part."""

import asyncio
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from math import sqrt
from typing import Annotated, Literal, NamedTuple

import numpy as np
from fastapi import APIRouter, Depends, Query, Request
from starlette.responses import Response

from patchsight_serve import density
from patchsight_serve.collection import DEFAULT
from patchsight_serve.density import MAX_VECTORS
from patchsight_serve.departure import while_connected
from patchsight_serve.errors import InvalidRequest
from patchsight_serve.galleries import GalleryQuery, described
from patchsight_serve.gallery import Gallery
from patchsight_serve.group import Cluster, LabelCount, Typical
from patchsight_serve.group_schemas import SURVEY_ERRORS, ClustersReply
from patchsight_serve.kmeans import Clustering, kmeans
from patchsight_serve.linkage import Pause
from patchsight_serve.nearest import F32, I64
from patchsight_serve.replies import json_reply
from patchsight_serve.survey import Surveys

MAX_CLUSTERS = 1000
MAX_TYPICAL = 100
MIN_SIZE = 5  # of a cluster by density
LABELS = 3  # of each cluster


@dataclass(frozen=True)
class Wanted:
    """What is asked for, from the query string."""

    k: Annotated[
        int | None,
        Query(
            ge=1, le=MAX_CLUSTERS,
            description="how many, up to the number of images; by default √(images / 2), from 2 to 100",
        ),
    ] = None  # fmt: skip
    method: Annotated[
        Literal["kmeans", "hdbscan"],
        Query(
            description="kmeans, spherical: every image is in a cluster. hdbscan, by density: it finds how many there "
            f"are, and images between them are in none; up to {MAX_VECTORS:,} images, where scikit-learn is installed",
            examples=["kmeans"],
        ),
    ] = "kmeans"
    min_size: Annotated[
        int | None, Query(ge=2, le=1000, description="of hdbscan: images that a cluster has at least; by default 5")
    ] = None
    typical: Annotated[int, Query(ge=1, le=MAX_TYPICAL, description="images shown of each cluster")] = 9


class Partition(NamedTuple):
    """The clusters of a gallery as they are kept: without labels, which may change.

    keys: of images in clusters, int64 `(N,)`, ascending. owner: the cluster of each, int64 `(N,)`, 0 for the largest.
    typical: for each cluster keys int64 and scores float32 `(M,)` of its most typical images, best first. unclustered:
    how many images are in none.
    """

    keys: I64
    owner: I64
    typical: list[tuple[I64, F32]]
    unclustered: int


def router() -> APIRouter:
    """The route."""
    routes = APIRouter(tags=["gallery"])
    routes.get(
        "/gallery/clusters",
        summary="Clusters of the whole gallery",
        responses={
            200: {"model": ClustersReply},
            **SURVEY_ERRORS,
        },
    )(clusters)
    return routes


async def clusters(
    request: Request, wanted: Annotated[Wanted, Depends()], gallery_name: GalleryQuery = DEFAULT
) -> Response:
    """By k-means every image is in the cluster to whose center it is nearest; there are fewer than `k` where fewer
    than `k` images differ. Equal galleries give equal clusters, in whatever order their images were added.

    The largest first. It is the gallery as it was when the work began; what is removed meanwhile is not shown.
    """
    surveys: Surveys = request.app.state.surveys
    gallery = await asyncio.to_thread(request.app.state.galleries.get, gallery_name)
    count = await asyncio.to_thread(len, gallery)
    _check(wanted, count)
    question = "clusters", wanted.method, wanted.k, wanted.min_size
    async with while_connected(request):
        partition = await surveys.ask(gallery, question, partial(part, gallery, wanted))
    return await asyncio.to_thread(_reply, gallery, partition, wanted.typical)


def default_k(images: int) -> int:
    """√(N / 2), from 2 to 100, and no more than there are images."""
    return min(max(round(sqrt(images / 2)), 2), 100, images)


def _check(wanted: Wanted, count: int) -> None:
    if wanted.method == "hdbscan":
        if wanted.k is not None:
            raise InvalidRequest(f"k is {wanted.k}, but hdbscan finds how many there are; it takes min_size", "k")
        density.require(count)
    elif wanted.min_size is not None:
        raise InvalidRequest(f"min_size is {wanted.min_size}; it is for method=hdbscan", "min_size")
    elif wanted.k is not None and wanted.k > count > 0:
        raise InvalidRequest(f"k is {wanted.k}, the gallery has {count:,} images: it must be 1 to {count:,}", "k")


def _divided(wanted: Wanted, vectors: F32, pause: Pause) -> Clustering:
    if wanted.method == "hdbscan":
        return density.hdbscan(vectors, wanted.min_size or MIN_SIZE, pause)
    count = default_k(len(vectors)) if wanted.k is None else min(wanted.k, len(vectors))
    return kmeans(vectors, count, pause)


def part(gallery: Gallery, wanted: Wanted, keys: I64, vectors: F32, pause: Pause) -> Partition:
    """The clusters of the unit vectors `(N, D)` of these keys int64 `(N,)`; of none, none."""
    if not len(keys):
        return Partition(keys, keys, [], 0)
    centers, owner, scores = _divided(wanted, vectors, pause)
    inside = owner >= 0
    unclustered = int(len(keys) - inside.sum())
    keys, owner, scores = keys[inside], owner[inside], scores[inside]
    if not len(keys):
        return Partition(keys, owner, [], unclustered)
    sizes = np.bincount(owner)
    candidates = [_candidates(np.flatnonzero(owner == cluster), scores) for cluster in range(len(centers))]
    names = gallery.names(keys[np.concatenate(candidates)])
    typical = []
    for rows in candidates:
        pause()
        found = zip(keys[rows].tolist(), scores[rows].tolist(), strict=True)
        typical.append(sorted((-score, names[key][0], key) for key, score in found if key in names)[:MAX_TYPICAL])
    ranking = sorted(range(len(centers)), key=lambda cluster: (-sizes[cluster], [id for _, id, _ in typical[cluster]]))
    return Partition(keys, np.argsort(ranking)[owner], [_arrays(typical[cluster]) for cluster in ranking], unclustered)


def _candidates(rows: I64, scores: F32) -> I64:
    """Those of a cluster's rows that may be among its most typical ones, ties included."""
    if len(rows) <= MAX_TYPICAL:
        return rows
    best: I64 = rows[scores[rows] >= np.partition(scores[rows], -MAX_TYPICAL)[-MAX_TYPICAL]]
    return best


def _arrays(ranked: list[tuple[float, str, int]]) -> tuple[I64, F32]:
    keys = np.array([key for _, _, key in ranked], np.int64)
    return keys, np.array([-score for score, _, _ in ranked], np.float32)


def _reply(gallery: Gallery, partition: Partition, typical: int) -> Response:
    content = {
        "encoder": described(gallery.encoder),
        "images": len(partition.keys),
        "unclustered": partition.unclustered,
        "clusters": [asdict(cluster) for cluster in _described(gallery, partition, typical)],
    }
    return json_reply(content)


def _described(gallery: Gallery, partition: Partition, typical: int) -> Iterator[Cluster]:
    """The clusters with their images and labels as these are now."""
    sizes = np.bincount(partition.owner, minlength=len(partition.typical)).tolist()
    counts = _label_counts(gallery, partition)
    shown = [keys[:typical] for keys, _ in partition.typical]
    images = gallery.images(np.concatenate([np.empty(0, np.int64), *shown]))
    for size, count, (keys, scores) in zip(sizes, counts, partition.typical, strict=True):
        labels = sorted(count.items(), key=lambda item: (-item[1], item[0]))[:LABELS]
        best = zip(keys[:typical].tolist(), scores[:typical].tolist(), strict=True)
        yield Cluster(
            size,
            [LabelCount(label, number) for label, number in labels],
            [Typical(images[key].id, images[key].label, score) for key, score in best if key in images],
        )


def _label_counts(gallery: Gallery, partition: Partition) -> list[Counter[str]]:
    """For each cluster how many of its images have which label."""
    counts: list[Counter[str]] = [Counter() for _ in partition.typical]
    if not counts:
        return counts
    for labelled in gallery.labels():
        keys = np.array([key for key, _ in labelled], np.int64)
        places = np.searchsorted(partition.keys, keys).clip(max=len(partition.keys) - 1)
        known = partition.keys[places] == keys
        for (_, label), owner, is_known in zip(labelled, partition.owner[places].tolist(), known.tolist(), strict=True):
            if is_known:
                counts[owner][label] += 1
    return counts
