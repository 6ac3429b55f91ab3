"""Many images to embeddings, in this process. `client.Client` does the same through a server."""

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Protocol, TypeVar

import numpy as np

from patchsight_serve.dataset import Dataset
from patchsight_serve.decode import Limits, decode
from patchsight_serve.encoder import Encoder, Pixels
from patchsight_serve.errors import InvalidRequest, PatchsightError
from patchsight_serve.item import Identity
from patchsight_serve.nearest import F32

BATCH = 32  # images that are encoded together

T = TypeVar("T")


class Embedder(Protocol):
    """Whatever turns a stream of encoded images into a stream of embeddings."""

    @property
    def encoder(self) -> Identity:
        """Which encoder it is."""

    @property
    def output(self) -> str:
        """Which embedding of it: `cls` or `mean`."""

    def embed_each(self, images: Iterable[bytes]) -> Iterator[F32 | PatchsightError]:
        """For each image its embedding float32 `(D,)`, as the graph gives it, or what is wrong with the image."""


class LocalEmbedder:
    """An encoder of this process; the next batch is decoded while one is encoded.

    output: `recommended`, `cls`, `mean` or `both`. threads: that decode, None for one per core. Raises InvalidRequest
    if the encoder does not have the output.
    """

    def __init__(
        self, encoder: Encoder, output: str = "recommended", batch: int = BATCH, threads: int | None = None
    ) -> None:
        manifest = encoder.manifest
        self.encoder = Identity(manifest.name, manifest.sha256)
        self.output = manifest.recommended if output == "recommended" else output
        self._graph_name = f"{self.output}_embedding"
        if self._graph_name not in manifest.outputs:
            have = ", ".join(name for name in manifest.outputs if name.endswith("_embedding"))
            raise InvalidRequest(f"encoder {manifest.name!r} has no {self._graph_name}; it has {have}", "output")
        self._encoder = encoder
        self._batch, self._threads = batch, threads or os.cpu_count()

    def embed_each(self, images: Iterable[bytes]) -> Iterator[F32 | PatchsightError]:
        """As in `Embedder`."""
        with ThreadPoolExecutor(self._threads, thread_name_prefix="decode") as pool:
            ahead: deque[list[Future[Pixels | PatchsightError]]] = deque()
            for batch in batches(images, self._batch):
                ahead.append([pool.submit(self._decode, data) for data in batch])
                if len(ahead) == 2:
                    yield from self._encode([future.result() for future in ahead.popleft()])
            while ahead:
                yield from self._encode([future.result() for future in ahead.popleft()])

    def _decode(self, data: bytes) -> Pixels | PatchsightError:
        try:
            return decode(data, self._encoder.manifest.transform, Limits())
        except PatchsightError as error:
            return error

    def _encode(self, decoded: Sequence[Pixels | PatchsightError]) -> list[F32 | PatchsightError]:
        good = [pixels for pixels in decoded if not isinstance(pixels, PatchsightError)]
        vectors = iter(self._encoder.run(np.stack(good), [self._graph_name])[self._graph_name] if good else ())
        return [entry if isinstance(entry, PatchsightError) else next(vectors) for entry in decoded]


def embed_dataset(
    dataset: Dataset, embedder: Embedder, rows: Sequence[int] | None = None
) -> Iterator[F32 | PatchsightError]:
    """`embed_each` of all images, in order, or of these rows. One that cannot be read is an error like any other: a
    file that is gone must not cost the work on the rest."""
    rows = range(len(dataset)) if rows is None else rows
    unread: dict[int, PatchsightError] = {}

    def contents() -> Iterator[bytes]:
        for i in rows:
            try:
                yield dataset.read(i)
            except (OSError, PatchsightError) as error:
                unread[i] = PatchsightError(str(error))
                yield b""

    for i, result in zip(rows, embedder.embed_each(contents()), strict=True):
        yield unread.get(i, result)


def batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items, the last one shorter."""
    stream = iter(items)
    while batch := list(islice(stream, size)):
        yield batch
