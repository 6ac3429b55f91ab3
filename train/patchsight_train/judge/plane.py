"""The 2-D map of embeddings by t-SNE (van der Maaten and Hinton, JMLR 2008): as dots by class, and as the pictures.

What lies together is alike to the encoder; distances between groups, and their sizes, say nothing.
"""

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from sklearn.manifold import TSNE
from torch import Tensor

from patchsight_train.pictures import PAPER

MOST = 2000  # images; more take minutes
COLORED = 20  # classes up to which each has a color and a name
SIDE, TILE = 1400, 44  # of the atlas and a picture in it, pixels


def project(z: Tensor, seed: int = 0) -> np.ndarray:
    """L2-normalized `(N, D)`, N ≥ 4, to float64 `(N, 2)` in 0..1."""
    perplexity = min(30.0, (len(z) - 1) / 3)
    tsne = TSNE(init="pca", perplexity=perplexity, random_state=seed, n_jobs=1)
    points = tsne.fit_transform(z.numpy()).astype(np.float64)
    low, high = points.min(axis=0), points.max(axis=0)
    placed: np.ndarray = (points - low) / np.maximum(high - low, 1e-12)
    return placed


def scatter(points: np.ndarray, labels: Tensor, names: list[str]) -> Figure:
    """Dots `(N, 2)` in the color of their class. Of more than `COLORED` classes the most frequent have one."""
    figure = Figure(figsize=(7.2, 5.2), layout="constrained")
    axes = figure.subplots()
    colors = matplotlib.colormaps["tab10" if len(names) <= 10 else "tab20"]
    classes, counts = np.unique(labels.numpy(), return_counts=True)
    shown = sorted(classes[np.argsort(-counts, kind="stable")[:COLORED]].tolist())
    rest = ~np.isin(labels.numpy(), shown)
    if rest.any():
        others = f"{len(classes) - len(shown)} other classes"
        axes.scatter(points[rest, 0], points[rest, 1], s=6, color="0.8", linewidths=0, label=others)
    for rank, label in enumerate(shown):
        mine = points[labels.numpy() == label]
        color = colors(rank % colors.N)
        axes.scatter(mine[:, 0], mine[:, 1], s=11, color=color, alpha=0.8, linewidths=0, label=names[label])
    axes.set(xticks=[], yticks=[], aspect="equal")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8, markerscale=2)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure


def chosen_for_atlas(points: np.ndarray) -> tuple[list[int], np.ndarray]:
    """Which images have room on the map, one in each cell of a grid, the one nearest to the cell's center; and the
    cells, int64 `(n, 2)`, column and row."""
    cells = SIDE // TILE
    place = np.minimum((points * cells).astype(np.int64), cells - 1)
    distance = np.linalg.norm(points * cells - place - 0.5, axis=1)
    best: dict[tuple[int, int], int] = {}
    for i in np.argsort(-distance, kind="stable"):
        best[place[i, 0], place[i, 1]] = int(i)
    rows = sorted(best.values())
    return rows, place[rows]


def atlas(pictures: Tensor, cells: np.ndarray) -> Image.Image:
    """Pictures uint8 `(n, 3, S, S)` in their cells, y upwards as in `scatter`."""
    out = Image.new("RGB", (SIDE // TILE * TILE,) * 2, PAPER)
    for picture, (column, row) in zip(pictures.permute(0, 2, 3, 1).numpy(), cells.tolist(), strict=True):
        tile = Image.fromarray(picture).resize((TILE - 2, TILE - 2), Image.Resampling.LANCZOS)
        out.paste(tile, (column * TILE + 1, out.height - (row + 1) * TILE + 1))
    return out
