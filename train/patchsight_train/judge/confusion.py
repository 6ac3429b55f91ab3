"""Which class is taken for which: the table of counts, the picture of it, and the pairs that are confused most."""

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

NUMBERED = 20  # classes up to which each cell shows its number


def confusion(truth: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """int64 `(classes, classes)`: how many images of class i were taken for class j. Both int64 `(N,)`."""
    return torch.bincount(truth * classes + predicted, minlength=classes**2).reshape(classes, classes)


def most_confused(counts: Tensor, names: list[str], count: int = 8) -> list[tuple[str, str, int, int]]:
    """Truth, prediction, how many images, out of how many: the commonest mistakes, the most frequent first."""
    wrong = counts.clone()
    wrong.fill_diagonal_(0)
    order = wrong.flatten().argsort(descending=True, stable=True)[:count]
    pairs = [divmod(int(i), len(counts)) for i in order]
    return [(names[i], names[j], int(wrong[i, j]), int(counts[i].sum())) for i, j in pairs if wrong[i, j] > 0]


def confusion_chart(counts: Tensor, names: list[str]) -> Figure:
    """Rows are the true classes, each to its own sum; numbers are images. Classes that test lacks stay empty."""
    C = len(counts)
    shares = (counts / counts.sum(dim=1, keepdim=True).clamp(min=1)).numpy()
    side = float(np.clip(0.42 * C + 2.2, 4, 11))
    figure = Figure(figsize=(side + 0.6, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="YlOrBr", vmin=0, vmax=1, interpolation="nearest")
    figure.colorbar(image, ax=axes, shrink=0.8, label="share of the true class")
    axes.set(xlabel="taken for", ylabel="true class")
    if C <= 3 * NUMBERED:
        axes.set_xticks(range(C), names, rotation=60, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(C), names)
    if C <= NUMBERED:
        for (i, j), n in np.ndenumerate(counts.numpy()):
            if n:
                color = "white" if shares[i, j] > 0.55 else "black"
                axes.text(j, i, f"{n:,}", ha="center", va="center", fontsize=7.5, color=color)
    return figure
