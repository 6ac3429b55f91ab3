"""Bulk embedding into a gallery, of a server or of this machine. What is in the gallery is what is done: the same
command goes on after any stop, and changes nothing where nothing is missing."""

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from patchsight_serve.client import Client
from patchsight_serve.dataset import Dataset
from patchsight_serve.errors import NotFound, PatchsightError
from patchsight_serve.item import Added
from patchsight_serve.skipped import Skipped, shown

MOST_LISTED = 20  # images of a gallery to one of the source: beyond, sending each one is less than a list of all
ID_DIGITS = 32  # of the sha256, which are an image's id where it was given none

New = tuple[bytes, Mapping[str, Any]]


class Target(Protocol):
    """A gallery to fill."""

    def held(self, most: int) -> Iterable[tuple[str, str | None]]:
        """Id and sha256 of all images in it; none if there are more than `most`, which would take too long."""

    def add_each(self, images: Iterable[New]) -> Iterator[Added | PatchsightError]:
        """Add images with what is said about them; for each, in order, what came of it."""


@dataclass
class Filled:
    """How many images are new, and how many were there before."""

    created: int = 0
    there: int = 0


class ServerGallery:
    """A gallery of a server. encoder: named in each request, None for the one that it is bound to."""

    def __init__(self, client: Client, name: str, encoder: str | None) -> None:
        self._client, self._name = client, name
        self._query = {"gallery": name, "encoder": encoder}

    def held(self, most: int) -> Iterator[tuple[str, str | None]]:
        """As in `Target`."""
        try:
            if self._client.gallery(gallery=self._name)["count"] > most:
                return
            for image in self._client.gallery_images(gallery=self._name):
                yield image["id"], image["sha256"]
        except NotFound:  # the first image makes it
            return

    def add_each(self, images: Iterable[New]) -> Iterator[Added | PatchsightError]:
        """As in `Target`."""
        return self._client.add_each(images, **self._query)


def fill(dataset: Dataset, target: Target, skipped: Skipped, advance: Callable[[int], None]) -> Filled:
    """Add all images of a dataset: `metadata.path` is the name, the label that of the class, the id that of the bytes.
    An image whose bytes are there stays as it is, and is not sent where that is known; of copies in the dataset the
    first one is meant.

    advance: told how many images are done. Raises PatchsightError; what was added stays.
    """
    filling = _Filling(dataset, skipped, advance, target.held(MOST_LISTED * len(dataset)))
    for result in target.add_each(filling.to_send()):
        filling.settle(result)
    return filling.filled


class _Filling:
    """Which images are where; by the sha256 of their bytes."""

    def __init__(
        self, dataset: Dataset, skipped: Skipped, advance: Callable[[int], None],
        held: Iterable[tuple[str, str | None]],
    ) -> None:  # fmt: skip
        self._dataset, self._skipped, self._advance = dataset, skipped, advance
        # One under another id than its own does not count.
        self._there = {bytes.fromhex(sha256) for id, sha256 in held if sha256 and id == sha256[:ID_DIGITS]}
        self._bad: dict[bytes, str] = {}
        self._copies: dict[bytes, list[int]] = {}  # of those that are sent and not settled
        self._sent: deque[tuple[int, bytes]] = deque()
        self.filled = Filled()

    def to_send(self) -> Iterator[New]:
        """What has to be sent, in order."""
        for i in range(len(self._dataset)):
            try:
                data = self._dataset.read(i)
            except (OSError, PatchsightError) as error:
                self._leave_out(i, str(error))
                continue
            digest = hashlib.sha256(data).digest()
            if digest in self._there:
                self._count(created=False)
            elif digest in self._bad:
                self._leave_out(i, self._bad[digest])
            elif digest in self._copies:
                self._copies[digest].append(i)
            else:
                self._copies[digest] = []
                self._sent.append((i, digest))
                yield data, _said(self._dataset, i)

    def settle(self, result: Added | PatchsightError) -> None:
        """What came of the next one that was sent, and so of its copies."""
        i, digest = self._sent.popleft()
        copies = self._copies.pop(digest)
        if isinstance(result, PatchsightError):
            self._bad[digest] = result.message
            for one in (i, *copies):
                self._leave_out(one, result.message)
            return
        self._there.add(digest)
        self._count(result.created)
        for _ in copies:
            self._count(created=False)

    def _count(self, created: bool) -> None:
        self.filled.created += created
        self.filled.there += not created
        self._advance(1)

    def _leave_out(self, i: int, reason: str) -> None:
        self._skipped.add([(shown(self._dataset.names[i]), reason)])
        self._advance(1)


def _said(dataset: Dataset, i: int) -> dict[str, Any]:
    said: dict[str, Any] = {"metadata": {"path": shown(dataset.names[i])}}
    label = -1 if dataset.labels is None else int(dataset.labels[i])
    if label >= 0:
        said["label"] = str(label) if dataset.class_names is None else dataset.class_names[label]
    return said
