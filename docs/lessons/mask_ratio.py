"""Images are not words: how much to hide (arXiv:2111.06377, Figure 5).

A language model hides 15 % of the words. A quarter of a picture's patches is filled in from the neighbors; only with
most of them gone does the encoder have to know what it looks at. The probe is linear, on the mean of the patch
tokens; fine-tuning trains everything on the labels, and is compared with the same from random weights.
"""

import copy

import torch
import torch.nn.functional as F
from lesson import Split, cifar10, mean, quality, save, settings, trained
from matplotlib.figure import Figure
from torch import Generator, nn

from patchsight_train.build import build
from patchsight_train.encoder import Encoder
from patchsight_train.randomness import Randomness
from patchsight_train.views import View, augment, eval_view

SEEDS = (0, 1)
RATIOS = (0.25, 0.5, 0.75, 0.9)
COMMON = {"decoder_width": 64, "decoder_depth": 2, "decoder_heads": 2, "epochs": 8, "lr": 1.5e-3}
LABELLED, EPOCHS = 4096, 4  # of the fine-tuning


def fine_tuned(encoder: Encoder, split: Split, seed: int) -> float:
    """Test accuracy after training all of a copy of the encoder, and a linear classifier on its mean patch token."""
    assert split.train.labels is not None
    assert split.test.labels is not None
    torch.manual_seed(seed)
    encoder, head = copy.deepcopy(encoder).train(), nn.Linear(encoder.config.width, 10)
    total, B = EPOCHS * LABELLED // 128, 128
    parameters = [p for p in [*encoder.parameters(), *head.parameters()] if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total)
    view, random = View(32, scale=(0.5, 1.0)), Randomness(Generator().manual_seed(seed))
    for step in range(total):
        if step % (LABELLED // B) == 0:
            order = torch.randperm(LABELLED, generator=random.generator)
        rows = order[step * B % LABELLED :][:B]
        x = augment(split.train.pixels[rows], view, random)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = head(encoder.pooled(x, "mean"))
        optimizer.zero_grad()
        F.cross_entropy(logits.float(), split.train.labels[rows]).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        predicted = head(encoder.eval().pooled(eval_view(split.test.pixels), "mean")).argmax(dim=1)
    return (predicted == split.test.labels).float().mean().item()


def main() -> None:
    split = cifar10(8192)
    results: dict[str, dict[str, dict[str, float]]] = {}
    for ratio in RATIOS:
        results[str(ratio)] = {}
        for seed in SEEDS:
            objective, _ = trained(split.train, "mae", mask_ratio=ratio, seed=seed, **COMMON)
            found = {**quality(objective, split), "fine-tuned": fine_tuned(objective.kept, split, seed)}
            results[str(ratio)][f"seed {seed}"] = found
    results["from scratch"] = {}
    for seed in SEEDS:
        torch.manual_seed(seed)
        fresh = build(settings("mae", **COMMON)).eval()
        found = {**quality(fresh, split), "fine-tuned": fine_tuned(fresh.kept, split, seed)}
        results["from scratch"][f"seed {seed}"] = found
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ("linear", "fine-tuned"), strict=True):
        for seed in SEEDS:
            axes.plot(RATIOS, [results[str(r)][f"seed {seed}"][name] for r in RATIOS], "o-", label=f"seed {seed}")
        scratch = mean(run[name] for run in results["from scratch"].values())
        axes.axhline(scratch, color="gray", linestyle=":", label="without pre-training")
        axes.set(xlabel="share of the patches that is hidden", ylabel="accuracy", xticks=RATIOS)
        axes.set_title({"linear": "linear probe"}.get(name, f"{name} on {LABELLED:,} labels"), fontsize=10)
    axes.legend(frameon=False)
    save("mask_ratio", figure, {"images": 8192, "epochs": COMMON["epochs"], "labels": LABELLED, "ratios": results})


if __name__ == "__main__":
    main()
