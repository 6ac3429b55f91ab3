"""The client of an event loop; `client` has it beside its sister."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import httpx

from patchsight_serve.client_files import send_in_loop
from patchsight_serve.client_gallery import File, GalleryConversation, New
from patchsight_serve.client_images import Picture
from patchsight_serve.client_protocol import Options, Row
from patchsight_serve.client_steps import Call, Step, Steps, Work
from patchsight_serve.encoder import Values
from patchsight_serve.errors import PatchsightError
from patchsight_serve.group import Cluster, GalleryMap, Group
from patchsight_serve.item import Added, Identity, Neighbor, RegionNeighbor

S = TypeVar("S")
T = TypeVar("T")


class AsyncClient:
    """As `Client`, opened by `async with AsyncClient(url) as client`. Pictures are read and resized in threads."""

    def __init__(self, url: str, key: str | None = None, **options: Unpack[Options]) -> None:
        self._talk = GalleryConversation(url, key, **options)
        self._http = self._talk.connect(httpx.AsyncClient)

    @property
    def encoder(self) -> Identity:
        """Which encoder it is."""
        return self._talk.encoder

    @property
    def output(self) -> str:
        """Which embedding of it."""
        return self._talk.output

    async def encoders(self) -> list[dict[str, Any]]:
        """As `Client.encoders`."""
        return await self._run(self._talk.encoders())

    async def embed(self, pictures: Iterable[Picture]) -> Values:
        """As `Client.embed`."""
        return self._talk.stacked([row async for row in self.embed_each(pictures)])

    async def embed_each(self, pictures: Iterable[Picture]) -> AsyncIterator[Row]:
        """As `Client.embed_each`. `pictures` is asked for the next one in the event loop, and must not block it."""
        async with aclosing(self._each(self._talk.batches(pictures), self._talk.embed)) as rows:
            async for row in rows:
                yield row

    async def add_each(self, images: Iterable[New], **query: object) -> AsyncIterator[Added | PatchsightError]:
        """As `Client.add_each`; `images` must not block the event loop."""
        steps = self._each(self._talk.new_batches(images), lambda batch: self._talk.add(batch, query))
        async with aclosing(steps) as results:
            async for result in results:
                yield result

    async def gallery(self, **query: object) -> dict[str, Any]:
        """As `Client.gallery`."""
        return await self._run(self._talk.gallery(query))

    async def galleries(self) -> list[dict[str, Any]]:
        """As `Client.galleries`."""
        return await self._run(self._talk.galleries())

    async def gallery_images(self, **query: object) -> AsyncIterator[dict[str, Any]]:
        """As `Client.gallery_images`."""
        cursor: str | None = ""
        while cursor is not None:
            page = await self._run(self._talk.page({**query, "limit": 1000, "cursor": cursor}))
            for image in page["images"]:
                yield image
            cursor = page["next_cursor"]

    async def _each(
        self, batches: Iterable[list[S]], steps: Callable[[list[S]], Steps[list[T]]]
    ) -> AsyncGenerator[T, None]:
        """What comes of each thing in the batches, in order; several batches at a time."""
        ahead: deque[asyncio.Task[list[T]]] = deque()
        try:
            for batch in batches:
                if len(ahead) == self._talk.concurrency:
                    for result in await ahead[0]:
                        yield result
                    ahead.popleft()
                ahead.append(asyncio.create_task(self._run(steps(batch))))
            while ahead:
                for result in await ahead[0]:
                    yield result
                ahead.popleft()
        finally:
            for task in ahead:
                task.cancel()
            await asyncio.gather(*ahead, return_exceptions=True)

    async def attention(self, picture: Picture, head: str = "mean", mass: float | None = None) -> Values:
        """As `Client.attention`."""
        return await self._run(self._talk.attention(picture, head, mass))

    async def neighbors(self, picture: Picture, **query: object) -> list[Neighbor]:
        """As `Client.neighbors`."""
        return await self._run(self._talk.neighbors(picture, False, query))

    async def neighbors_each(
        self, pictures: Iterable[Picture], **query: object
    ) -> AsyncIterator[list[Neighbor] | PatchsightError]:
        """As `Client.neighbors_each`; `pictures` must not block the event loop."""
        ones = ([picture] for picture in pictures)
        async with aclosing(self._each(ones, lambda one: self._talk.neighbors_each(one, query))) as results:
            async for result in results:
                yield result

    async def neighbors_of(self, id: str, **query: object) -> list[Neighbor]:
        """As `Client.neighbors_of`."""
        return await self._run(self._talk.neighbors(id, True, query))

    async def neighbors_of_region(
        self, picture: Picture, box: Sequence[float], **query: object
    ) -> list[RegionNeighbor]:
        """As `Client.neighbors_of_region`."""
        return await self._run(self._talk.region(picture, False, box, query))

    async def neighbors_of_region_of(self, id: str, box: Sequence[float], **query: object) -> list[RegionNeighbor]:
        """As `Client.neighbors_of_region_of`."""
        return await self._run(self._talk.region(id, True, box, query))

    async def duplicates(self, **query: object) -> list[Group]:
        """As `Client.duplicates`."""
        return await self._run(self._talk.duplicates(query))

    async def clusters(self, **query: object) -> list[Cluster]:
        """As `Client.clusters`."""
        return await self._run(self._talk.clusters(query))

    async def map(self, **query: object) -> GalleryMap:
        """As `Client.map`."""
        return await self._run(self._talk.map(query))

    async def backup(self, to: File, **query: object) -> None:
        """As `Client.backup`."""
        await self._run(self._talk.backup(to, query))

    async def restore(self, file: File, **query: object) -> dict[str, Any]:
        """As `Client.restore`."""
        return await self._run(self._talk.restore(file, query))

    async def export(self, to: File, **query: object) -> None:
        """As `Client.export`."""
        await self._run(self._talk.export(to, query))

    async def import_file(self, file: File, **query: object) -> dict[str, Any]:
        """As `Client.import_file`."""
        return await self._run(self._talk.import_file(file, query))

    async def reembed(self, encoder: str, **query: object) -> dict[str, Any]:
        """As `Client.reembed`."""
        return await self._run(self._talk.reembed(encoder, query))

    async def remove_gallery(self, **query: object) -> None:
        """As `Client.remove_gallery`."""
        await self._run(self._talk.remove(query))

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        try:
            await self._run(self._talk.opened())
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _run(self, steps: Steps[T]) -> T:
        """Do what is yielded."""
        try:
            step = next(steps)
            while True:
                try:
                    reply = await self._do(step)
                except httpx.HTTPError as error:
                    step = steps.throw(error)
                else:
                    step = steps.send(reply)
        except StopIteration as done:
            result: T = done.value
            return result

    async def _do(self, step: Step) -> object:
        if isinstance(step, Call):
            return await send_in_loop(self._http, step)
        if isinstance(step, Work):
            return await asyncio.to_thread(step.do)
        await asyncio.sleep(step.seconds)
        return None
