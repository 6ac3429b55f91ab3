"""Three ways to learn without labels, one small ViT, one data set, equal time: MAE, SimCLR, DINO on CIFAR-10.

    python benchmarks/three_ways.py            # two seeds, about three hours of one CPU core
    python benchmarks/three_ways.py --seeds 1

Each is trained by its recipe `train/recipes/three_ways-*.toml`, a dozen minutes of one core, and then judged: 20-NN
and linear heads (`patchsight-eval`, 20,000 training images against all test images), and fine-tuning
(`patchsight-finetune`) with 100, 1,000 and 10,000 labels, of all blocks and, with 1,000, of the last ones alone; beside
it the same network from random weights. Everything is done by the commands as a user would; what is finished is not
done again. Writes `benchmarks/results/three_ways.json`, `docs/images/three_ways.png` and the table of docs/encoders.md.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.figure import Figure
from measure import DATA, ROOT, publish, save

RUNS = ROOT / "runs" / "three_ways"
OBJECTIVES = {"mae": "MAE", "simclr": "SimCLR", "dino": "DINO"}
POOL = 10_000  # labelled images that shares of labels are taken of
EPOCHS = {0.01: 60, 0.1: 20, 1.0: 4}  # by share of labels: few labels are seen more often
PARTS = (0, 0.5, 1, 2)  # last blocks that are fine-tuned; all of them besides
TRAIN, TEST = DATA / "cifar10" / "train.parquet", DATA / "cifar10" / "test.parquet"


def spent(arguments: list[str], module: str) -> float:
    """Run a command on one core; the CPU minutes that it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", module, *arguments], check=True, cwd=ROOT, env=env)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / 60


def pretrained(objective: str, seed: int) -> tuple[Path, float]:
    """The run folder, and the CPU minutes that it took when it was made."""
    run = RUNS / f"{objective}-{seed}"
    kept = run.with_suffix(".json")
    if not kept.is_file():
        arguments = [objective, "--config", f"train/recipes/three_ways-{objective}.toml", "--data", str(TRAIN)]
        arguments += ["--run", str(run), "--seed", str(seed), "--knn-every", "0", "--threads", "1"]
        kept.parent.mkdir(parents=True, exist_ok=True)
        minutes = spent(arguments, "patchsight_train")
        kept.write_text(json.dumps({"cpu_minutes": minutes}) + "\n")
    return run, json.loads(kept.read_text())["cpu_minutes"]


def judged(run: Path) -> dict[str, float]:
    """Frozen: 20-NN of the recommended embedding, and the best linear head."""
    out = run.with_name(f"{run.name}-eval")
    if not (out / "result.json").is_file():
        arguments = ["--source", str(run), "--train", str(TRAIN), "--test", str(TEST), "--limit-train", "20000"]
        spent([*arguments, "--out", str(out), "--threads", "1"], "patchsight_train.judge")
    (found,) = json.loads((out / "result.json").read_text())["encoders"]
    return {"knn": found["knn"][found["recommended"]]["accuracy"]["20"], "linear": found["linear"]["best"]["test"]}


def finetuned(run: Path, seed: int, labels: float, blocks: float | str = "all", scratch: bool = False) -> float:
    """Top-1 on all test images."""
    out = run.with_name(f"{'scratch-' + str(seed) if scratch else run.name}-{labels:g}-{blocks}")
    if not (out / "result.json").is_file():
        arguments = ["--init", str(run), "--data", str(TRAIN), "--test", str(TEST), "--run", str(out)]
        arguments += ["--limit", str(POOL), "--labels", str(labels), "--blocks", str(blocks), "--seed", str(seed)]
        arguments += ["--epochs", str(EPOCHS[labels]), "--batch-size", "50", "--threads", "1", "--val-every", "0"]
        arguments += ["--warmup-epochs", str(EPOCHS[labels] / 10)]
        spent([*arguments, *["--scratch"] * scratch], "patchsight_train.finetune")
    return float(json.loads((out / "result.json").read_text())["top1"])


def arms(seed: int) -> dict[str, dict[str, Any]]:
    """Everything about one seed."""
    found: dict[str, dict[str, Any]] = {}
    runs = {objective: pretrained(objective, seed) for objective in OBJECTIVES}
    for objective, (run, minutes) in runs.items():
        found[objective] = {"cpu_minutes": minutes, **judged(run)}
    for labels in EPOCHS:
        for objective, (run, _) in runs.items():
            found[objective][f"{labels:g}"] = finetuned(run, seed, labels)
        found.setdefault("scratch", {})[f"{labels:g}"] = finetuned(runs["mae"][0], seed, labels, scratch=True)
    for objective, (run, _) in runs.items():
        for blocks in PARTS:
            found[objective][f"last {blocks:g}"] = finetuned(run, seed, 0.1, blocks)
    return found


def table(seeds: list[dict[str, dict[str, Any]]]) -> str:
    heads = ["CPU minutes", "20-NN", "linear", *(f"{share * POOL:,.0f} labels" for share in EPOCHS)]
    lines = ["| top-1, % | " + " | ".join(heads) + " |", "| --- |" + " --- |" * len(heads)]
    for arm, name in (OBJECTIVES | {"scratch": "from scratch, with the labels alone"}).items():
        cells = []
        for key in ("cpu_minutes", "knn", "linear", *(f"{share:g}" for share in EPOCHS)):
            values = [seed[arm][key] for seed in seeds if key in seed[arm]]
            factor = 1 if key == "cpu_minutes" else 100
            cells.append(" / ".join(f"{factor * value:.1f}" for value in values) or "–")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(seeds: list[dict[str, dict[str, Any]]]) -> Figure:
    """Left: by the number of labels. Right: by how many blocks are fine-tuned."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    shares, parts = [f"{share:g}" for share in EPOCHS], [*(f"last {blocks:g}" for blocks in PARTS), "0.1"]
    for rank, (arm, name) in enumerate((OBJECTIVES | {"scratch": "from scratch"}).items()):
        color = "gray" if arm == "scratch" else f"C{rank}"
        for axes, keys, x in ((left, shares, [share * POOL for share in EPOCHS]), (right, parts, range(len(parts)))):
            if keys[0] not in seeds[0][arm]:
                continue
            for seed in seeds:
                axes.plot(x, [100 * seed[arm][key] for key in keys], "o", color=color, markersize=3)
            means = [100 * mean(seed[arm][key] for seed in seeds) for key in keys]
            axes.plot(x, means, color=color, label=name)
    right.axhline(
        100 * mean(seed["scratch"]["0.1"] for seed in seeds), color="gray", linestyle=":", label="from scratch, all"
    )
    left.set(xscale="log", xlabel="labelled images", ylabel="top-1, %", title="all blocks fine-tuned")
    right.set(xlabel="blocks that are fine-tuned", title=f"{0.1 * POOL:,.0f} labels")
    right.set_xticks(range(len(parts)), ["0: linear", "½: last MLP", "1", "2", "all"])
    for axes in (left, right):
        axes.legend(frameon=False, fontsize=8)
        axes.title.set_fontsize(10)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    seeds = [arms(seed) for seed in range(parser.parse_args().seeds)]
    save("three_ways", {"pool": POOL, "epochs": {f"{k:g}": v for k, v in EPOCHS.items()}, "seeds": seeds})
    plot(seeds).savefig(ROOT / "docs" / "images" / "three_ways.png", dpi=110)
    print(table(seeds))
    publish("three_ways", table(seeds))


if __name__ == "__main__":
    main()
