"""A gallery's images seen by another encoder: in the background, beside the vectors that it has, and then at once."""

import asyncio
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from patchsight_serve.collection import Galleries
from patchsight_serve.embedded_gallery import EmbeddedGallery, on_disk
from patchsight_serve.errors import Conflict, DeadlineExceeded, InvalidRequest, NotReady, Overloaded, PatchsightError
from patchsight_serve.gallery import Gallery
from patchsight_serve.item import Identity
from patchsight_serve.loaded import Loaded
from patchsight_serve.long_work import LongWork
from patchsight_serve.nearest import F32, normalize
from patchsight_serve.next_vectors import NextVectors, Todo, without_original
from patchsight_serve.service import Service

log = logging.getLogger(__name__)

BATCH = 16  # images at once: users come first
PAUSE_S = 1.0  # when the server is busy
LISTED = 100  # failures that are told


@dataclass
class Progress:
    """How far one is. failed: id and error of each image that could not be embedded; error: why all of it stopped."""

    gallery: EmbeddedGallery
    encoder: Identity
    done: int
    total: int
    failed: dict[str, str] = field(default_factory=dict)
    error: str | None = None

    def described(self) -> dict[str, Any]:
        """As in replies."""
        failed = [{"id": id, "message": message} for id, message in list(self.failed.items())[:LISTED]]
        return {
            "encoder": self.encoder._asdict(), "done": self.done, "total": self.total, "failed": failed,
            "error": self.error,
        }  # fmt: skip


class Reembeddings:
    """Those of a server, at most one of a gallery. Belongs to one event loop."""

    def __init__(self, service: Service, galleries: Galleries, work: LongWork) -> None:
        self._service, self._galleries, self._work = service, galleries, work
        self._progress: dict[str, Progress] = {}  # by gallery: at work, or stopped by an error
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def progress(self, gallery: Gallery) -> dict[str, Any] | None:
        """Of a gallery; None where there is nothing to tell."""
        found = self._progress.get(gallery.name)
        return found.described() if found and found.gallery is gallery else None

    async def begin(self, asked: Gallery, encoder: str) -> dict[str, Any]:
        """Begin, or go on where one for the same encoder was stopped. One that is at work goes on.

        Raises NotFound (encoder), Conflict: another one is at work; the gallery is empty, or of that encoder already;
        originals were not kept; it has no file.
        """
        gallery = on_disk(asked)
        loaded, name = self._service.encoder(encoder), gallery.name
        missing = await asyncio.to_thread(without_original, gallery)
        if name in self._tasks:
            if self._progress[name].encoder == loaded.identity:
                return self._progress[name].described()
            raise Conflict(f"gallery {name!r} is being embedded by {self._progress[name].encoder.name!r}", "encoder")
        if gallery.encoder is None:
            raise Conflict(f"gallery {name!r} is empty: it takes images of any encoder", "gallery")
        if gallery.encoder == loaded.identity:
            raise Conflict(f"gallery {name!r} holds vectors of encoder {encoder!r} already", "encoder")
        if missing:
            raise Conflict(
                f"{missing:,} of {len(gallery):,} images of gallery {name!r} have no original: add them again with "
                "replace=true, or remove them",
                "gallery",
            )
        self._progress[name] = progress = Progress(gallery, loaded.identity, 0, len(gallery))
        self._tasks[name] = task = asyncio.create_task(
            self._run(gallery, loaded.identity, progress), name="reembedding"
        )
        task.add_done_callback(lambda _: self._tasks.pop(name))
        return progress.described()

    async def close(self) -> None:
        """Stop; what is done is kept for whoever begins again."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, gallery: EmbeddedGallery, encoder: Identity, progress: Progress) -> None:
        try:
            vectors = await asyncio.to_thread(NextVectors, gallery, encoder)
            while True:
                await self._catch_up(gallery, vectors, progress)
                if progress.failed:
                    raise Conflict(f"{len(progress.failed):,} images cannot be embedded: replace or remove them")
                if await self._work.run(lambda _: self._galleries.exchange(gallery, vectors.take_over)):
                    break
                gallery.busy = True  # whoever adds waits now, or there might be no end
            del self._progress[gallery.name]
            log.info("gallery %s: embedded anew by %s", gallery.name, encoder.name)
        except PatchsightError as error:
            progress.error = error.message
            log.warning("gallery %s: not embedded anew by %s: %s", gallery.name, encoder.name, error)
        except Exception:
            progress.error = "internal error"
            log.exception("gallery %s: not embedded anew by %s", gallery.name, encoder.name)
        finally:
            gallery.busy = False

    async def _catch_up(self, gallery: EmbeddedGallery, vectors: NextVectors, progress: Progress) -> None:
        """All that there is to do now, and what comes meanwhile."""
        after = 0
        limit = min(BATCH, self._service.settings.max_images)
        progress.done = await asyncio.to_thread(vectors.done)
        while todo := await asyncio.to_thread(vectors.todo, after, limit):
            progress.total = len(gallery)
            after = todo[-1].row.key
            sound = [entry for entry in todo if entry.row.intact]
            made = await self._embed(sound, progress.encoder)
            fresh: dict[int, F32] = {}
            for entry, result in zip(sound, made, strict=True):
                if isinstance(result, PatchsightError):
                    progress.failed[entry.row.id] = result.message
                else:
                    fresh[entry.row.key] = result
            await asyncio.to_thread(vectors.put, fresh)
            progress.done += len(fresh)
        progress.done, progress.total = await asyncio.to_thread(vectors.done), len(gallery)

    async def _embed(self, todo: Sequence[Todo], encoder: Identity) -> list[F32 | PatchsightError]:
        """A unit vector for each image, or what is wrong with it; in the end, however busy the server is."""
        blobs = [entry.original for entry in todo]
        while True:
            with self._service.visits.visit():
                loaded = self._loaded(encoder)
                with suppress(Overloaded, DeadlineExceeded, NotReady):
                    results = await self._service.embed_images(blobs, loaded, ("embedding",), bulk=True)
                    return [r if isinstance(r, PatchsightError) else _unit(r["embedding"]) for r in results]
            await asyncio.sleep(PAUSE_S)

    def _loaded(self, encoder: Identity) -> Loaded:
        loaded = self._service.loaded.get(encoder.name)
        if loaded is None or loaded.identity != encoder:
            raise Conflict(f"encoder {encoder.name!r} (sha256 {encoder.sha256[:12]}…) is not loaded any more")
        return loaded


def _unit(vector: F32) -> F32 | PatchsightError:
    try:
        return normalize(vector)
    except InvalidRequest:
        return PatchsightError("the encoder's embedding of it is NaN, infinite or of length 0")
