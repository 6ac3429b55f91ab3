"""The k-NN protocol through a server's gallery: its images vote, and the server finds the neighbors."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from patchsight_serve.client import Client
from patchsight_serve.dataset import Dataset, classes_of
from patchsight_serve.errors import Conflict, InvalidRequest, PatchsightError
from patchsight_serve.item import Identity, Neighbor
from patchsight_serve.labelled import Embedded
from patchsight_serve.nearest import F32, I64
from patchsight_serve.protocol import KS, Figures, judged
from patchsight_serve.vote import vote

NO_VECTORS = np.empty((0, 0), np.float32)  # they stay with the server


@dataclass(frozen=True)
class LabelledGallery:
    """What can vote: label by id, of all images; which encoder made them, which embedding; how the server searches."""

    name: str
    labels: dict[str, str]
    encoder: Identity
    output: str
    index: dict[str, Any]


def read_gallery(client: Client, name: str) -> LabelledGallery:
    """Raises NotFound; InvalidRequest where it is empty, or an image of it has no label."""
    told = client.gallery(gallery=name)
    if not told["count"]:
        raise InvalidRequest(f"gallery {name!r} is empty", "gallery")
    encoder = Identity(**told["encoder"])
    labels = {}
    for image in client.gallery_images(gallery=name):
        if image["label"] is None:
            raise InvalidRequest(f"image {image['id']!r} of gallery {name!r} has no label", "gallery")
        labels[image["id"]] = image["label"]
    recommended = {found["name"]: found["manifest"]["recommended"] for found in client.encoders()}
    return LabelledGallery(name, labels, encoder, recommended.get(encoder.name, "unstated"), told["index"])


def numbered(gallery: LabelledGallery, test: Dataset) -> tuple[I64, list[str] | None]:
    """The labels of the gallery's images by the numbers of the test's classes, int64 in its order, and the names of the
    classes: those of the test images, then those that the gallery alone has. Equal votes go to the lower number."""
    labels, names = classes_of(list(gallery.labels.values()))
    if (names is None) != (test.class_names is None):
        here, there = ("names", "numbers") if names is None else ("numbers", "names")
        raise InvalidRequest(f"the classes of the test images are {here}, those of gallery {gallery.name!r} {there}")
    if names is None or test.class_names is None:
        return labels, None
    classes = list(dict.fromkeys([*test.class_names, *names]))
    number = np.array([classes.index(name) for name in names], dtype=np.int64)
    return number[labels], classes


def evaluate_in_gallery(
    client: Client, gallery: LabelledGallery, labels: I64, test: Dataset, advance: Callable[[int], None]
) -> tuple[Embedded, Figures]:
    """As `protocol.evaluate`, equal similarities by id. labels: int64 `(N,)`, of the gallery's images in its order.
    The test images that could be read, and the figures. advance: told how many of them are done.

    Raises InvalidRequest if none can be read, Conflict where the gallery is changed meanwhile.
    """
    assert test.labels is not None
    ks = [k for k in KS if k <= len(labels)]
    label_of = dict(zip(gallery.labels, labels.tolist(), strict=True))
    num_classes = int(max(labels.max(), test.labels.max())) + 1
    rows: list[int] = []
    skipped: list[tuple[str, str]] = []
    predictions: dict[int, list[int]] = {k: [] for k in ks}
    for i, found in enumerate(_neighbors(client, gallery, test, max(ks))):
        if isinstance(found, PatchsightError):
            skipped.append((test.names[i], found.message))
        else:
            similarity, classes = _voters(gallery, found, label_of, max(ks))
            rows.append(i)
            for k in ks:
                predictions[k].append(int(vote(similarity, classes, num_classes, k)[0]))
        advance(1)
    if not rows:
        name, reason = skipped[0]
        raise InvalidRequest(f"none of {len(test)} images can be read; {name}: {reason}")
    known = Embedded([test.names[i] for i in rows], test.labels[rows], NO_VECTORS, skipped)
    return known, judged({k: np.array(found, np.int64) for k, found in predictions.items()}, known.labels)


def _neighbors(
    client: Client, gallery: LabelledGallery, test: Dataset, k: int
) -> Iterator[list[Neighbor] | PatchsightError]:
    unread: dict[int, PatchsightError] = {}

    def pictures() -> Iterator[bytes]:
        for i in range(len(test)):
            try:
                yield test.read(i)
            except (OSError, PatchsightError) as error:
                unread[i] = PatchsightError(str(error))
                yield b""

    found = client.neighbors_each(pictures(), gallery=gallery.name, k=k, encoder=gallery.encoder.name)
    for i, neighbors in enumerate(found):
        yield unread.get(i, neighbors)


def _voters(gallery: LabelledGallery, found: list[Neighbor], label_of: dict[str, int], k: int) -> tuple[F32, I64]:
    """Similarity float32 and class int64 of a query's neighbors, both `(1, k)`."""
    if len(found) != k or any(gallery.labels.get(one.id) != one.label for one in found):
        raise Conflict(f"gallery {gallery.name!r} was changed during the work", "gallery")
    similarity = np.array([[one.score for one in found]], np.float32)
    return similarity, np.array([[label_of[one.id] for one in found]], np.int64)
