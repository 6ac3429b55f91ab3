"""What the data is like, from a few headers: how many pictures there are, and of what size. Decodes none of them."""

import io
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from PIL import Image

from patchsight_serve.dataset import Dataset
from patchsight_serve.decode import Limits
from patchsight_serve.errors import InvalidRequest

SAMPLE = 256  # images that are looked at


@dataclass(frozen=True)
class Survey:
    """count: images in all. Of those looked at, in pixels: the median width and height, and of the shorter sides the
    median and the one that a tenth stays below; elongation: the median of longer through shorter side, 1 or more."""

    count: int
    width: int
    height: int
    short_side: int
    low_side: int
    elongation: float


def survey(datasets: Sequence[Dataset], limit: int | None = None) -> Survey:
    """Look at up to `SAMPLE` images, evenly spread over the data sets or their first `limit` images; always the same.

    Those that cannot be read are skipped: training will name them.

    Raises:
        InvalidRequest: not one of them can be read.
    """
    ends = list(accumulate(map(len, datasets)))
    count = min(ends[-1], limit or ends[-1])
    rows = np.linspace(0, count - 1, min(count, SAMPLE)).round().astype(int).tolist()
    sizes = []
    for i in rows:
        source = bisect_right(ends, i)
        size = _size(datasets[source], i - (ends[source - 1] if source else 0))
        if size is not None:
            sizes.append(size)
    if not sizes:
        raise InvalidRequest(f"none of {len(rows)} images, evenly spread over all {count:,}, could be read")
    sides = np.array(sizes)
    short, long = sides.min(axis=1), sides.max(axis=1)
    width, height = np.median(sides, axis=0)
    return Survey(
        count=count, width=int(width), height=int(height), short_side=int(np.median(short)),
        low_side=int(np.percentile(short, 10)), elongation=float(np.median(long / short)),
    )  # fmt: skip


def _size(dataset: Dataset, row: int) -> tuple[int, int] | None:
    """Width and height by the header; None for an image that training will not read either."""
    try:
        with Image.open(io.BytesIO(dataset.read(row))) as image:
            width, height = image.size
    except Exception:  # Pillow's readers raise nearly anything on a broken file
        return None
    limits = Limits()
    good = min(width, height) >= 1 and width * height <= limits.max_pixels and max(width, height) <= limits.max_side
    return (width, height) if good else None
