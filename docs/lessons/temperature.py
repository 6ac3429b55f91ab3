"""Temperature moves uniformity and alignment against each other (arXiv:2005.10242; arXiv:2012.09740).

A low temperature looks at the hardest negatives alone and spreads the embeddings over the sphere, at the price of
pulling the two views of a picture apart; a high one lets views meet and embeddings gather.
"""

import torch
import torch.nn.functional as F
from lesson import cifar10, mean, quality, save, trained
from matplotlib.figure import Figure
from torch import Generator

from patchsight_train.objective import Objective
from patchsight_train.quality import alignment, uniformity
from patchsight_train.randomness import Randomness
from patchsight_train.simclr import SimCLR

SEEDS = (0, 1)
TEMPERATURES = (0.05, 0.2, 1.0)
COMMON = {"stem": "conv", "projection_hidden": 512, "epochs": 4, "crop_scale": (0.2, 1.0)}


@torch.no_grad()
def measured(objective: Objective, images: torch.Tensor) -> dict[str, float]:
    """Alignment of the two views' projections and uniformity of all: where the loss is taken. Low is good in both."""
    assert isinstance(objective, SimCLR)
    objective.head.train()  # batch norm by the batch, as the loss sees it
    views = objective.views(images, Randomness(Generator().manual_seed(1)))
    z = [F.normalize(objective.head(objective.encoder.pooled(v, objective.pooling)), dim=1) for v in views]
    return {"alignment": alignment(*z), "uniformity": uniformity(torch.cat(z))}


def main() -> None:
    split = cifar10(8192)
    results: dict[str, dict[str, dict[str, float]]] = {}
    for temperature in TEMPERATURES:
        results[str(temperature)] = {}
        for seed in SEEDS:
            objective, _ = trained(split.train, "simclr", temperature=temperature, seed=seed, **COMMON)
            found = {**measured(objective, split.test.pixels), **quality(objective, split)}
            results[str(temperature)][f"seed {seed}"] = found
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    plane, probes = figure.subplots(1, 2)
    for temperature, runs in results.items():
        x, y = ([run[name] for run in runs.values()] for name in ("alignment", "uniformity"))
        plane.plot(x, y, "o", label=f"τ = {temperature}")
        plane.annotate(f"τ = {temperature}", (x[0], y[0]), xytext=(8, 0), textcoords="offset points", fontsize=9)
    plane.set(xlabel="alignment: distance² of two views of a picture", ylabel="uniformity: lower is more spread")
    plane.margins(x=0.2)
    for name in ("linear", "knn"):
        probes.plot(
            TEMPERATURES, [mean(run[name] for run in runs.values()) for runs in results.values()], "o-",
            label={"linear": "linear probe", "knn": "20-NN"}[name],
        )  # fmt: skip
    probes.set(xscale="log", xlabel="temperature τ", ylabel="accuracy", xticks=TEMPERATURES, xticklabels=TEMPERATURES)
    probes.minorticks_off()
    probes.legend(frameon=False)
    save("temperature", figure, {"images": 8192, "epochs": COMMON["epochs"], "temperatures": results})


if __name__ == "__main__":
    main()
