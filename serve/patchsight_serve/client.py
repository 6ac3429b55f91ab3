"""A running server from Python: `Client`, and `AsyncClient` for an event loop."""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import httpx

from patchsight_serve.async_client import AsyncClient
from patchsight_serve.client_files import send
from patchsight_serve.client_gallery import File, GalleryConversation, New
from patchsight_serve.client_images import Picture
from patchsight_serve.client_protocol import Options, Row
from patchsight_serve.client_steps import Call, Step, Steps, Wait, Work
from patchsight_serve.encoder import Values
from patchsight_serve.errors import PatchsightError
from patchsight_serve.group import Cluster, GalleryMap, Group
from patchsight_serve.item import Added, Identity, Neighbor, RegionNeighbor

__all__ = ["AsyncClient", "Client", "Picture"]

S = TypeVar("S")
T = TypeVar("T")


class Client:
    """A running server. Images go in batches, several at a time; a server that is busy (429) is asked again when it
    says, one that is not ready or breaks the connection once.

    A picture is an encoded image, the path of one, a Pillow image, or a uint8 array `(H, W, 3)`.

    url: as in `http://127.0.0.1:8000`. key: of its `PATCHSIGHT_API_KEYS`. options: `Options` lists them.

    Raises, and so does every method:
        NotFound: the server has no such encoder. InvalidRequest: the encoder has no such output.
        Unauthorized: it wants another key. Overloaded, NotReady: it was asked again in vain.
        Conflict: its encoder was exchanged since. PatchsightError: it cannot be reached, or is no patchsight server.
    """

    def __init__(self, url: str, key: str | None = None, **options: Unpack[Options]) -> None:
        self._talk = GalleryConversation(url, key, **options)
        self._http = self._talk.connect(httpx.Client)
        try:
            self._run(self._talk.opened())
        except BaseException:
            self.close()
            raise

    @property
    def encoder(self) -> Identity:
        """Which encoder it is."""
        return self._talk.encoder

    @property
    def output(self) -> str:
        """Which embedding of it."""
        return self._talk.output

    def encoders(self) -> list[dict[str, Any]]:
        """All that the server has, each with its manifest."""
        return self._run(self._talk.encoders())

    def embed(self, pictures: Iterable[Picture]) -> Values:
        """float32 `(N, D)`, as the graph gives them. Raises the first picture's error, if any: `param` is
        `images[3]`."""
        return self._talk.stacked(list(self.embed_each(pictures)))

    def embed_each(self, pictures: Iterable[Picture]) -> Iterator[Row]:
        """For each picture, in order, its embedding float32 `(D,)`, or what is wrong with the picture."""
        return self._each(self._talk.batches(pictures), self._talk.embed)

    def add_each(self, images: Iterable[New], **query: object) -> Iterator[Added | PatchsightError]:
        """Add images to a gallery; for each, in order, its id and whether it is new, or what is wrong with it. What is
        there already, by id and bytes, stays as it is.

        images: pairs of a picture and a dictionary with `id`, `label` and `metadata`, none of which is needed.
        query: `gallery`, `encoder`, `replace`, as `POST /gallery/images` has them.
        """
        return self._each(self._talk.new_batches(images), lambda batch: self._talk.add(batch, query))

    def gallery(self, **query: object) -> dict[str, Any]:
        """What there is in a gallery, `gallery=`, as `GET /gallery` tells it. Raises NotFound."""
        return self._run(self._talk.gallery(query))

    def galleries(self) -> list[dict[str, Any]]:
        """All galleries, each with its `name`, `count` and `encoder`, as `GET /galleries` tells them."""
        return self._run(self._talk.galleries())

    def gallery_images(self, **query: object) -> Iterator[dict[str, Any]]:
        """All images of a gallery, `gallery=`, in the order of their ids: id, label, metadata, sha256."""
        cursor: str | None = ""
        while cursor is not None:
            page = self._run(self._talk.page({**query, "limit": 1000, "cursor": cursor}))
            yield from page["images"]
            cursor = page["next_cursor"]

    def _each(self, batches: Iterable[list[S]], steps: Callable[[list[S]], Steps[list[T]]]) -> Iterator[T]:
        """What comes of each thing in the batches, in order; several batches at a time."""
        left = threading.Event()

        def work(batch: list[S]) -> list[T]:
            return self._run(steps(batch), left)

        with ThreadPoolExecutor(self._talk.concurrency, thread_name_prefix="client") as pool:
            ahead: deque[Future[list[T]]] = deque()
            try:
                for batch in batches:
                    ahead.append(pool.submit(work, batch))
                    if len(ahead) > self._talk.concurrency:
                        yield from ahead.popleft().result()
                while ahead:
                    yield from ahead.popleft().result()
            finally:
                left.set()
                for future in ahead:
                    future.cancel()

    def attention(self, picture: Picture, head: str = "mean", mass: float | None = None) -> Values:
        """The map `(h, w)` of a picture: a head's by its number, or their mean; patches cut away by `mass` are 0."""
        return self._run(self._talk.attention(picture, head, mass))

    def neighbors(self, picture: Picture, **query: object) -> list[Neighbor]:
        """The images of a gallery most similar to a picture, best first.

        query: `k`, `gallery`, `label` (one, or a list, any of which it may be), `filter` (a dictionary over metadata),
            `min_score`, as `POST /neighbors` has them.
        """
        return self._run(self._talk.neighbors(picture, False, query))

    def neighbors_each(
        self, pictures: Iterable[Picture], **query: object
    ) -> Iterator[list[Neighbor] | PatchsightError]:
        """For each picture, in order, what `neighbors` gives, or what is wrong with the picture."""
        return self._each(([picture] for picture in pictures), lambda one: self._talk.neighbors_each(one, query))

    def neighbors_of(self, id: str, **query: object) -> list[Neighbor]:
        """As `neighbors`, of the indexed image of that id, which is left out itself."""
        return self._run(self._talk.neighbors(id, True, query))

    def neighbors_of_region(self, picture: Picture, box: Sequence[float], **query: object) -> list[RegionNeighbor]:
        """The images of a gallery that contain a region of a picture, best first, and where in them it is.

        box: left, top, right and bottom in fractions of the picture, 0 to 1. query: `k`, `candidates`, `gallery`,
            `label`, `filter`, as `POST /neighbors/region` has them.
        """
        return self._run(self._talk.region(picture, False, box, query))

    def neighbors_of_region_of(self, id: str, box: Sequence[float], **query: object) -> list[RegionNeighbor]:
        """As `neighbors_of_region`, of the indexed image of that id, which is left out itself."""
        return self._run(self._talk.region(id, True, box, query))

    def duplicates(self, **query: object) -> list[Group]:
        """Groups of near-duplicates in a gallery, the largest first: all of them, or `limit`.

        query: `min_score`, `gallery`, `limit`, `members`, as `GET /gallery/duplicates` has them. A big gallery takes
        longer than the usual `timeout_s`.
        """
        return self._run(self._talk.duplicates(query))

    def clusters(self, **query: object) -> list[Cluster]:
        """Clusters of a gallery with their most typical images, the largest first.

        query: `k`, `typical`, `gallery`, as `GET /gallery/clusters` has them.
        """
        return self._run(self._talk.clusters(query))

    def map(self, **query: object) -> GalleryMap:
        """Where on a plane the images of a gallery are, at once: by principal components until UMAP is ready, which the
        first call begins.

        query: `method` (`pca`: no UMAP), `limit`, `gallery`, as `GET /gallery/map` has them.
        """
        return self._run(self._talk.map(query))

    def backup(self, to: File, **query: object) -> None:
        """A gallery, `gallery=`, with its pictures, as an SQLite file, which appears whole or not at all; so does that
        of `export`. Both take longer than the usual `timeout_s` of a big gallery. Raises NotFound."""
        self._run(self._talk.backup(to, query))

    def restore(self, file: File, **query: object) -> dict[str, Any]:
        """A gallery from its backup; what `POST /gallery/restore` tells of it.

        query: `gallery`, `replace`, `skip_damaged`. Raises Conflict (the name is taken), DamagedFile, InvalidRequest.
        """
        return self._run(self._talk.restore(file, query))

    def export(self, to: File, **query: object) -> None:
        """The vectors of a gallery, `gallery=`, and what is said about them, as a Parquet file. Raises NotFound."""
        self._run(self._talk.export(to, query))

    def import_file(self, file: File, **query: object) -> dict[str, Any]:
        """Add the vectors of a Parquet file of `export` or of `patchsight-embed`; what `POST /gallery/import` tells.

        query: `gallery`, `replace`. Raises Conflict (of another encoder, another image under an id), InvalidRequest.
        """
        return self._run(self._talk.import_file(file, query))

    def reembed(self, encoder: str, **query: object) -> dict[str, Any]:
        """Have another encoder embed a gallery, `gallery=`, in the background; how far it is, as `gallery` tells under
        `reembedding` until it is done. Raises NotFound, Conflict."""
        return self._run(self._talk.reembed(encoder, query))

    def remove_gallery(self, **query: object) -> None:
        """Remove a gallery, `gallery=`, with its images; the default one is emptied. Raises NotFound."""
        self._run(self._talk.remove(query))

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, steps: Steps[T], left: threading.Event | None = None) -> T:
        """Do what is yielded, in this thread, until `left` is set."""
        left = left or threading.Event()
        try:
            step = next(steps)
            while True:
                try:
                    reply = self._do(step, left)
                except httpx.HTTPError as error:
                    step = steps.throw(error)
                else:
                    step = steps.send(reply)
        except StopIteration as done:
            result: T = done.value
            return result

    def _do(self, step: Step, left: threading.Event) -> object:
        if left.wait(step.seconds if isinstance(step, Wait) else 0):
            raise CancelledError  # nobody waits for the result any more
        if isinstance(step, Call):
            return send(self._http, step)
        return step.do() if isinstance(step, Work) else None
