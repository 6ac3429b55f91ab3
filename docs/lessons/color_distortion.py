"""Without color distortion SimCLR is solved by color histograms (arXiv:2002.05709, section 3.1 and Figure 6).

Two crops of one picture have the same colors: a network that only compares histograms finds the pair. So the encoder
has no reason to learn shapes, and probes worse, although its own task looks nearly solved.
"""

import torch
from lesson import cifar10, mean, quality, save, trained
from matplotlib.figure import Figure
from torch import Generator, Tensor

from patchsight_train.randomness import Randomness
from patchsight_train.simclr import SimCLR
from patchsight_train.views import denormalize

SEEDS = (0, 1)
ARMS = {"crops and color": {}, "crops alone": {"color_strength": 0.0, "gray": 0.0}}
COMMON = {"stem": "conv", "projection_hidden": 512, "epochs": 6, "crop_scale": (0.2, 1.0)}
CANDIDATES = 256


def histogram(x: Tensor, bins: int = 16) -> Tensor:
    """Views `(B, 3, S, S)` in 0..1 to the histograms of their channels, `(B, 3, bins)`; each sums to 1."""
    index = (x * bins).long().clamp(max=bins - 1).flatten(2)
    return (
        torch.zeros(*x.shape[:2], bins).scatter_add_(2, index, torch.ones_like(index, dtype=torch.float))
        / index.shape[2]
    )


def solved_by_color(first: Tensor, second: Tensor) -> float:
    """How often the other crop of a picture is the one with the most similar histogram among `CANDIDATES`."""
    a, b = histogram(first).flatten(1), histogram(second).flatten(1)
    return (torch.cdist(a, b, p=1).argmin(dim=1) == torch.arange(len(a))).float().mean().item()


def main() -> None:
    split = cifar10(8192)
    results: dict[str, dict[str, float]] = {}
    pictures = {}
    for arm, changes in ARMS.items():
        runs = [trained(split.train, "simclr", seed=seed, **{**COMMON, **changes}) for seed in SEEDS]
        probes = [quality(objective, split) for objective, _ in runs]
        objective = runs[0][0]
        assert isinstance(objective, SimCLR)
        images = split.test.pixels[:CANDIDATES]
        views = [denormalize(v) for v in objective.views(images, Randomness(Generator().manual_seed(0)))]
        pictures[arm] = views
        results[arm] = {
            **{f"knn, seed {seed}": p["knn"] for seed, p in zip(SEEDS, probes, strict=True)},
            **{f"linear, seed {seed}": p["linear"] for seed, p in zip(SEEDS, probes, strict=True)},
            "contrastive accuracy at the end": mean(
                mean(line["contrastive_accuracy"] for line in log[-20:]) for _, log in runs
            ),
            f"pairs found by histogram alone, of {CANDIDATES}": solved_by_color(*views),
        }
    save("color_distortion", draw(pictures, results), {"images": 8192, "epochs": COMMON["epochs"], "arms": results})


def draw(pictures: dict[str, list[Tensor]], results: dict[str, dict[str, float]]) -> Figure:
    """For each arm two views of one picture with their histograms; then the probes."""
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    grid = figure.add_gridspec(2, 5)
    for row, (arm, views) in enumerate(pictures.items()):
        for column, view in enumerate(views):
            axes = figure.add_subplot(grid[row, 2 * column])
            axes.imshow(view[7].permute(1, 2, 0).numpy())
            axes.set_title(f"{arm}: view {column + 1}", fontsize=9)
            axes.axis("off")
            axes = figure.add_subplot(grid[row, 2 * column + 1])
            for channel, color in enumerate(("tab:red", "tab:green", "tab:blue")):
                axes.step(range(16), histogram(view[7:8])[0, channel].numpy(), color=color)
            axes.set(yticks=[], xticks=[0, 15], xticklabels=["dark", "bright"])
            axes.set_title("its histogram", fontsize=9)
    for row, measure in enumerate(("linear", "knn")):
        axes = figure.add_subplot(grid[row, 4])
        for x, values in enumerate(results.values()):
            found = [v for name, v in values.items() if name.startswith(measure)]
            axes.bar(x, mean(found), color=("tab:blue", "tab:orange")[x])
            axes.plot([x] * len(found), found, "k.", markersize=5)
        axes.set_xticks(range(len(results)), [name.replace(" ", "\n", 1) for name in results], fontsize=8)
        axes.set_title({"linear": "linear probe", "knn": "20-NN"}[measure], fontsize=9)
        axes.set_ylim(0.2)
    return figure


if __name__ == "__main__":
    main()
