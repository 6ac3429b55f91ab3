"""Which images of a gallery contain a region: the nearest by whole images first, and of these, by their patch tokens,
which are computed anew from the originals. A few such searches at a time, behind all other work on the encoder."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import NamedTuple

from patchsight_serve.decode import fit, open_rgb
from patchsight_serve.encoder import Pixels
from patchsight_serve.errors import Conflict, DeadlineExceeded, NotFound, Overloaded, PatchsightError
from patchsight_serve.gallery import Gallery
from patchsight_serve.item import Neighbor, RegionNeighbor
from patchsight_serve.loaded import Loaded
from patchsight_serve.nearest import F32
from patchsight_serve.outputs import graph_name
from patchsight_serve.region import Box, match, seen, tokens_in, view, where
from patchsight_serve.service import Service
from patchsight_serve.timing import Timing

AT_WORK = 2  # searches at once
WAITING = 8  # searches, those at work counted in
BATCH = 16  # originals at once: so many are in memory, and in the encoder's queue
PAUSE_S = 0.1  # before a server that refused is asked again


Nearest = Callable[[F32], list[Neighbor]]  # of a gallery, to an embedding (D,), best first


@dataclass(frozen=True)
class Region:
    """A region that is looked for. vectors: of its picture and of its surroundings, `(D,)`, by which candidates are
    found. tokens: unit patch tokens `(M, D)`."""

    vectors: tuple[F32, ...]
    tokens: F32


class Found(NamedTuple):
    """Best first, equal scores in the order of their ids. looked_at: how many were compared patch by patch.
    without_original, unreadable: candidates that could not be."""

    neighbors: list[RegionNeighbor]
    looked_at: int
    without_original: int
    unreadable: int


class _Matched(NamedTuple):
    image: Neighbor
    score: float
    likeness: F32
    seen: Box


class RegionSearches:
    """All of a server. Belongs to one event loop."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._places = asyncio.Semaphore(AT_WORK)
        self._waiting = 0

    @asynccontextmanager
    async def admitted(self) -> AsyncIterator[None]:
        """A place for the block, which has `settings.timeout_s` seconds, the wait for the place counted in.

        Raises Overloaded at once if too many wait, DeadlineExceeded.
        """
        if self._waiting >= WAITING:
            raise Overloaded(f"{self._waiting} searches for regions are waiting, the limit is {WAITING}", 10)
        seconds = self._service.settings.timeout_s
        self._waiting += 1
        try:
            async with asyncio.timeout(seconds), self._places:
                yield
        except TimeoutError:
            message = f"no answer within {seconds:g} s; fewer candidates take less time"
            raise DeadlineExceeded(message, "candidates") from None
        finally:
            self._waiting -= 1

    async def region(self, data: bytes, box: Box, encoder: Loaded, timing: Timing) -> Region:
        """What is looked for, of an encoded image. Raises InvalidRequest, and what decoding, `Service.admitted` and
        `Service.infer` raise."""
        service, transform = self._service, encoder.manifest.transform
        embedding, patch_tokens = (graph_name(output, encoder.manifest) for output in ("embedding", "patch_tokens"))

        def prepare(data: bytes) -> tuple[Pixels, Pixels, Box]:
            picture = open_rgb(data, service.limits)
            shown = view(picture, box, transform)
            return fit(picture, transform), shown.pixels, shown.box

        async with service.admitted(2, encoder):
            (prepared,) = await service.decode_images([data], prepare, timing)
            if isinstance(prepared, PatchsightError):
                raise prepared
            whole, square, inside = prepared
            results = await service.infer([whole, square], encoder, [embedding, patch_tokens], timing)
        for result in results:
            if isinstance(result, PatchsightError):
                raise result
        of_whole, of_square = (result for result in results if not isinstance(result, PatchsightError))
        return Region((of_whole[embedding], of_square[embedding]), tokens_in(of_square[patch_tokens], inside))

    async def search(
        self, gallery: Gallery, region: Region, encoder: Loaded, k: int, nearest: Nearest, timing: Timing
    ) -> Found:
        """The `k` images most like the region. nearest: candidates, of which as many are looked at as it gives for one
        embedding.

        Raises Conflict if no candidate has its original, and what `Service.admitted` and `Service.infer` raise.
        """

        def candidates() -> list[Neighbor]:
            rankings = [nearest(vector) for vector in region.vectors]
            return _in_turn(rankings)[: max(map(len, rankings))]

        images = await asyncio.to_thread(candidates)
        matched: list[_Matched] = []
        without = unreadable = 0
        batch = min(BATCH, self._service.settings.max_images)
        for start in range(0, len(images), batch):
            part = images[start : start + batch]
            originals = await asyncio.to_thread(_originals, gallery, part)
            there = [(image, data) for image, data in zip(part, originals, strict=True) if isinstance(data, bytes)]
            without += sum(isinstance(data, NotFound) for data in originals)
            looked = await self._look(region, there, encoder, timing)
            matched += looked
            unreadable += sum(type(data) is PatchsightError for data in originals) + len(there) - len(looked)
        if without and without == len(images):
            await asyncio.to_thread(gallery.get, images[0].id)  # if all of it is gone, that is what to say
            raise Conflict(
                f"gallery {gallery.name!r} has the original of none of the {without} nearest images: a region can only "
                "be looked for in originals; add the images to a server that keeps them",
                "gallery",
            )
        best = await asyncio.to_thread(_best, matched, k)
        return Found(best, len(matched), without, unreadable)

    async def _look(
        self, region: Region, images: Sequence[tuple[Neighbor, bytes]], encoder: Loaded, timing: Timing
    ) -> list[_Matched]:
        """Those of the images that could be read, compared. Waits while the server is full."""
        service, manifest = self._service, encoder.manifest
        name = graph_name("patch_tokens", manifest)

        def prepare(data: bytes) -> tuple[Pixels, Box]:
            picture = open_rgb(data, service.limits, manifest.transform.scaled_side)
            return fit(picture, manifest.transform), seen(picture.size, manifest.transform)

        while images:
            try:
                async with service.admitted(len(images), encoder, bulk=True):
                    prepared = await service.decode_images([data for _, data in images], prepare, timing)
                    pixels = [entry[0] for entry in prepared if not isinstance(entry, PatchsightError)]
                    encoded = iter(await service.infer(pixels, encoder, [name], timing))
                break
            except Overloaded:
                await asyncio.sleep(PAUSE_S)
        else:
            return []

        def compare() -> list[_Matched]:
            matched = []
            for (image, _), entry in zip(images, prepared, strict=True):
                if isinstance(entry, PatchsightError) or isinstance(values := next(encoded), PatchsightError):
                    continue
                matched.append(_Matched(image, *match(region.tokens, values[name]), entry[1]))
            return matched

        return await asyncio.to_thread(compare)


def _in_turn(rankings: Iterable[Sequence[Neighbor]]) -> list[Neighbor]:
    """The first of each ranking, then the second of each, and so on; every image once."""
    merged = chain.from_iterable(zip_longest(*rankings))
    return list({image.id: image for image in merged if image is not None}.values())


def _originals(gallery: Gallery, images: Sequence[Neighbor]) -> list[bytes | PatchsightError]:
    """NotFound where there is none, or the image is gone meanwhile."""

    def one(id: str) -> bytes | PatchsightError:
        try:
            return gallery.original(id)
        except PatchsightError as error:
            if type(error) not in (NotFound, PatchsightError):  # not there, damaged; all else concerns the gallery
                raise
            return error

    return [one(image.id) for image in images]


def _best(matched: Sequence[_Matched], k: int) -> list[RegionNeighbor]:
    ranked = sorted(matched, key=lambda m: (-m.score, m.image.id))[:k]
    return [_described(m) for m in ranked]


def _described(m: _Matched) -> RegionNeighbor:
    box = where(m.likeness).within(m.seen)
    return RegionNeighbor(m.image.id, m.score, m.image.label, m.image.metadata, (box.x0, box.y0, box.x1, box.y1))
