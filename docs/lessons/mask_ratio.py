"""Images are not words: how much to hide (arXiv:2111.06377, Figure 5).

A language model hides 15 % of the words. A quarter of a picture's patches is filled in from the neighbors; only with
most of them gone does the encoder have to know what it looks at. The probe is linear, on the mean of the patch
tokens; fine-tuning trains everything on the labels, and is compared with the same from random weights.
"""

import torch
from fine_tuning import fine_tuned
from lesson import cifar10, mean, quality, save, settings, trained
from matplotlib.figure import Figure

from patchsight_train.build import build

SEEDS = (0, 1)
RATIOS = (0.25, 0.5, 0.75, 0.9)
COMMON = {"decoder_width": 64, "decoder_depth": 2, "decoder_heads": 2, "epochs": 8, "lr": 1.5e-3}
LABELLED, EPOCHS = 4096, 4  # of the fine-tuning


def main() -> None:
    split = cifar10(8192)
    results: dict[str, dict[str, dict[str, float]]] = {}
    for ratio in RATIOS:
        results[str(ratio)] = {}
        for seed in SEEDS:
            objective, _ = trained(split.train, "mae", mask_ratio=ratio, seed=seed, **COMMON)
            tuned = fine_tuned(objective.kept, split, seed, LABELLED, EPOCHS)
            found = {**quality(objective, split), "fine-tuned": tuned}
            results[str(ratio)][f"seed {seed}"] = found
    results["from scratch"] = {}
    for seed in SEEDS:
        torch.manual_seed(seed)
        fresh = build(settings("mae", **COMMON)).eval()
        tuned = fine_tuned(fresh.kept, split, seed, LABELLED, EPOCHS)
        found = {**quality(fresh, split), "fine-tuned": tuned}
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
