"""A frozen copy of the student in place of the moving average: what is left of DINO? (arXiv:2104.14294, section 5.2.)

A frozen teacher never gets better than the weights it was copied from: its targets are those of a random network. The
moving average of the student is ahead of the student all along, and hands its gain back as better targets.
"""

from lesson import cifar10, knn, linear, mean, quality, save, trained
from matplotlib.figure import Figure

from patchsight_train.dino import DINO
from patchsight_train.probe import embed

SEEDS = (0, 1)
# In the second arm the student is judged: its teacher stays as it was.
ARMS = {"moving average": {}, "frozen copy": {"teacher_momentum": 1.0}}
COMMON = {
    "stem": "conv", "prototypes": 1024, "head_hidden": 256, "bottleneck": 64, "batch_size": 64, "lr": 2e-4,
    "epochs": 12, "warmup_epochs": 1, "teacher_momentum": 0.99, "final_weight_decay": 0.1, "local_crops": 2,
}  # fmt: skip


def main() -> None:
    split = cifar10(4096)
    results: dict[str, dict[str, dict[str, float]]] = {}
    for arm, changes in ARMS.items():
        results[arm] = {}
        for seed in SEEDS:
            objective, log = trained(split.train, "dino", seed=seed, **{**COMMON, **changes})
            assert isinstance(objective, DINO)
            teacher = quality(objective, split)
            gallery, queries = (
                embed(objective.student, images.pixels, objective.pooling, images.pixels.device)
                for images in (split.train, split.test)
            )
            results[arm][f"seed {seed}"] = {
                "teacher knn": teacher["knn"],
                "teacher linear": teacher["linear"],
                "student knn": knn(gallery, queries, split),
                "student linear": linear(gallery, queries, split),
                "loss at the end": mean(line["loss"] for line in log[-20:]),
            }
    save("ema_teacher", draw(results), {"images": 4096, "epochs": COMMON["epochs"], "arms": results})


def draw(results: dict[str, dict[str, dict[str, float]]]) -> Figure:
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    for axes, (probe, title) in zip(figure.subplots(1, 2), (("knn", "20-NN"), ("linear", "linear probe")), strict=True):
        for i, runs in enumerate(results.values()):
            for j, network in enumerate(("student", "teacher")):
                found = [run[f"{network} {probe}"] for run in runs.values()]
                x = i + 0.35 * j
                label = network if not i else None
                axes.bar(x, mean(found), width=0.33, color=("tab:blue", "tab:gray")[j], label=label)
                axes.plot([x] * len(found), found, "k.", markersize=5)
        axes.set_xticks([i + 0.175 for i in range(len(results))], list(results))
        axes.set(title=title, ylim=(0.2, None))
        axes.legend(frameon=False, loc="lower right")
    return figure


if __name__ == "__main__":
    main()
