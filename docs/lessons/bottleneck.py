"""Compression is intelligence? Bottleneck size against bits per image, reconstruction error and probe.

An autoencoder's z is made coarser until its reconstruction suffers by 1 %; the entropy of what is left is what the
picture costs in bits. More numbers in z reconstruct better and cost more; the question is whether they also know
more.
"""

import torch
from lesson import cifar10, linear, mean, save, trained
from matplotlib.figure import Figure
from torch import Tensor

from patchsight_train.autoencoder import Autoencoder
from patchsight_train.mae import patchify
from patchsight_train.views import eval_view

SEEDS = (0, 1)
SIZES = (4, 32, 256)
COMMON = {"decoder_width": 64, "decoder_depth": 2, "decoder_heads": 2, "epochs": 6}


def bits(z: Tensor, step: float) -> float:
    """Bits for one row of `z` `(N, Z)` rounded to multiples of `step`: the sum of its columns' empirical entropies."""
    total = 0.0
    for column in (z / step).round().T:
        share = column.unique(return_counts=True)[1] / len(column)
        total -= (share * share.log2()).sum().item()
    return total


@torch.no_grad()
def rate(objective: Autoencoder, z: Tensor, x: Tensor) -> tuple[float, float]:
    """Bits per image at the coarsest rounding of z that costs at most 1 % of error, and the error without rounding."""

    target = patchify(x, objective.decoder.patch_size)

    def error(code: Tensor) -> float:
        return ((objective.decoder(code) - target) ** 2).mean().item()

    # Along principal axes, so that columns are not correlated and their entropies may be added.
    center = z.mean(dim=0)
    axes = torch.linalg.svd(z - center, full_matrices=False).Vh.T
    rotated = (z - center) @ axes
    plain, step = error(z), 1e-3 * rotated.std().item()
    while error((rotated / (2 * step)).round() * (2 * step) @ axes.T + center) < 1.01 * plain:
        step *= 2
    return bits(rotated, step), plain


def main() -> None:
    split = cifar10(8192)
    x, y = eval_view(split.test.pixels), eval_view(split.train.pixels)
    results: dict[str, dict[str, dict[str, float]]] = {}
    for size in SIZES:
        results[str(size)] = {}
        for seed in SEEDS:
            objective, _ = trained(split.train, "autoencoder", bottleneck=size, seed=seed, **COMMON)
            assert isinstance(objective, Autoencoder)
            with torch.no_grad():
                queries, gallery = (torch.cat([objective.code(part) for part in v.split(512)]) for v in (x, y))
            per_image, error = rate(objective, queries, x)
            results[str(size)][f"seed {seed}"] = {
                "bits per image": per_image, "error": error, "linear probe on z": linear(gallery, queries, split),
            }  # fmt: skip
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    for axes, name in zip(figure.subplots(1, 3), ("bits per image", "error", "linear probe on z"), strict=True):
        for seed in SEEDS:
            axes.plot(
                SIZES, [results[str(s)][f"seed {seed}"][name] for s in SIZES], "o", color="tab:blue", markersize=4
            )
        axes.plot(SIZES, [mean(run[name] for run in results[str(s)].values()) for s in SIZES], color="tab:blue")
        axes.set(xscale="log", xlabel="numbers in z", xticks=SIZES, xticklabels=SIZES, title=name)
        axes.minorticks_off()
    save("bottleneck", figure, {"images": 8192, "epochs": COMMON["epochs"], "sizes": results})


if __name__ == "__main__":
    main()
