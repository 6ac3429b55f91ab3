"""The training images, decoded once into one uint8 tensor by the same decoder that serves."""

import math
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text
from torch import Tensor

from patchsight_serve.dataset import Dataset, read_dataset
from patchsight_serve.decode import decode
from patchsight_serve.errors import InvalidRequest, PatchsightError
from patchsight_serve.manifest import Transform


@dataclass(frozen=True)
class Images:
    """pixels: uint8 `(N, 3, S, S)`, RGB. labels: int64 `(N,)`, or None where any source has none. class_names: in label
    order, or None."""

    pixels: Tensor
    labels: Tensor | None
    class_names: list[str] | None = None

    def __len__(self) -> int:
        return len(self.pixels)


def eval_transform(image_size: int) -> Transform:
    """From file to the encoder's input: shorter side to `image_size`, bicubic, central square. Export records it."""
    return Transform(resize=image_size, crop=image_size)


def load_images(sources: Iterable[str], image_size: int, limit: int | None, console: Console) -> Images:
    """Decode every image of every source, in threads, with a progress bar.

    An image that cannot be read is reported once with its name, and left out.

    Raises:
        InvalidRequest: a source is missing or empty, no image could be read, or they would not fit into memory.
    """
    datasets = [read_dataset(source) for source in sources]
    items = list(islice(((d, i) for d in datasets for i in range(len(d))), limit))
    _check_memory(len(items), image_size)
    transform = eval_transform(image_size)

    def read(item: tuple[Dataset, int]) -> np.ndarray | str:
        dataset, i = item
        try:
            return decode(dataset.read(i), transform)
        except (PatchsightError, OSError) as error:
            return f"{dataset.names[i]}: {error}"

    pixels = torch.empty(len(items), 3, image_size, image_size, dtype=torch.uint8)
    good: list[int] = []
    columns = (TextColumn("decoding"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar, ThreadPoolExecutor(os.cpu_count()) as pool:
        for n, result in enumerate(bar.track(pool.map(read, items), total=len(items))):
            if isinstance(result, str):
                console.print(Text.assemble(("skipped ", "yellow"), result), soft_wrap=True)
                continue
            pixels[len(good)] = torch.from_numpy(result.copy()).permute(2, 0, 1)
            good.append(n)
    if not good:
        raise InvalidRequest(f"none of the {len(items)} images could be read")
    return Images(pixels[: len(good)], _labels(datasets, good), datasets[0].class_names)


def _labels(datasets: list[Dataset], kept: list[int]) -> Tensor | None:
    """Labels of the images that were kept; several sources must share one set of classes to have labels at all."""
    if any(d.labels is None or d.class_names != datasets[0].class_names for d in datasets):
        return None
    labels = np.concatenate([d.labels for d in datasets if d.labels is not None])
    return torch.from_numpy(labels[kept])


def _check_memory(count: int, image_size: int) -> None:
    """The set is kept decoded: say so before the kernel does."""
    needed = count * image_size**2 * 3
    free = _available_memory()
    if needed > 0.8 * free:
        raise InvalidRequest(
            f"{count:,} images of {image_size} px need {needed / 2**30:.1f} GiB decoded, {free / 2**30:.1f} GiB are "
            f"free; use a smaller --image-size or --limit"
        )


def _available_memory() -> float:
    """Bytes that can be had without swapping, file cache counted in; infinite where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return math.inf
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), math.inf)
