"""A gallery of this machine that no server has open, filled by an encoder of this process."""

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from patchsight_serve.decode import Limits
from patchsight_serve.embedder import BATCH, batches
from patchsight_serve.encoder import Encoder, Pixels
from patchsight_serve.errors import PatchsightError
from patchsight_serve.filling import New
from patchsight_serve.gallery import Gallery
from patchsight_serve.indexer import Upload, default_id, new_image, prepared
from patchsight_serve.item import Added, Identity, Item, NewImage
from patchsight_serve.outputs import graph_name

PAGE = 1000  # images


class Prepared(NamedTuple):
    """An image that was decoded: the square that the encoder sees, and a JPEG."""

    upload: Upload
    pixels: Pixels
    thumbnail: bytes


class OwnGallery:
    """As `filling.Target` describes it. Raises Conflict where the gallery is of another encoder."""

    def __init__(self, gallery: Gallery, encoder: Encoder) -> None:
        manifest = encoder.manifest
        self._gallery, self._encoder = gallery, encoder
        self._identity = Identity(manifest.name, manifest.sha256)
        self._output = graph_name("embedding", manifest)
        gallery.require(self._identity)

    def held(self, most: int) -> Iterator[tuple[str, str | None]]:  # noqa: ARG002 - it is quick
        """As in `Target`, however many they are."""
        after: str | None = ""
        while after is not None:
            images, after = self._gallery.page(after, PAGE)
            yield from ((image.id, image.sha256) for image in images)

    def add_each(self, images: Iterable[New]) -> Iterator[Added | PatchsightError]:
        """As in `Target`; each batch is on the disk before the next one begins."""
        with ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="decode") as pool:
            for batch in batches(images, BATCH):
                ready = list(pool.map(self._prepared, batch))
                pixels = [one.pixels for one in ready if isinstance(one, Prepared)]
                vectors = iter(self._encoder.run(np.stack(pixels), [self._output])[self._output] if pixels else ())
                made = [
                    new_image(one.upload, next(vectors), one.thumbnail) if isinstance(one, Prepared) else one
                    for one in ready
                ]
                news = [one for one in made if isinstance(one, NewImage)]
                added = iter(self._gallery.add(news, self._identity) if news else ())
                for one in made:
                    if isinstance(one, PatchsightError):
                        yield one
                        continue
                    outcome = next(added)
                    yield outcome if isinstance(outcome, PatchsightError) else Added(one.item.id, outcome)

    def _prepared(self, new: New) -> Prepared | PatchsightError:
        data, said = new
        try:
            upload = Upload(data, Item(default_id(data), **said))
            return Prepared(upload, *prepared(data, Limits(), self._encoder.manifest.transform))
        except PatchsightError as error:
            return error
