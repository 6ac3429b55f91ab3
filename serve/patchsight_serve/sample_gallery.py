"""The photos that ship with the project, indexed once into a gallery that never held an image."""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from patchsight_serve.collection import DEFAULT, Galleries
from patchsight_serve.dataset import Dataset, read_dataset
from patchsight_serve.errors import DeadlineExceeded, Overloaded, PatchsightError
from patchsight_serve.gallery import Gallery
from patchsight_serve.indexer import Upload, encoder_of, index_images
from patchsight_serve.item import Item
from patchsight_serve.service import Service

log = logging.getLogger(__name__)

SAMPLES = Path(__file__).parent / "samples" / "clothing.parquet"
SOURCE = "clothing10, CC0 1.0"
FACT = "samples"  # in the record: how many were indexed, written together with them
BATCH = 8  # small, so that a user's first request waits for little


@asynccontextmanager
async def sampling(service: Service, galleries: Galleries) -> AsyncIterator[None]:
    """Index the samples, where due, in the background of the block; stop at its end, and go on at the next start."""
    task = asyncio.create_task(index_samples(service, galleries), name="sample gallery")
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def index_samples(service: Service, galleries: Galleries) -> None:
    """Put the samples into the default gallery, unless it ever held anything else, or held them all. What has been
    deleted since does not come back."""
    try:
        gallery = await asyncio.to_thread(galleries.get, DEFAULT)
        done = await asyncio.to_thread(_progress, gallery)
        if done is None:
            return
        samples = await asyncio.to_thread(read_dataset, SAMPLES)
        uploads = await asyncio.to_thread(_uploads, samples)
        if done < len(uploads):
            log.info("gallery %s: indexing %d sample photos (%s)", DEFAULT, len(uploads) - done, SOURCE)
            await _index(service, gallery, uploads, done)
            log.info("gallery %s: %d sample photos are indexed", DEFAULT, len(uploads))
    except PatchsightError as error:
        log.warning("the sample photos were not indexed: %s", error)
    except Exception:
        log.exception("the sample photos were not indexed")


def _progress(gallery: Gallery) -> int | None:
    """How many samples went in; None if the gallery began with other images."""
    done = gallery.fact(FACT)
    if done is not None:
        return int(done)
    return 0 if gallery.fact("encoder") is None else None


async def _index(service: Service, gallery: Gallery, uploads: list[Upload], done: int) -> None:
    while done < len(uploads):
        batch = uploads[done : done + BATCH]
        facts = {FACT: str(done + len(batch))}
        try:
            with service.visits.visit():
                encoder = await asyncio.to_thread(encoder_of, service, gallery, None)
                results = await index_images(service, gallery, encoder, batch, facts=facts)
        except (Overloaded, DeadlineExceeded):  # users come first
            await asyncio.sleep(1)
            continue
        for result in results:
            if isinstance(result, PatchsightError):
                log.warning("a sample photo was not indexed: %s", result)
        done += len(batch)


def _uploads(samples: Dataset) -> list[Upload]:
    """Ids are the class and a number: `dress-01`."""
    assert samples.labels is not None
    assert samples.class_names is not None
    count: Counter[str] = Counter()
    uploads = []
    for i, path in enumerate(samples.names):
        label = samples.class_names[samples.labels[i]]
        count[label] += 1
        item = Item(f"{label}-{count[label]:02d}", label, {"path": path, "source": SOURCE})
        uploads.append(Upload(samples.read(i), item))
    return uploads
