"""Why DINO learns local information: with local crops patches and attention get better (arXiv:2104.14294, Tables 8 and
9).

A local crop's CLS token has to say what the teacher says of the whole picture: so a part must know what it is part
of. Two measures beside k-NN: a linear probe that sees one patch token and names the picture's class; and, with a
small picture pasted onto a blurred other one, the share of the CLS token's attention that falls on it, where chance
is its area.
"""

import torch
from lesson import Split, cifar10, linear, mean, quality, save, trained
from matplotlib.figure import Figure
from torch import Generator, Tensor

from patchsight_train.data import Images
from patchsight_train.objective import Objective
from patchsight_train.resample import gaussian_blur
from patchsight_train.views import eval_view
from patchsight_train.vit import ViT

SEEDS = (0, 1)
ARMS = {"2 global": {"local_crops": 0}, "2 global + 2 local": {"local_crops": 2}}
COMMON = {
    "stem": "conv", "prototypes": 1024, "head_hidden": 256, "bottleneck": 64, "batch_size": 64, "lr": 2e-4,
    "epochs": 12, "warmup_epochs": 1, "teacher_momentum": 0.99, "final_weight_decay": 0.1,
}  # fmt: skip
GRID, HALF = 8, 4  # patches a side, and those of the pasted picture


@torch.no_grad()
def patch_probe(objective: Objective, split: Split) -> float:
    """Accuracy of a linear probe on single patch tokens: two random ones of each picture."""
    chosen = {}
    for name, images in (("train", split.train), ("test", split.test)):
        tokens = torch.cat([objective.kept(eval_view(part)) for part in images.pixels.split(512)])[:, 1:]
        index = torch.randint(GRID**2, (len(tokens), 2), generator=Generator().manual_seed(0))
        rows = tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1])).flatten(0, 1)
        assert images.labels is not None
        chosen[name] = (rows, images.labels.repeat_interleave(2))
    (gallery, labels), (queries, truth) = chosen["train"], chosen["test"]
    pairs = Split(Images(split.train.pixels, labels), Images(split.test.pixels, truth))
    return linear(gallery, queries, pairs)


def pasted(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Each picture at half its size somewhere on the next one, blurred: uint8 `(N, 3, 32, 32)`, and the patches it
    covers, bool `(N, 64)`."""
    rng = Generator().manual_seed(2)
    small = torch.nn.functional.interpolate(pixels.float(), scale_factor=0.5, mode="bilinear", antialias=True)
    canvas = gaussian_blur(pixels.roll(1, 0).float(), torch.full((len(pixels),), 4.0))
    canvas = torch.nn.functional.avg_pool2d(canvas, 9, 1, 4, count_include_pad=False)
    covered = torch.zeros(len(pixels), GRID, GRID, dtype=torch.bool)
    places = torch.randint(GRID - HALF + 1, (len(pixels), 2), generator=rng).tolist()
    for i, (top, left) in enumerate(places):
        canvas[i, :, 4 * top : 4 * top + 16, 4 * left : 4 * left + 16] = small[i]
        covered[i, top : top + HALF, left : left + HALF] = True
    return canvas.round().to(torch.uint8), covered.flatten(1)


@torch.no_grad()
def attention_of(objective: Objective, pixels: Tensor) -> Tensor:
    """From CLS to the patches, mean over heads, `(N, 64)`; rows sum to 1."""
    assert isinstance(objective.kept, ViT)
    weights = objective.kept.with_attention(eval_view(pixels))[1].mean(dim=1)[:, 0, 1:]
    return weights / weights.sum(dim=1, keepdim=True)


def main() -> None:
    split = cifar10(4096)
    composed, covered = pasted(split.test.pixels[:1000])
    results: dict[str, dict[str, dict[str, float]]] = {}
    maps = {}
    for arm, changes in ARMS.items():
        results[arm] = {}
        for seed in SEEDS:
            objective, _ = trained(split.train, "dino", seed=seed, **{**COMMON, **changes})
            attention = attention_of(objective, composed)
            results[arm][f"seed {seed}"] = {
                **quality(objective, split),
                "patch probe": patch_probe(objective, split),
                "attention on the pasted picture": (attention * covered).sum(dim=1).mean().item(),
            }
            maps.setdefault(arm, attention[:6])
    area = HALF**2 / GRID**2
    kept = {"images": 4096, "epochs": COMMON["epochs"], "area": area, "arms": results}
    save("local_crops", draw(composed, maps, results, area), kept)


def draw(
    composed: Tensor, maps: dict[str, Tensor], results: dict[str, dict[str, dict[str, float]]], area: float
) -> Figure:
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.1, 1))
    grid = left.subplots(3, 6)
    for column in range(6):
        grid[0, column].imshow(composed[column].permute(1, 2, 0).numpy())
        for row, attention in enumerate(maps.values(), start=1):
            grid[row, column].imshow(attention[column].view(GRID, GRID).numpy(), cmap="magma")
    for row, name in enumerate(["picture", *maps]):
        grid[row, 0].set_title(name, fontsize=9, loc="left")
    for axes in grid.flat:
        axes.axis("off")
    names = ("patch probe", "attention on the pasted picture", "knn")
    for axes, name in zip(right.subplots(1, 3), names, strict=True):
        for i, runs in enumerate(results.values()):
            found = [run[name] for run in runs.values()]
            axes.bar(i, mean(found), color=("tab:orange", "tab:blue")[i])
            axes.plot([i] * len(found), found, "k.", markersize=5)
        axes.set_xticks(range(len(results)), [arm.replace(" + ", "\n+ ") for arm in results], fontsize=8)
        axes.set_title({"knn": "20-NN"}.get(name, name.replace(" on ", "\non ")), fontsize=9)
        if name.startswith("attention"):
            axes.axhline(area, color="gray", linestyle=":")
    return figure


if __name__ == "__main__":
    main()
