"""The training images: encoded, in one order over all sources, and decoded into one uint8 tensor.

The decoder is the one that serves. `stream` is for the sets that do not fit into memory.
"""

import math
import os
from bisect import bisect_right
from collections import abc, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text
from torch import Generator, Tensor

from patchsight_serve.dataset import Dataset, read_dataset
from patchsight_serve.decode import decode
from patchsight_serve.errors import InvalidRequest, PatchsightError
from patchsight_serve.manifest import Transform

Batches = abc.Generator[Tensor, None, None]  # to be closed by who has seen enough
T = TypeVar("T")
U = TypeVar("U")
Pixels = np.ndarray[Any, np.dtype[np.uint8]]

LOST_AFTER = 8  # files in a row that cannot be opened: no coincidence, the set is gone


class DataLost(PatchsightError):
    """The files were there and are not any more: deleted, unmounted, or on a disk that fails."""

    code = "data_lost"


@dataclass(frozen=True)
class Images:
    """Decoded images, all in memory.

    pixels: uint8 `(N, 3, S, S)`, RGB. labels: int64 `(N,)`, −1 where an image has none; None where no image has one, or
    the sources have different classes. class_names: in label order, or None.
    """

    pixels: Tensor
    labels: Tensor | None
    class_names: list[str] | None = None

    def __len__(self) -> int:
        return len(self.pixels)

    def on_device(self, device: torch.device, share: float = 0.5) -> "Images":
        """These images on the GPU if they take at most `share` of its free memory; else, and on a CPU, as they are."""
        if device.type != "cuda" or self.pixels.nbytes > share * torch.cuda.mem_get_info(device)[0]:
            return self
        return Images(self.pixels.to(device), self.labels, self.class_names)

    def batches(self, orders: Iterable[Tensor], device: torch.device) -> Batches:
        """For each order, int64 `(b,)` on the CPU, those images in it: uint8 `(b, 3, S, S)` on `device`.

        From the CPU to a GPU one batch is gathered ahead, beside the step that runs: `orders` is read ahead by one.
        """
        if self.pixels.device.type == device.type or device.type != "cuda":
            for order in orders:
                yield self.pixels[order.to(self.pixels.device)].to(device)
            return
        with ThreadPoolExecutor(1) as pool:
            for gathered in look_ahead(orders, lambda order: pool.submit(self._gather_pinned, order), 1):
                yield gathered.result().to(device, non_blocking=True)

    def _gather_pinned(self, order: Tensor) -> Tensor:
        out = torch.empty(len(order), *self.pixels.shape[1:], dtype=torch.uint8, pin_memory=True)
        return torch.index_select(self.pixels, 0, order, out=out)


def look_ahead(items: Iterable[T], start: Callable[[T], U], depth: int) -> Iterator[U]:
    """`start(item)` of each, in order; `depth` of them are started before they are asked for."""
    started: deque[U] = deque()
    for item in items:
        started.append(start(item))
        if len(started) > depth:
            yield started.popleft()
    while started:
        yield started.popleft()


class EncodedImages:
    """The images of several sources as they lie on disk, source after source, or the first `limit` of them.

    labels, class_names: as in `Images`; sources that name classes must name the same ones.

    Raises:
        InvalidRequest: a source is missing or holds no image.
    """

    def __init__(self, sources: Iterable[str], limit: int | None = None) -> None:
        self.sources = list(sources)
        self.datasets = [read_dataset(source) for source in self.sources]
        self._ends = list(accumulate(map(len, self.datasets)))
        self._count = min(self._ends[-1], limit or self._ends[-1])
        self.class_names = next((d.class_names for d in self.datasets if d.labels is not None), None)
        self.labels = self._labels()

    def __len__(self) -> int:
        return self._count

    def name(self, i: int) -> str:
        """What image `i` is called in its source."""
        dataset, row = self._place(i)
        return dataset.names[row]

    def decode(self, i: int, size: int) -> Pixels:
        """uint8 `(size, size, 3)`, RGB. Raises what `decode` raises, and OSError where the file cannot be read."""
        dataset, row = self._place(i)
        return decode(dataset.read(row), eval_transform(size))

    def check_loss(self, i: int, error: Exception, missing: int) -> int:
        """`missing` files in a row before image `i` could not be opened: how many with it. Raises DataLost if too many;
        damaged content does not count."""
        if not isinstance(error, OSError):
            return 0
        if missing + 1 < min(LOST_AFTER, len(self)):
            return missing + 1
        raise DataLost(
            f"{self.sources[bisect_right(self._ends, i)]}: {missing + 1} images in a row cannot be read, the last is "
            f"{self.name(i)}: {error}. Was the data moved, deleted or unmounted? Bring it back and give the same "
            f"command again"
        ) from error

    def _place(self, i: int) -> tuple[Dataset, int]:
        source = bisect_right(self._ends, i)
        return self.datasets[source], i - (self._ends[source - 1] if source else 0)

    def _labels(self) -> Tensor | None:
        labelled = [d for d in self.datasets if d.labels is not None]
        if not labelled or any(d.class_names != self.class_names for d in labelled):
            return None
        parts = [np.full(len(d), -1) if d.labels is None else d.labels for d in self.datasets]
        labels = torch.from_numpy(np.concatenate(parts))[: len(self)]
        return labels if (labels >= 0).any() else None


def eval_transform(image_size: int) -> Transform:
    """From file to the encoder's input: shorter side to `image_size`, bicubic, central square. Export records it."""
    return Transform(resize=image_size, crop=image_size)


def load_images(sources: Iterable[str], size: int, limit: int | None, console: Console) -> Images:
    """Decode every image of every source to `(size, size)`, in threads, with a progress bar.

    An image that cannot be read is reported once with its name, and left out.

    Raises:
        InvalidRequest: a source is missing or empty, no image could be read, or they would not fit into memory.
        DataLost: so many files in a row could not be opened that the source must be gone.
    """
    encoded = EncodedImages(sources, limit)
    fits, why = room_for(len(encoded), size)
    if not fits:
        raise InvalidRequest(f"{why}; use a smaller --image-size or --limit, or let them be streamed")
    return decode_all(encoded, range(len(encoded)), size, console)


def sample_images(
    sources: Iterable[str], image_size: int, count: int, console: Console, limit: int | None = None
) -> Images:
    """At most `count` images, drawn at random but always the same ones, at the eval transform. Raises as
    `load_images`."""
    encoded = EncodedImages(sources, limit)
    return decode_all(encoded, draw(torch.arange(len(encoded)), count).tolist(), image_size, console)


def draw(rows: Tensor, count: int) -> Tensor:
    """At most `count` of the int64 `(N,)` rows, in ascending order; always the same ones."""
    chosen = torch.randperm(len(rows), generator=Generator().manual_seed(0))[:count]
    return rows[chosen.sort().values]


def decode_all(encoded: EncodedImages, rows: Sequence[int], size: int, console: Console) -> Images:
    """The images `rows` of a set, decoded. Reports and raises as `load_images`."""

    def read(i: int) -> Pixels | Exception:
        try:
            return encoded.decode(i, size)
        except (PatchsightError, OSError) as error:
            return error

    pixels = torch.empty(len(rows), 3, size, size, dtype=torch.uint8)
    array, missing = pixels.numpy(), 0
    good: list[int] = []
    columns = (TextColumn("decoding"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar, decoders() as pool:
        results = look_ahead(rows, lambda i: (i, pool.submit(read, i)), 256)
        for i, result in bar.track(results, total=len(rows)):
            image = result.result()
            if isinstance(image, Exception):
                report(console, "skipped", encoded.name(i), image)
                missing = encoded.check_loss(i, image, missing)
                continue
            array[len(good)] = image.transpose(2, 0, 1)
            good.append(i)
            missing = 0
    if not good:
        raise InvalidRequest(f"none of the {len(rows)} images could be read")
    labels = None if encoded.labels is None else encoded.labels[torch.tensor(good)]
    return Images(pixels[: len(good)], labels, encoded.class_names)


def report(console: Console, what: str, name: str, error: Exception) -> None:
    """One line about an image that cannot be read; names may hold brackets, which are no markup."""
    console.print(Text.assemble((f"{what} ", "yellow"), f"{name}: {error}"), soft_wrap=True)


def decoders() -> ThreadPoolExecutor:
    """Threads that decode. Pillow works outside of the interpreter's lock."""
    return ThreadPoolExecutor(cores(), thread_name_prefix="decode")


def cores() -> int:
    """CPU cores for this process: those it may use, divided among the ranks of this machine."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(usable // ranks_here(), 1)


def ranks_here() -> int:
    """Training processes on this machine, as torchrun says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def room_for(count: int, size: int) -> tuple[bool, str]:
    """Whether so many decoded images fit into memory, once for each rank here, and the figures that say so. A fifth is
    left to the rest of the training."""
    needed, free = count * size**2 * 3 * ranks_here(), available_memory()
    figures = f"need {needed / 2**30:.1f} GiB decoded, {free / 2**30:.1f} GiB are free"
    return needed <= 0.8 * free, f"{count:,} images of {size} px {figures}"


def available_memory() -> float:
    """Bytes that can be had without swapping, file cache counted in; infinite where the system does not say."""
    return min(_memory_of_the_machine(), _memory_of_the_container())


def _memory_of_the_machine(meminfo: Path = Path("/proc/meminfo")) -> float:
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        return math.inf
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), math.inf)


def _memory_of_the_container(cgroup: Path = Path("/sys/fs/cgroup")) -> float:
    """What a control group (version 2) leaves, which a container's /proc/meminfo does not know of."""
    try:
        most, used = (cgroup / "memory.max").read_text().strip(), (cgroup / "memory.current").read_text()
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        return math.inf if most == "max" else int(most) - int(used) + int(stat.get("inactive_file", 0))
    except (OSError, ValueError):
        return math.inf
