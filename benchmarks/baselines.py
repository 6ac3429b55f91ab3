"""Features of pictures that need no learning, or hardly any: what a trained encoder has to beat.

All take uint8 `(N, 32, 32, 3)` of gallery and queries and give float32 `(N, ·)` of both, centered by the gallery's
mean, without which cosine sees little but what all pictures share.
"""

from collections.abc import Callable

import numpy as np
import torch
from sklearn.decomposition import PCA

from patchsight_train.architecture import ViTConfig
from patchsight_train.probe import embed
from patchsight_train.vit import ViT

COMPONENTS = 128
Sides = tuple[np.ndarray, np.ndarray]


def raw(gallery: np.ndarray, queries: np.ndarray) -> Sides:
    """The picture itself."""
    return centered(*(pixels.reshape(len(pixels), -1) / np.float32(255) for pixels in (gallery, queries)))


def components(gallery: np.ndarray, queries: np.ndarray) -> Sides:
    """The first principal components of the pixels, each to deviation 1."""
    x, q = raw(gallery, queries)
    pca = PCA(min(COMPONENTS, len(x)), whiten=True, svd_solver="randomized", random_state=0).fit(x)
    return pca.transform(x).astype(np.float32), pca.transform(q).astype(np.float32)


def histograms(gallery: np.ndarray, queries: np.ndarray) -> Sides:
    """Histograms of oriented gradients, and beside them a 4 × 4 color thumbnail at a weight of 0.3, the best of three
    tried."""
    return centered(*(_histograms(pixels.astype(np.float32) / 255) for pixels in (gallery, queries)))


def _histograms(pixels: np.ndarray) -> np.ndarray:
    """As Dalal and Triggs made them (CVPR 2005): square-root pixels, the strongest of the three channels, 9 unsigned
    directions in cells of 4 × 4, blocks of 2 × 2 cells normalized and clipped at 0.2."""
    N, cell, bins = len(pixels), 4, 9
    dy, dx = np.gradient(np.sqrt(pixels), axis=(1, 2))
    strongest = np.hypot(dx, dy).argmax(axis=3)[..., None]
    dx, dy = (np.take_along_axis(d, strongest, axis=3)[..., 0] for d in (dx, dy))
    place = np.arctan2(dy, dx) % np.pi / np.pi * bins
    low, high_share = np.floor(place).astype(int), place % 1
    grid = 32 // cell
    cells = np.empty((N, grid, grid, bins), np.float32)
    for b in range(bins):
        share = (low % bins == b) * (1 - high_share) + ((low + 1) % bins == b) * high_share
        cells[..., b] = (np.hypot(dx, dy) * share).reshape(N, grid, cell, grid, cell).sum(axis=(2, 4))
    corners = [cells[:, :-1, :-1], cells[:, 1:, :-1], cells[:, :-1, 1:], cells[:, 1:, 1:]]
    blocks = np.concatenate(corners, axis=-1)
    blocks = np.minimum(blocks / (np.linalg.norm(blocks, axis=-1, keepdims=True) + 0.1), 0.2)
    color = pixels.reshape(N, 4, 8, 4, 8, 3).mean(axis=(2, 4)) - 0.5
    return np.concatenate([_unit(blocks.reshape(N, -1)), 0.3 * _unit(color.reshape(N, -1))], axis=1)


def _unit(rows: np.ndarray) -> np.ndarray:
    """Rows to length 1; a flat picture's stay near 0."""
    directions: np.ndarray = rows / (np.linalg.norm(rows, axis=1, keepdims=True) + 1e-6)
    return directions


def random_vit(gallery: np.ndarray, queries: np.ndarray) -> Sides:
    """The architecture that ships before its first step, mean of the patch tokens (better than its CLS)."""
    torch.manual_seed(0)
    encoder = ViT(ViTConfig(image_size=32, patch_size=4, width=128, depth=4, heads=4, stem="conv"))
    sides = (torch.from_numpy(pixels).permute(0, 3, 1, 2) for pixels in (gallery, queries))
    return centered(*(embed(encoder, side, "mean", torch.device("cpu")).numpy() for side in sides))


def centered(gallery: np.ndarray, queries: np.ndarray) -> Sides:
    mean = gallery.mean(axis=0)
    return gallery - mean, queries - mean


BASELINES: dict[str, Callable[[np.ndarray, np.ndarray], Sides]] = {
    "random ViT": random_vit,
    "raw pixels": raw,
    "principal components": components,
    "oriented gradients + color": histograms,
}
