"""The photos that servers are asked to embed: a fixed mix of 0.02, 0.2 and 2 megapixels.

They are real ones, from the test parts of Caltech-101 and the clothing set, which have about 0.03 megapixels each. All
are brought to their size with Lanczos and saved as JPEG of quality 90: those of 0.2 and 2 megapixels are larger than
they were taken. What a decoder does depends on the number of pixels and of bytes; the latter, 170 kB for 2 megapixels,
is less than a camera's, which makes decoding a little cheaper than it would be for a camera's files.
"""

import io

import numpy as np
from measure import DATA
from PIL import Image

from patchsight_serve.dataset import read_dataset

SHARES = {0.02: 0.5, 0.2: 0.4, 2.0: 0.1}  # of all photos, by megapixels
COUNT = 40


def photos(count: int = COUNT, seed: int = 0) -> list[bytes]:
    """JPEG files in a shuffled order, which is the same every time."""
    sources = [read_dataset(DATA / name / "test.parquet") for name in ("caltech101", "clothing10")]
    rng = np.random.default_rng(seed)
    sizes = [size for size, share in SHARES.items() for _ in range(round(share * count))]
    made = []
    for i, megapixels in enumerate(sizes):
        source = sources[i % len(sources)]
        made.append(resized(source.read(int(rng.integers(len(source)))), megapixels))
    return [made[i] for i in rng.permutation(len(made))]


def resized(data: bytes, megapixels: float) -> bytes:
    """The same picture with that many pixels."""
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    scale = (1e6 * megapixels / (picture.width * picture.height)) ** 0.5
    size = (round(picture.width * scale), round(picture.height * scale))
    file = io.BytesIO()
    picture.resize(size, Image.Resampling.LANCZOS).save(file, "JPEG", quality=90)
    return file.getvalue()


def distinct(count: int) -> list[bytes]:
    """So many files of which no two are equal, by what stands behind the picture's end and no decoder reads: a server
    that computes equal files once gains nothing by them."""
    made = photos()
    return [made[i % len(made)] + i.to_bytes(4, "big") for i in range(count)]
