"""Training images that do not fit into memory: they stay on disk, and threads decode each batch ahead of need."""

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from rich.console import Console
from torch import Tensor

from patchsight_serve.errors import InvalidRequest, PatchsightError
from patchsight_train.data import (
    Batches,
    EncodedImages,
    Images,
    Pixels,
    available_memory,
    cores,
    decode_all,
    decoders,
    look_ahead,
    ranks_here,
    report,
    room_for,
)

Failures = list[tuple[int, Exception]]


def open_images(
    sources: Iterable[str], size: int, limit: int | None, console: Console, resident: bool | None = None
) -> "Images | StreamedImages":
    """The images of all sources at `(size, size)`: decoded into memory where they fit, else streamed; says which.

    resident: True or False to have it so in any case.

    Raises:
        InvalidRequest: a source is missing or empty, no image could be read, or they must fit into memory and do not.
        DataLost: as `load_images`.
    """
    encoded = EncodedImages(sources, limit)
    fits, why = room_for(len(encoded), size)
    if resident and not fits:
        raise InvalidRequest(f"{why}; use a smaller --image-size or --limit, or let them be streamed")
    if fits if resident is None else resident:
        console.print(f"{why}: kept in memory", highlight=False, soft_wrap=True)
        return decode_all(encoded, range(len(encoded)), size, console)
    how = f"streamed, {cores()} threads decode each batch ahead of need"
    console.print(f"{why}: {how}", highlight=False, soft_wrap=True)
    _keep_parquet(encoded, console)
    return StreamedImages(encoded, size, console)


def _keep_parquet(encoded: EncodedImages, console: Console) -> None:
    """Let Parquet files keep in memory what was read, up to a quarter of what is free; say what it costs if that is too
    little, because images are drawn at random and a compressed page must be read whole for each."""
    columns = [(s, d.parquet) for s, d in zip(encoded.sources, encoded.datasets, strict=True) if d.parquet is not None]
    total = sum(column.nbytes for _, column in columns)
    most = available_memory() / ranks_here() / 4
    for source, column in columns:
        column.kept.most = most * column.nbytes / total
        if total > most and column.is_compressed:
            console.print(
                f"{source}: compressed Parquet of {column.nbytes / 2**30:.1f} GiB, of which "
                f"{column.kept.most / 2**30:.1f} GiB can be kept in memory; each image drawn costs reading "
                f"{column.page_bytes / 2**20:.1f} MiB. Faster: a folder of files, or Parquet written with "
                f"compression='none'",
                highlight=False, soft_wrap=True, markup=False,
            )  # fmt: skip


@dataclass(frozen=True)
class _Batch:
    pixels: Tensor
    parts: list[Future[Failures]]


class StreamedImages:
    """Encoded images, decoded when a batch of them is due.

    An image that cannot be read is reported once with its name, and the next one of the set that can be read stands in
    its place: the same one each time, so that a resumed run sees what an uninterrupted one does.

    labels, class_names: as in `Images`.
    """

    def __init__(self, encoded: EncodedImages, size: int, console: Console) -> None:
        self.encoded, self.size, self.console = encoded, size, console
        self.labels, self.class_names = encoded.labels, encoded.class_names
        self._reported: set[int] = set()

    def __len__(self) -> int:
        return len(self.encoded)

    def on_device(self, device: torch.device, share: float = 0.5) -> "StreamedImages":  # noqa: ARG002 - as `Images`
        """Themselves: what does not fit into memory does not fit onto a GPU."""
        return self

    def batches(self, orders: Iterable[Tensor], device: torch.device, ahead: int = 4) -> Batches:
        """For each order, int64 `(b,)` on the CPU, those images in it: uint8 `(b, 3, S, S)` on `device`.

        Up to `ahead` batches are decoded, or being so, while one is in use; `orders` is read ahead by as many. Closing
        the generator ends its threads.

        Raises:
            DataLost: so many files in a row could not be opened that the source must be gone.
            InvalidRequest: not one image of the set can be read.
        """
        pool = decoders()
        try:
            for batch in look_ahead(orders, lambda order: self._start(order, pool, device.type == "cuda"), ahead):
                for part in batch.parts:
                    self._report(part.result())
                yield batch.pixels.to(device, non_blocking=True)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _start(self, order: Tensor, pool: ThreadPoolExecutor, pin: bool) -> _Batch:
        """Have the threads fill a batch, each with rows that lie near each other in the set."""
        pixels = torch.empty(len(order), 3, self.size, self.size, dtype=torch.uint8, pin_memory=pin)
        parts = torch.argsort(order).chunk(max(cores(), len(order) // 16))
        return _Batch(pixels, [pool.submit(self._fill, pixels, order[part], part) for part in parts])

    def _fill(self, pixels: Tensor, rows: Tensor, places: Tensor) -> Failures:
        array, failures = pixels.numpy(), Failures()
        for i, place in zip(rows.tolist(), places.tolist(), strict=True):
            image, failed = self._read(i)
            array[place] = image.transpose(2, 0, 1)
            failures += failed
        return failures

    def _read(self, i: int) -> tuple[Pixels, Failures]:
        """Image `i`, or the first after it that can be read, and why those before could not."""
        failures, missing = Failures(), 0
        for step in range(len(self)):
            row = (i + step) % len(self)
            try:
                return self.encoded.decode(row, self.size), failures
            except (PatchsightError, OSError) as error:
                missing = self.encoded.check_loss(row, error, missing)
                failures.append((row, error))
        raise InvalidRequest(f"none of the {len(self)} images could be read")

    def _report(self, failures: Failures) -> None:
        for row, error in failures:
            if row not in self._reported:
                self._reported.add(row)
                report(self.console, "replaced by the next", self.encoded.name(row), error)
