"""From encoded images to a gallery: skip what is there, embed the rest, add it durably."""

import asyncio
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from patchsight_serve.decode import Limits, fit, open_rgb
from patchsight_serve.encoder import Pixels, Values
from patchsight_serve.errors import Conflict, InvalidRequest, PatchsightError
from patchsight_serve.gallery import Gallery
from patchsight_serve.item import Added, Item, NewImage
from patchsight_serve.loaded import Loaded
from patchsight_serve.long_work import short_write
from patchsight_serve.manifest import Transform
from patchsight_serve.nearest import normalize
from patchsight_serve.outputs import graph_name
from patchsight_serve.service import Service
from patchsight_serve.timing import Timing

THUMBNAIL_SIDE = 160  # pixels of the longer side, at most


@dataclass(frozen=True)
class Upload:
    """An encoded image and what is said about it."""

    data: bytes
    item: Item


def default_id(data: bytes) -> str:
    """The id of an image that was given none: the same bytes have the same one."""
    return hashlib.sha256(data).hexdigest()[:32]


def encoder_of(service: Service, gallery: Gallery | None, name: str | None) -> Loaded:
    """The encoder for a gallery: the one asked for, else the one the gallery is bound to, else the default one.

    Raises Conflict if it is not the one that the gallery is bound to, NotFound.
    """
    bound = gallery.encoder if gallery is not None else None
    if name is None and bound is not None and bound.name not in service.loaded:
        raise Conflict(
            f"the gallery needs encoder {bound.name!r} (sha256 {bound.sha256}), which is not loaded", "encoder"
        )
    loaded = service.encoder(name or (bound.name if bound else None))
    if gallery is not None:
        gallery.require(loaded.identity)
    return loaded


async def index_images(
    service: Service,
    gallery: Gallery,
    encoder: Loaded,
    uploads: Sequence[Upload | PatchsightError],
    replace: bool = False,
    facts: dict[str, str] | None = None,
    timing: Timing | None = None,
) -> list[Added | PatchsightError]:
    """Add images to a gallery; one result for each, in order. An image that cannot be added harms no other.

    uploads: an error in the place of an image stays in its place. replace, facts: as in `Gallery.add`.

    Raises for the request as a whole: Conflict (another encoder), StorageFull, and what `Service.admitted` and
    `Service.infer` raise.
    """
    results: list[Added | PatchsightError | None] = [u if isinstance(u, PatchsightError) else None for u in uploads]
    waiting = [(i, u) for i, u in enumerate(uploads) if isinstance(u, Upload)]
    if not replace:
        digests = [(u.item.id, hashlib.sha256(u.data).hexdigest()) for _, u in waiting]
        held = await asyncio.to_thread(gallery.holds, digests)
        for (i, upload), there in zip(waiting, held, strict=True):
            results[i] = Added(upload.item.id, False) if there else None
        waiting = [pair for pair, there in zip(waiting, held, strict=True) if not there]
    if waiting:
        made = await _new_images(service, encoder, [upload for _, upload in waiting], timing)
        images: list[tuple[int, NewImage]] = []
        for (i, _), entry in zip(waiting, made, strict=True):
            if isinstance(entry, NewImage):
                images.append((i, entry))
            else:
                results[i] = entry
        added = await short_write(
            gallery, gallery.add, [image for _, image in images], encoder.identity, replace, facts
        )
        for (i, image), outcome in zip(images, added, strict=True):
            results[i] = outcome if isinstance(outcome, PatchsightError) else Added(image.item.id, outcome)
    elif facts:
        await short_write(gallery, gallery.add, [], encoder.identity, replace, facts)
    return [result for result in results if result is not None]


async def _new_images(
    service: Service, encoder: Loaded, uploads: Sequence[Upload], timing: Timing | None
) -> list[NewImage | PatchsightError]:
    """Vector and thumbnail of each image, which is decoded once for both; or what is wrong with it."""
    manifest = encoder.manifest
    name = graph_name("embedding", manifest)

    def prepare(data: bytes) -> tuple[Pixels, bytes]:
        return prepared(data, service.limits, manifest.transform)

    async with service.admitted(len(uploads), encoder):
        decoded = await service.decode_images([upload.data for upload in uploads], prepare, timing)
        pixels = [entry[0] for entry in decoded if not isinstance(entry, PatchsightError)]
        encoded = iter(await service.infer(pixels, encoder, [name], timing))
    made: list[NewImage | PatchsightError] = []
    for upload, entry in zip(uploads, decoded, strict=True):
        if isinstance(entry, PatchsightError):
            made.append(entry)
            continue
        values = next(encoded)
        made.append(values if isinstance(values, PatchsightError) else new_image(upload, values[name], entry[1]))
    return made


def prepared(data: bytes, limits: Limits, transform: Transform) -> tuple[Pixels, bytes]:
    """The square that the encoder sees, and the thumbnail, of one decoding. Raises as `decode`."""
    picture = open_rgb(data, limits, transform.scaled_side)
    return fit(picture, transform), thumbnail(picture)


def new_image(upload: Upload, vector: Values, picture: bytes) -> NewImage | PatchsightError:
    """An upload with its embedding `(D,)`, of any length, and its thumbnail; or that it has no direction."""
    try:
        return NewImage(upload.item, upload.data, picture, normalize(vector))
    except InvalidRequest:
        # Not the sender's fault: the image was fine, the encoder's numbers are not.
        return PatchsightError("the encoder's embedding of this image is NaN, infinite or of length 0")


def thumbnail(picture: Image.Image) -> bytes:
    """JPEG of at most 160 pixels; the picture itself becomes that small."""
    picture.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=85)
    return file.getvalue()
