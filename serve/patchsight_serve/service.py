"""From encoded images to the encoders' outputs: what every route that takes images is built on. Knows no HTTP."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Hashable, Mapping, Sequence
from contextlib import asynccontextmanager
from copy import copy
from dataclasses import dataclass, field
from math import isqrt
from typing import TypeVar

from patchsight_serve.bodies import BodyLimits
from patchsight_serve.decode import Limits, decode
from patchsight_serve.decoders import Decoders
from patchsight_serve.encoder import Pixels, Values, default_name
from patchsight_serve.engine import terms
from patchsight_serve.errors import DeadlineExceeded, InvalidRequest, NotFound, NotReady, Overloaded, PatchsightError
from patchsight_serve.in_flight import Content, InFlight
from patchsight_serve.loaded import Loaded
from patchsight_serve.manifest import Manifest, Transform
from patchsight_serve.metrics import Metrics
from patchsight_serve.outputs import graph_name
from patchsight_serve.settings import ServeSettings
from patchsight_serve.timing import Timing
from patchsight_serve.visits import Visits

logger = logging.getLogger(__name__)
T = TypeVar("T")

PROOF_TIMEOUT_S = 5.0
INTERACTIVE_IMAGES = 4  # a request with more of them is bulk work unless it says otherwise

Encoded = Mapping[str, Values] | PatchsightError  # by the graph's names


@dataclass
class Service:
    """The loaded encoders with an engine each, and the threads that decode. One per process, on one event loop."""

    loaded: Mapping[str, Loaded]  # by name; a reload puts another mapping in its place, and changes none
    settings: ServeSettings
    limits: Limits  # of one image
    body_limits: BodyLimits  # of one request
    decoders: Decoders
    metrics: Metrics
    draining: bool = False  # told to stop: not ready any more, but requests are still answered
    failed: Mapping[str, str] = field(default_factory=dict)  # what the last reload could not load, and why
    in_flight: InFlight[Hashable, Encoded] = field(default_factory=InFlight)
    visits: Visits = field(default_factory=Visits)

    def __post_init__(self) -> None:
        self.watch_queues()

    def watch_queues(self) -> None:
        """Have the metrics report the queues of what is loaded now."""
        for name, loaded in self.loaded.items():
            self.metrics.watch_queue(name, lambda engine=loaded.engine: engine.admitted)  # type: ignore[misc]

    @property
    def hung(self) -> bool:
        """An engine will never work again: the process has to be replaced."""
        return any(loaded.engine.hung for loaded in self.loaded.values())

    def encoder(self, name: str | None = None) -> Loaded:
        """The encoder of that name; None is the default one. A request asks once, and keeps what it got: asked again,
        another version may be there. Raises NotFound."""
        name = name or self.default_encoder
        if name not in self.loaded:
            raise NotFound(f"no encoder {name!r} is loaded; there are {', '.join(self.loaded)}", "encoder")
        return self.loaded[name]

    @property
    def default_encoder(self) -> str:
        """`settings.encoder`, else the one that sees the largest pictures."""
        return self.settings.encoder or default_name(self.loaded)

    def transform(self, manifest: Manifest, size: int | None) -> Transform:
        """What makes square pictures of `size` pixels for this encoder; None is its own size. The part of a picture
        that is seen stays the same.

        Raises InvalidRequest for a size that the encoder does not take, or over the limit.
        """
        own = manifest.transform
        if size is None or size == own.crop:
            return own
        if not manifest.dynamic_size:
            raise InvalidRequest(f"size is {size}; encoder {manifest.name!r} takes {own.crop} alone", "size")
        step, least = manifest.size_step, manifest.size_least
        if size < least or size % step:
            must = f"multiples of {step}" if manifest.patch_size else f"{least} and more"
            raise InvalidRequest(f"size is {size}; encoder {manifest.name!r} takes {must}", "size")
        patches, most = (size // least) ** 2, self.settings.max_patches
        if patches > most:
            largest = isqrt(most) * least
            raise InvalidRequest(
                f"size is {size}, which makes {patches:,} patches of {least} pixels; the limit is {most:,}, a size of "
                f"{largest}",
                "size",
            )
        return own.model_copy(update={"resize": round(own.resize * size / own.crop), "crop": size})

    async def prove_ready(self) -> None:
        """Return if requests can be answered right now. Raises NotReady."""
        if self.draining:
            raise NotReady("the server is shutting down")
        engines = [loaded.engine for loaded in self.loaded.values()]
        await asyncio.gather(*(engine.prove(self.settings.ready_age_s, PROOF_TIMEOUT_S) for engine in engines))

    async def embed_images(
        self,
        blobs: Sequence[bytes | PatchsightError],
        encoder: Loaded | str | None = None,
        outputs: Sequence[str] = ("embedding",),
        timing: Timing | None = None,
        transform: Transform | None = None,
        bulk: bool | None = None,
    ) -> list[dict[str, Values] | PatchsightError]:
        """Decode and encode. One entry per blob, in order: its outputs, or the error that this image alone has.

        Equal images in work at the same time, of whatever requests, are decoded and encoded once.

        blobs: encoded images; an error in the place of one (damaged base64) stays in its place.
        encoder: as `encoder` gave it; by its name, it is looked up now.
        outputs: of `OUTPUTS`. Vectors `(D,)` are as the graph gives them, not normalized; attention is
            `(heads, h, w)`, patch tokens `(h, w, D)`. They may belong to other requests too: do not write into them.
        timing: is filled in.
        transform: as `transform` gives it, for pictures of another size than the encoder's own.
        bulk: others go first; None decides by the number of images.

        Raises for the request as a whole: NotFound (encoder), InvalidRequest (outputs), Overloaded, NotReady,
        DeadlineExceeded.
        """
        loaded = encoder if isinstance(encoder, Loaded) else self.encoder(encoder)
        manifest = loaded.manifest
        transform = transform or manifest.transform
        names = {output: graph_name(output, manifest) for output in outputs}
        wanted = tuple(dict.fromkeys(names.values()))
        good = [blob for blob in blobs if isinstance(blob, bytes)]
        own = 0

        async def work(indices: Sequence[int]) -> list[Encoded]:
            nonlocal own
            own += len(indices)
            return await self._encode([good[i] for i in indices], loaded, wanted, transform, timing)

        start = time.perf_counter()
        async with self.admitted(len(blobs), loaded, bulk):
            # Of the encoder's transform a request changes no more than these two.
            keys = [(loaded, wanted, transform.resize, transform.crop, Content(blob)) for blob in good]
            encoded = iter(await self.in_flight.run(keys, work))
        if own < len(good):
            self.metrics.shared.labels(manifest.name).inc(len(good) - own)
            if timing is not None and not own:
                timing.queue += time.perf_counter() - start
        results: list[dict[str, Values] | PatchsightError] = []
        for blob in blobs:
            if isinstance(blob, PatchsightError):
                self.metrics.rejected.labels(blob.code).inc()
                results.append(blob)
            elif isinstance(result := next(encoded), PatchsightError):
                results.append(copy(result))  # whose place in the request is added later; others may have the same
            else:
                results.append({output: result[name] for output, name in names.items()})
        return results

    async def _encode(
        self, blobs: Sequence[bytes], loaded: Loaded, names: Sequence[str], transform: Transform,
        timing: Timing | None,
    ) -> list[Encoded]:  # fmt: skip
        def to_pixels(data: bytes) -> Pixels:
            return decode(data, transform, self.limits)

        pixels = await self.decode_images(blobs, to_pixels, timing)
        good = [p for p in pixels if not isinstance(p, PatchsightError)]
        encoded = iter(await self.infer(good, loaded, names, timing))
        return [entry if isinstance(entry, PatchsightError) else next(encoded) for entry in pixels]

    @asynccontextmanager
    async def admitted(self, images: int, loaded: Loaded, bulk: bool | None = None) -> AsyncIterator[None]:
        """Hold places for `images` in the encoder's queue, from before they are decoded, and keep to the deadline.

        bulk: others go first; None decides by the number of images.

        Raises Overloaded at once if there are not enough places, DeadlineExceeded after `settings.timeout_s`.
        """
        bulk = images > INTERACTIVE_IMAGES if bulk is None else bulk
        try:
            async with loaded.engine.admit(images, self.settings.timeout_s, bulk):
                yield
        except (DeadlineExceeded, Overloaded) as error:
            self.metrics.rejected.labels(error.code).inc(images)
            raise

    def refuse_if_full(self, loaded: Loaded, bulk: bool = False) -> None:
        """Raise Overloaded if not even one image has a place. Asked before a body is read: it may be large, and a
        client that asks first need not send it."""
        try:
            loaded.engine.check(1, self.settings.timeout_s, bulk)
        except Overloaded as error:
            self.metrics.rejected.labels(error.code).inc()
            raise

    async def decode_images(
        self,
        blobs: Sequence[bytes | PatchsightError],
        work: Callable[[bytes], T],
        timing: Timing | None = None,
    ) -> list[T | PatchsightError]:
        """Run `work` on each blob in the pool; an image error takes the place of that image's result."""
        start = time.perf_counter()

        def one(data: bytes) -> T | PatchsightError:
            try:
                return work(data)
            except PatchsightError as error:
                return error
            except Exception:  # a reader's bug must not take the request's other images down
                logger.exception("an image of %d bytes could not be read", len(data))
                return PatchsightError("the image could not be read")

        run = self.decoders.run_as_bulk if terms.get().bulk else self.decoders.run
        running = [run(one, b) for b in blobs if isinstance(b, bytes)]
        done = iter([await running[0]] if len(running) == 1 else await asyncio.gather(*running))
        spent = time.perf_counter() - start
        self.metrics.decode.observe(spent)
        if timing is not None:
            timing.decode += spent
        results = [next(done) if isinstance(b, bytes) else b for b in blobs]
        for result in results:
            if isinstance(result, PatchsightError):
                self.metrics.rejected.labels(result.code).inc()
        return results

    async def infer(
        self, images: Sequence[Pixels], loaded: Loaded, outputs: Sequence[str], timing: Timing | None = None
    ) -> list[Mapping[str, Values] | PatchsightError]:
        """Encode decoded images for which `admitted` holds places. Outputs have the graph's names."""
        if not images:
            return []
        results, spent = await loaded.engine.run(images, outputs)
        self.metrics.queue.observe(spent.queue)
        self.metrics.infer.observe(spent.infer)
        self.metrics.images.labels(loaded.manifest.name).inc(len(images))
        if timing is not None:
            timing.queue += spent.queue
            timing.infer += spent.infer
        return results
