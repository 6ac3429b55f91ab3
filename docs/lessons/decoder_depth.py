"""Why a deep decoder helps a linear probe and not fine-tuning (MAE, arXiv:2111.06377, Table 1a).

The paper's reason: the last layers of an autoencoder are specialized for pixels. A decoder that is too shallow leaves
that work to the encoder's last blocks, where the probe looks; a deeper one takes it over. Fine-tuning does not care: it
turns those blocks to the new task. So beside both accuracies, where along the blocks is the class? A linear probe sees
the mean patch token after every block of the encoder, then of the decoder, which here gets the tokens of the whole
picture: nothing is hidden, and no mask token takes part.
"""

import torch
import torch.nn.functional as F
from fine_tuning import fine_tuned
from lesson import SMALL, Split, cifar10, linear, mean, quality, save, settings, trained
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from patchsight_train.build import build
from patchsight_train.data import Images
from patchsight_train.encoder import pool
from patchsight_train.mae import MAE
from patchsight_train.objective import Objective
from patchsight_train.views import eval_view

SEEDS = (0, 1)
DEPTHS = (1, 2, 4, 8, 12)
IMAGES, TEST = 8192, 5000
COMMON = {"decoder_width": 64, "decoder_heads": 2, "epochs": 8, "lr": 1.5e-3}
LABELLED, EPOCHS = 4096, 8  # of the fine-tuning
ALONG = 4096  # labelled images of the probes along the blocks
UNTRAINED = "untrained"
# ViT-L/16 on ImageNet, 800 epochs, a decoder of width 512, the pixels not normalized: in percent.
PAPER = {"linear": (65.5, 70.0, 71.9, 73.5, 73.3), "fine-tuned": (84.8, 84.9, 84.9, 84.9, 84.4)}

Found = dict[str, dict[str, dict[str, float]]]  # by decoder depth, by seed, by measure
Along = dict[str, dict[str, list[float]]]  # by decoder depth, by seed: after each block


@torch.no_grad()
def along(mae: MAE, pixels: Tensor) -> list[Tensor]:
    """Mean patch tokens `(N, D)`: of the patch embedding, after each block of the encoder, after each of the decoder.

    Each token is layer-normalized first, as whatever comes next would do: for the encoder's last block that is its
    embedding, but for the norm's own scale and shift. Before its first block the decoder only projects that, token by
    token, and adds positions, so that is no place of its own.
    """
    parts = []
    for chunk in torch.split(pixels, 512):
        x = mae.encoder.embed(eval_view(chunk))
        states = [x]
        for block in mae.encoder.blocks:
            x = block(x)
            states.append(x)
        x = mae.decoder_embed(mae.encoder.norm(x)) + mae.decoder_pos_embed
        for block in mae.decoder_blocks:
            x = block(x)
            states.append(x)
        normed = [F.layer_norm(state, state.shape[-1:], eps=1e-6) for state in states]
        parts.append([pool(state, mae.encoder.config.prefix_tokens, "mean") for state in normed])
    return [torch.cat(place) for place in zip(*parts, strict=True)]


def probes_along(objective: Objective, split: Split) -> list[float]:
    """Accuracy of a linear probe at each place of `along`."""
    assert isinstance(objective, MAE)
    assert split.train.labels is not None
    few = Split(Images(split.train.pixels[:ALONG], split.train.labels[:ALONG]), split.test)
    places = zip(along(objective, few.train.pixels), along(objective, few.test.pixels), strict=True)
    return [round(linear(gallery, queries, few), 4) for gallery, queries in places]


def place(index: int, encoder_depth: int) -> str:
    """The name of an index of `along`."""
    if index == 0:
        return "patch embedding"
    return f"encoder {index}" if index <= encoder_depth else f"decoder {index - encoder_depth}"


def mean_along(runs: dict[str, list[float]]) -> list[float]:
    return [mean(values) for values in zip(*runs.values(), strict=True)]


def draw_depths(axes: Axes, found: Found, name: str) -> Axes:
    """Ours on the left axis, the paper's on the right one, which is returned: a point is as high on both."""
    for seed in SEEDS:
        axes.plot(DEPTHS, [100 * found[str(d)][f"seed {seed}"][name] for d in DEPTHS], "o", ms=4, label=f"seed {seed}")
    means = [100 * mean(run[name] for run in found[str(d)].values()) for d in DEPTHS]
    axes.plot(DEPTHS, means, "k-", label="mean of seeds")
    scratch = 100 * mean(run[name] for run in found[UNTRAINED].values())
    axes.axhline(scratch, color="gray", linestyle=":", label="without pre-training")
    axes.set(xlabel="blocks of the decoder", ylabel="accuracy, %, ours: width 64, CIFAR-10", xticks=DEPTHS)
    axes.set_title({"linear": "(a) linear probe", "fine-tuned": "(b) fine-tuning"}[name], fontsize=10)
    paper = axes.twinx()
    assert isinstance(paper, Axes)
    paper.plot(DEPTHS, PAPER[name], "s--", color="tab:red", ms=4, alpha=0.7, label="paper (right axis)")
    paper.set_ylabel("accuracy, %, paper: ViT-L, ImageNet", color="tab:red")
    paper.tick_params(axis="y", colors="tab:red")
    limits = [each.get_ylim() for each in (axes, paper)]
    half = max(high - low for low, high in limits) / 2
    for each, (low, high) in zip((axes, paper), limits, strict=True):
        each.set_ylim((low + high) / 2 - half, (low + high) / 2 + half)
    return paper


def draw_along(axes: Axes, measured: Along, encoder_depth: int) -> None:
    """One line per decoder depth, mean of the seeds."""
    for i, depth in enumerate(DEPTHS):
        values = [100 * v for v in mean_along(measured[str(depth)])]
        shade = colormaps["viridis"](0.9 * i / (len(DEPTHS) - 1))
        axes.plot(range(len(values)), values, "o-", ms=3, color=shade, label=f"decoder of {depth}")
    untrained = [100 * v for v in mean_along(measured[UNTRAINED])]
    axes.plot(range(len(untrained)), untrained, ":", color="gray", label=f"{UNTRAINED}, of {max(DEPTHS)}")
    axes.axvline(encoder_depth + 0.5, color="black", linewidth=0.8)
    axes.text(encoder_depth + 0.4, 0.02, "encoder", transform=axes.get_xaxis_transform(), ha="right", fontsize=8)
    axes.text(encoder_depth + 0.6, 0.02, "decoder", transform=axes.get_xaxis_transform(), ha="left", fontsize=8)
    ticks = [0, *range(1, encoder_depth + 1), *(encoder_depth + d for d in DEPTHS)]
    names = ["patches", *(str(i) for i in range(1, encoder_depth + 1)), *(str(d) for d in DEPTHS)]
    axes.set_xticks(ticks, names)
    axes.set(xlabel="after block", ylabel="accuracy, %")
    axes.set_title("(c) linear probe of the mean patch token along the blocks", fontsize=10)
    axes.legend(frameon=False, fontsize=7)


def main() -> None:
    split = cifar10(IMAGES, TEST)
    found: Found = {}
    measured: Along = {}
    encoder_depth = int(SMALL["depth"])
    for depth in (*DEPTHS, None):
        name = UNTRAINED if depth is None else str(depth)
        found[name], measured[name] = {}, {}
        for seed in SEEDS:
            result: dict[str, float] = {}
            if depth is None:
                torch.manual_seed(seed)
                objective = build(settings("mae", **COMMON, decoder_depth=max(DEPTHS))).eval()
            else:
                objective, log = trained(split.train, "mae", decoder_depth=depth, seed=seed, **COMMON)
                last = log[-len(log) // int(COMMON["epochs"]) :]
                result["loss"] = mean(step["loss"] for step in last)  # of the last epoch
            result |= quality(objective, split)
            measured[name][f"seed {seed}"] = probes_along(objective, split)
            print(name, seed, result, measured[name][f"seed {seed}"], flush=True)
            result["fine-tuned"] = fine_tuned(objective.kept, split, seed, LABELLED, EPOCHS)
            print(name, seed, "fine-tuned", result["fine-tuned"], flush=True)
            found[name][f"seed {seed}"] = result
    peaks = {}
    for name, runs in measured.items():
        means = mean_along(runs)
        peaks[name] = place(means.index(max(means)), encoder_depth)
    figure = Figure(figsize=(10, 7), layout="constrained")
    axes = figure.subplot_mosaic([["linear", "fine-tuned"], ["along", "along"]])
    for measure in PAPER:
        paper = draw_depths(axes[measure], found, measure)
    ours, theirs = (each.get_legend_handles_labels() for each in (axes["linear"], paper))
    figure.legend(ours[0] + theirs[0], ours[1] + theirs[1], loc="outside upper center", ncol=5, frameon=False)
    draw_along(axes["along"], measured, encoder_depth)
    save("decoder_depth", figure, {
        "images": IMAGES, "epochs": COMMON["epochs"], "test": TEST, "labels": LABELLED, "fine_tuning_epochs": EPOCHS,
        "labels_along": ALONG, "depths": found, "along": measured, "peaks": peaks, "paper": {"depths": DEPTHS, **PAPER},
    })  # fmt: skip


if __name__ == "__main__":
    main()
