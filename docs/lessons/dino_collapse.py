"""Centering and sharpening: each alone collapses, both together do not (arXiv:2104.14294, section 5.3 and Figure 7).

Without centering one prototype wins on every image: the teacher's entropy goes to 0. Without sharpening (the teacher
as soft as the student) every prototype gets the same: its entropy goes to ln K. Either way teacher and student agree
without having looked at the picture: their divergence goes to 0.
"""

import math

from lesson import cifar10, mean, quality, save, trained
from matplotlib.figure import Figure

SEEDS = (0, 1)
K = 1024
ARMS = {
    "both": {},
    "no centering": {"center_momentum": 1.0},
    "no sharpening": {"teacher_temperature": 0.1, "warmup_teacher_temperature": 0.1},
}
COMMON = {
    "prototypes": K, "head_hidden": 256, "bottleneck": 64, "batch_size": 64, "lr": 5e-4, "teacher_momentum": 0.99,
    "epochs": 6, "warmup_epochs": 1, "local_crops": 2,
}  # fmt: skip


def main() -> None:
    split = cifar10(2048)
    results: dict[str, dict[str, dict[str, float]]] = {}
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    entropy, divergence = figure.subplots(1, 2)
    for color, (arm, changes) in zip(("tab:blue", "tab:orange", "tab:red"), ARMS.items(), strict=True):
        results[arm] = {}
        for seed in SEEDS:
            objective, log = trained(split.train, "dino", seed=seed, **{**COMMON, **changes})
            label = arm if seed == SEEDS[0] else None
            entropy.plot([line["teacher_entropy"] for line in log], color=color, label=label, linewidth=1)
            # Cross-entropy is entropy plus divergence, KL(teacher ‖ student).
            kl = [line["loss"] - line["teacher_entropy"] for line in log]
            divergence.plot(kl, color=color, label=label, linewidth=1)
            results[arm][f"seed {seed}"] = {
                "entropy at the end": mean(line["teacher_entropy"] for line in log[-20:]),
                "entropy of the mean": mean(line["teacher_mean_entropy"] for line in log[-20:]),
                "divergence at the end": mean(kl[-20:]),
                **quality(objective, split),
            }
    entropy.axhline(math.log(K), color="gray", linestyle=":", linewidth=1)
    entropy.annotate("ln K: uniform", (0, math.log(K)), xytext=(0, -11), textcoords="offset points", fontsize=8)
    entropy.set(xlabel="step", ylabel="entropy of the teacher's targets", ylim=(-0.2, None))
    divergence.set(xlabel="step", ylabel="KL(teacher ‖ student)", ylim=(-0.05, None))
    divergence.legend(frameon=False)
    save("dino_collapse", figure, {"images": 2048, "epochs": COMMON["epochs"], "ln K": math.log(K), "arms": results})


if __name__ == "__main__":
    main()
