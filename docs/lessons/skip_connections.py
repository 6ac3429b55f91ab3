"""Skip connections lower the reconstruction error and worsen the probe.

Both autoencoders have the same vector z between encoder and decoder. In the second the decoder also sees the encoder's
layers, as in a U-Net: the picture finds its way around z, and nothing has to be understood to be copied. The probes
look at z, and at the encoder's own embedding.
"""

import torch
from lesson import Split, cifar10, knn, linear, mean, quality, save, settings, trained
from matplotlib.figure import Figure
from torch import Tensor

from patchsight_train.autoencoder import Autoencoder
from patchsight_train.build import build
from patchsight_train.objective import Objective
from patchsight_train.views import denormalize, eval_view

SEEDS = (0, 1)
ARMS = {"through z alone": "autoencoder", "with skip connections": "skip_autoencoder"}
COMMON = {"decoder_width": 64, "decoder_depth": 2, "decoder_heads": 2, "bottleneck": 64, "epochs": 6}


def main() -> None:
    split = cifar10(8192)
    results: dict[str, dict[str, dict[str, float]]] = {}
    x = eval_view(split.test.pixels[:500])
    pictures = {"picture": denormalize(x[:8])}
    for arm, name in ARMS.items():
        results[arm] = {}
        for seed in SEEDS:
            objective, _ = trained(split.train, name, seed=seed, **COMMON)
            made = objective.reconstruct([x])
            assert made is not None
            error = ((made - denormalize(x)) ** 2).mean().item()
            results[arm][f"seed {seed}"] = {"mean squared error (0..1)": error, **probes(objective, split)}
            pictures.setdefault(arm, made[:8])
    torch.manual_seed(0)
    results["untrained"] = {"seed 0": probes(build(settings("autoencoder", **COMMON)).eval(), split)}
    save("skip_connections", draw(pictures, results), {"images": 8192, "epochs": COMMON["epochs"], "arms": results})


def probes(objective: Objective, split: Split) -> dict[str, float]:
    """Of z, and of the pooled embedding."""
    assert isinstance(objective, Autoencoder)
    gallery, queries = (codes(objective, images.pixels) for images in (split.train, split.test))
    unit = [torch.nn.functional.normalize(z, dim=1) for z in (gallery, queries)]
    embedding = {f"{name}, embedding": value for name, value in quality(objective, split).items()}
    return {"knn, z": knn(*unit, split), "linear, z": linear(gallery, queries, split), **embedding}


@torch.no_grad()
def codes(objective: Autoencoder, pixels: Tensor) -> Tensor:
    """z of all pictures, `(N, Z)`."""
    return torch.cat([objective.code(eval_view(part)) for part in pixels.split(512)])


def draw(pictures: dict[str, Tensor], results: dict[str, dict[str, dict[str, float]]]) -> Figure:
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.4, 1))
    for axes, (name, x) in zip(left.subplots(len(pictures), 1), pictures.items(), strict=True):
        axes.imshow(torch.cat(list(x), dim=2).permute(1, 2, 0).numpy())
        axes.set_title(name, fontsize=9)
        axes.axis("off")
    for axes, measure in zip(right.subplots(1, 2), ("mean squared error (0..1)", "linear, z"), strict=True):
        arms = {arm: runs for arm, runs in results.items() if measure in runs["seed 0"]}
        for i, runs in enumerate(arms.values()):
            found = [run[measure] for run in runs.values()]
            axes.bar(i, mean(found), color=("tab:blue", "tab:orange", "tab:gray")[i])
            axes.plot([i] * len(found), found, "k.", markersize=5)
        axes.set_xticks(range(len(arms)), [arm.replace(" ", "\n") for arm in arms], fontsize=7)
        axes.set_title({"linear, z": "linear probe on z"}.get(measure, "reconstruction error"), fontsize=9)
        if measure == "linear, z":
            axes.set_ylim(0.1)
    return figure


if __name__ == "__main__":
    main()
