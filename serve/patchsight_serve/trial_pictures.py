"""What a graph is tried on, when it is exported and whenever it is verified again: noise, and photos."""

from importlib.resources import as_file, files

import numpy as np

from patchsight_serve.dataset import read_dataset
from patchsight_serve.decode import decode
from patchsight_serve.encoder import Pixels
from patchsight_serve.manifest import Manifest, Transform

BATCHES = (1, 3, 8)  # images in a run


def photos(transform: Transform, count: int = max(BATCHES)) -> Pixels:
    """uint8 `(count, S, S, 3)`: real pictures, from the server's sample gallery, spread over its classes."""
    with as_file(files("patchsight_serve") / "samples" / "clothing.parquet") as path:
        samples = read_dataset(path)
        chosen = np.linspace(0, len(samples) - 1, count).round().astype(int)
        return np.stack([decode(samples.read(i), transform) for i in chosen])


def noise(size: int, count: int = max(BATCHES), width: int | None = None) -> Pixels:
    """uint8 `(count, size, width or size, 3)`, every pixel at random, the same in every run."""
    return np.random.default_rng(0).integers(0, 256, (count, size, width or size, 3), dtype=np.uint8)


def unseen_sizes(manifest: Manifest) -> list[tuple[int, int]]:
    """Height and width of pictures that a graph for any size is tried on beside the native one: smaller, larger, and
    neither square nor between the two."""
    step, native = manifest.size_step, manifest.transform.crop
    smaller = max(native // 2 // step * step, manifest.size_least)
    larger = max(native * 3 // 2 // step * step, native + step)
    return [(smaller, smaller), (larger, larger), (larger + step, smaller)]
