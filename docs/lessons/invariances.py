"""What an encoder no longer sees: how far each augmentation moves it, and a task that color invariance hurts.

The encoders are those of `color_distortion.py`. Distance is the mean squared one of normalized embeddings, as a share
of that between two different pictures: 0 is blind to the change. The task: which third of the color wheel is this
picture? Its hue is turned by a third, two thirds or not at all, and a linear probe tells which.
"""

import torch
from color_distortion import ARMS, COMMON, SEEDS
from lesson import cifar10, mean, save, trained
from matplotlib.figure import Figure
from torch import Generator, Tensor

from patchsight_train.color import adjust_hue
from patchsight_train.encoder import chunks
from patchsight_train.linear import linear_probe
from patchsight_train.objective import Objective
from patchsight_train.randomness import Randomness
from patchsight_train.views import View, augment, eval_view, normalize

JITTER = {"brightness": 0, "contrast": 1, "saturation": 2, "hue": 3}
PLAIN = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "flip": 0.0}


def changes() -> dict[str, View]:
    """One view for each augmentation alone, at the strength of the training with color."""
    views = {
        "crop": View(32, **{**PLAIN, "scale": (0.2, 1.0), "ratio": (3 / 4, 4 / 3)}),
        "flip": View(32, **{**PLAIN, "flip": 1.0}),
        "gray": View(32, **PLAIN, gray=1.0),
    }
    for name, place in JITTER.items():
        strength = [0.0] * 4
        strength[place] = 0.4 if place < 3 else 0.1
        views[name] = View(32, **PLAIN, jitter=tuple(strength), jitter_p=1.0)
    return views


@torch.no_grad()
def embedded(objective: Objective, x: Tensor) -> Tensor:
    """Normalized pictures to L2-normalized embeddings."""
    parts = [objective.kept.pooled(x[rows], objective.pooling) for rows in chunks(len(x), 512)]
    return torch.nn.functional.normalize(torch.cat(parts), dim=1)


def moved(objective: Objective, pixels: Tensor) -> dict[str, float]:
    """For each augmentation: how far the embedding moves, as a share of the distance of different pictures."""
    before = embedded(objective, eval_view(pixels))
    apart = ((before - before.roll(1, 0)) ** 2).sum(dim=1).mean()
    found = {}
    for name, view in changes().items():
        after = embedded(objective, augment(pixels, view, Randomness(Generator().manual_seed(0))))
        found[name] = (((after - before) ** 2).sum(dim=1).mean() / apart).item()
    return found


def hue_task(objective: Objective, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings of the pictures with their hue turned, and by how many thirds."""
    turns = torch.arange(len(pixels)) % 3
    x = adjust_hue(pixels.float() / 255, (turns / 3).view(-1, 1, 1, 1))
    return embedded(objective, normalize(x)), turns


def main() -> None:
    split = cifar10(8192)
    results: dict[str, dict[str, dict[str, float]]] = {}
    for arm, distortion in ARMS.items():
        results[arm] = {}
        for seed in SEEDS:
            objective, _ = trained(split.train, "simclr", seed=seed, **COMMON, **distortion)
            gallery, turns = hue_task(objective, split.train.pixels)
            queries, truth = hue_task(objective, split.test.pixels)
            results[arm][f"seed {seed}"] = {
                **moved(objective, split.test.pixels), "hue task": linear_probe(gallery, turns, queries, truth),
            }  # fmt: skip
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 1))
    for i, (arm, runs) in enumerate(results.items()):
        color, names = ("tab:blue", "tab:orange")[i], list(changes())
        height = [mean(run[name] for run in runs.values()) for name in names]
        left.bar([x + 0.4 * i for x in range(len(names))], height, width=0.38, color=color, label=f"trained by {arm}")
        task = [run["hue task"] for run in runs.values()]
        right.bar(i, mean(task), color=color)
        right.plot([i] * len(task), task, "k.", markersize=5)
        left.set_xticks([x + 0.2 for x in range(len(names))], names)
    left.set(ylabel="how far the embedding moves\n(1: as another picture)", yscale="log")
    left.legend(frameon=False)
    right.set_xticks(range(len(results)), [arm.replace(" ", "\n", 1) for arm in results], fontsize=8)
    right.axhline(1 / 3, color="gray", linestyle=":")
    right.set_title("which third of the color wheel?", fontsize=9)
    save("invariances", figure, {"images": 8192, "arms": results})


if __name__ == "__main__":
    main()
