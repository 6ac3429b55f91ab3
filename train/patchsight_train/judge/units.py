"""What do single units tell? A unit is one channel of the embedding.

Letters: N images, D units, C classes, B bins. Figures are computed in float64 on the CPU.
"""

import math

import torch
from PIL.Image import Image
from torch import Generator, Tensor

from patchsight_train.encoder import chunks
from patchsight_train.pictures import titled_sheet

SHUFFLES = 8
COLUMNS = 64  # units at a time: their ranks, bins and counts are what takes memory


def class_information(z: Tensor, labels: Tensor, bins: int = 20) -> Tensor:
    """Mutual information of each unit and the class, in bits: float64 `(D,)`, from 0 to the class's entropy.

    A unit is cut at its quantiles into bins that are equally filled, so only the order of its values counts; equal ones
    share a bin. Counted from N images, information comes out too large, by what labels in random order would tell: the
    mean over 8 such orders is subtracted, and what falls below 0 is 0. That is right for units that tell little, as
    almost all do, and too careful for one that tells nearly all there is (0.07 of 3.3 bits at C = 10, N = 2000).
    Miller's and Madow's formula is right for those, but breaks down where there are fewer images than B · C: of 200
    classes and 2000 images it finds 0.9 bits in a unit that knows nothing, as it counts only cells that were hit.

    Args:
        z: `(N, D)` of any float dtype; NaN is returned for units that are not finite.
        labels: int64 `(N,)`; images with −1 are left out. Where none is left, all is NaN.
        bins: B, 2 or more.
    """
    known = labels.cpu() >= 0
    y = torch.unique(labels.cpu()[known], return_inverse=True)[1]
    out = torch.full((z.shape[1],), math.nan, dtype=torch.float64)
    if not len(y):
        return out
    generator = Generator().manual_seed(0)  # one set of orders for all units, so that they stay comparable
    orders = [y[torch.randperm(len(y), generator=generator)] for _ in range(SHUFFLES)]
    for columns in chunks(z.shape[1], COLUMNS):
        values = z[:, columns].double().cpu()[known]
        bin_of = equally_filled(values.nan_to_num(), bins)
        by_chance = torch.stack([plug_in_information(bin_of, order, bins) for order in orders]).mean(dim=0)
        found = (plug_in_information(bin_of, y, bins) - by_chance).clamp(min=0)
        out[columns] = found.where(torch.isfinite(values).all(dim=0), math.nan)
    return out


def equally_filled(values: Tensor, bins: int) -> Tensor:
    """Columns `(N, D)` to each value's bin, int64 `(D, N)`, 0..bins − 1: N / bins in each, but equal values in one.

    The bin is that of a value's mean place in the order. A border at a value would put what often occurs, such as a
    ReLU's 0, together with whatever is just above it.
    """
    columns = values.T.contiguous()
    ordered = columns.sort(dim=1).values
    before = torch.searchsorted(ordered, columns)
    up_to = torch.searchsorted(ordered, columns, right=True)
    bin_of: Tensor = (before + up_to) * bins // (2 * len(values))
    return bin_of


def plug_in_information(bin_of: Tensor, y: Tensor, bins: int) -> Tensor:
    """Mutual information in bits of bins `(D, N)` and classes `(N,)`, both int64, taken from their counts: `(D,)`."""
    D, N = bin_of.shape
    C = int(y.max()) + 1
    counts = torch.zeros(D, bins * C, dtype=torch.float64)
    counts.scatter_add_(1, bin_of * C + y, torch.ones((), dtype=torch.float64).expand(D, N))
    p = counts.view(D, bins, C) / N
    joint, of_bin, of_class = (_entropy(x) for x in (p.flatten(1), p.sum(dim=2), p.sum(dim=1)))
    return of_bin + of_class - joint


def _entropy(p: Tensor) -> Tensor:
    """Of each row, bits."""
    bits: Tensor = torch.special.xlogy(p, p).sum(dim=1) / -math.log(2)
    return bits


def off_diagonal_correlation(z: Tensor) -> float:
    """Mean absolute Pearson correlation of different units, 0..1: how much they repeat each other.

    What Barlow Twins, arXiv:2103.03230, drives towards 0, there between two views. Independent units come out at about
    √(2 / πN), not at 0. Units that are constant, but for rounding, are left out.

    Args:
        z: `(N, D)` of any float dtype. NaN is returned where one is not finite, or fewer than two units vary.
    """
    if not torch.isfinite(z).all():
        return math.nan
    z = z.double().cpu()
    deviation = z.std(dim=0, correction=0)
    varies = deviation > 1e-6 * z.abs().max()
    D = int(varies.sum())
    if D < 2:
        return math.nan
    x = (z - z.mean(dim=0))[:, varies] / deviation[varies]
    correlation = (x.T @ x / len(x)).abs()
    return float((correlation.sum() - correlation.trace()) / (D * (D - 1)))


def strongest_images(z: Tensor, count: int) -> Tensor:
    """Which images each unit is highest on: rows of z `(N, D)`, int64 `(D, min(count, N))`, the strongest first.

    Of equal values the lower row comes first; NaN comes last.
    """
    z = z.cpu().nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    parts = [
        z[:, columns].T.sort(dim=1, descending=True, stable=True).indices[:, :count].clone()
        for columns in chunks(z.shape[1], COLUMNS)
    ]
    return torch.cat(parts)


def unit_sheet(
    pixels: Tensor, z: Tensor, units: list[int], labels: Tensor | None, class_names: list[str] | None, count: int = 8
) -> Image:
    """A row for each of `units`: what it tells of the class, and the images that it is highest on, the strongest first.

    Framed are those of the class that most of a row's images have.

    Args:
        pixels: uint8 `(N, 3, S, S)`.
        z: `(N, D)`, their embeddings.
        labels: int64 `(N,)`, −1 where unknown; None where none is known, which leaves classes and bits out.
        class_names: in label order; None to write numbers.
    """
    chosen = z[:, units]
    rows = strongest_images(chosen, count)  # (U, k)
    y = torch.full((len(z),), -1) if labels is None else labels.cpu()
    bits = class_information(chosen, y).tolist()
    names = [[_class_name(label, class_names) for label in row] for row in y[rows].tolist()]
    common = [_most_common(row) for row in names]
    titles = []
    for unit, row, usual, told in zip(units, names, common, bits, strict=True):
        of_class = [f"{told:.2f} bits", f"{row.count(usual)}/{len(row)} {usual}"] if usual else []
        titles.append([f"unit {unit}", *of_class])
    headers = ["unit", "images that it is highest on, the strongest first"]
    return titled_sheet(headers, titles, pixels.cpu()[rows] / 255, names, common)


def _class_name(label: int, class_names: list[str] | None) -> str:
    return "" if label < 0 else class_names[label] if class_names else str(label)


def _most_common(names: list[str]) -> str:
    """Of those that are known, the first of equals; "" where none is."""
    return max(filter(None, names), key=names.count, default="")
