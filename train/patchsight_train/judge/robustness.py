"""How far do embeddings move when a picture is harmed, and what does the neighbor search make of it?

Knows nothing of encoders: `embed` takes pixels, uint8 `(N, 3, S, S)`, and gives L2-normalized float32 `(N, D)`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from patchsight_train.judge.perturbations import PERTURBATIONS, Perturbation
from patchsight_train.judge.plots import ordered_chart
from patchsight_train.probe import knn_predict
from patchsight_train.wording import EVALUATED

__all__ = ["CLEAN", "PERTURBATIONS", "Perturbation", "Robustness", "measure", "robustness_chart"]

CLEAN = "clean"
BATCH = 512  # images that are harmed at once
TINY = 1e-12  # a mean distance below it is rounding: all pictures have one embedding
HEADINGS = {
    "jpeg": ("JPEG", "quality"),
    "scale": ("Downscaled and back", "share of the side"),
    "crop": ("Central crop", "share of the side"),
    "noise": ("Gaussian noise", "sigma, of 255"),
    "blur": ("Gaussian blur", "sigma, pixels of 32"),
    "brightness": ("Darker", "share of the brightness lost"),
    "contrast": ("Less contrast", "share lost"),
    "saturation": ("Paler", "share of the saturation lost"),
    "hue": ("Hue turned", "turns"),
    "gray": ("Gray", ""),
    "flip": ("Mirrored", ""),
    "rotation": ("Rotated", "degrees"),
}


@dataclass(frozen=True)
class Robustness:
    """One row of the table.

    knn: accuracy 0..1 of perturbed queries against the clean gallery; NaN where labels are missing.
    drift: mean of 1 − cos of a picture's embedding and its perturbed one's, 0..2.
    relative_drift: that over the mean of 1 − cos of two different pictures: at 1 a perturbed picture is as far from
        itself as from any other. NaN where all embeddings are one.
    """

    name: str
    strength: float
    knn: float
    drift: float
    relative_drift: float


def measure(
    embed: Callable[[Tensor], Tensor], gallery: Tensor, gallery_labels: Tensor, queries: Tensor, query_labels: Tensor,
    k: int = 20, seed: int = 0, done: Callable[[], None] = lambda: None,
) -> list[Robustness]:  # fmt: skip
    """A row for clean queries, then one for each of PERTURBATIONS.

    Args:
        gallery: L2-normalized embeddings of clean pictures, float32 `(G, D)`. queries: pixels.
        gallery_labels, query_labels: int64, −1 where unknown, which leaves an image out of `knn` alone.
        seed: of the noise; all strengths draw the same.
        done: called after each row, for a progress bar.
    """
    known, asked = gallery_labels >= 0, query_labels >= 0
    searched, labels, truth = gallery[known], gallery_labels[known], query_labels[asked]

    def accuracy(x: Tensor) -> float:
        if not len(labels) or not len(truth):
            return math.nan
        predicted = knn_predict(searched, labels, x[asked], min(k, len(searched)))
        return float((predicted == truth).double().mean())

    clean = embed(queries)
    apart = mean_distance(clean)
    rows = [Robustness(CLEAN, 0.0, accuracy(clean), 0.0, 0.0 if apart > TINY else math.nan)]
    done()
    for perturbation in PERTURBATIONS:
        x = torch.cat([embed(pixels) for pixels in _harmed(perturbation, queries, seed)])
        moved = drift(clean, x)
        relative = moved / apart if apart > TINY else math.nan
        rows.append(Robustness(perturbation.name, float(perturbation.strength), accuracy(x), moved, relative))
        done()
    return rows


def _harmed(perturbation: Perturbation, pixels: Tensor, seed: int) -> Iterator[Tensor]:
    generator = Generator().manual_seed(seed)
    for batch in torch.split(pixels, BATCH):
        yield perturbation.apply(batch, generator)


def drift(x: Tensor, y: Tensor) -> float:
    """Mean of 1 − cos of the rows of x and y, `(N, D)` each: half the squared distance, which is 0 for equal ones."""
    x, y = (F.normalize(z.double(), dim=1) for z in (x, y))
    return float((x - y).square().sum(dim=1).mean() / 2)


def mean_distance(z: Tensor) -> float:
    """Mean of 1 − cos over all pairs of different rows of `(N, D)`; NaN for fewer than two."""
    z = F.normalize(z.double(), dim=1)
    N = len(z)
    together = float(z.sum(dim=0).square().sum() - z.square().sum())  # of cos, over all pairs
    return 1 - together / (N * (N - 1)) if N > 1 else math.nan


def robustness_chart(rows: Sequence[Robustness]) -> str:
    """A small panel for each perturbation, as `<figure>`s for a grid of class "charts": accuracy and drift from the
    clean picture at the left to the strongest harm at the right, all in percent on one axis.

    They are `charts`' inline SVG, so they look like the training report's, follow the theme, and fetch nothing.

    Args:
        rows: of `measure`, the clean one first.
    """
    clean, *harmed = rows
    top = 100 * max([1.0, *(row.relative_drift for row in harmed if math.isfinite(row.relative_drift))])
    panels = []
    for name, group in groupby(harmed, key=lambda row: row.name):
        shown = [clean, *group]
        title, unit = HEADINGS.get(name, (name, ""))
        places = [CLEAN, *(f"{row.strength:g}" if unit else title.lower() for row in shown[1:])]
        lines = {
            EVALUATED["knn"].label: [100 * row.knn for row in shown],
            "drift, of the distance of different pictures": [100 * row.relative_drift for row in shown],
        }
        panels.append(ordered_chart(title, places, lines, unit, "%", top))
    return "".join(panels)
