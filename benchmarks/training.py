"""Training speed and memory: patchsight, the same from lightly's parts, and the bare forward and backward.

    python benchmarks/training.py            # about 15 minutes on 2 cores; nothing else may run

Three objectives on two kinds of data, in three arms that take turns, each in a process of its own: `ours`, the
training loop as `patchsight-train` runs it; `lightly`, its transforms in as many workers as there are cores, its
losses and heads, the same backbone, batch, precision and optimizer; `bare`, our objective's forward and backward on
views made beforehand, which no training can pass. Writes `benchmarks/results/training.json` and the table in README
and docs.
"""

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import DATA, publish, save
from rich.console import Console

from patchsight_serve.dataset import read_dataset
from patchsight_train.build import build
from patchsight_train.data import load_images
from patchsight_train.device import pick_device, pick_precision
from patchsight_train.loop import Trainer
from patchsight_train.objective import When
from patchsight_train.objective_settings import SETTINGS
from patchsight_train.randomness import Randomness
from patchsight_train.settings import TrainSettings
from patchsight_train.update import Updater

ROUNDS, SECONDS, WARM_UP = 3, 5.0, 1
ARMS = ("ours", "lightly", "bare")
SETTINGS_OF: dict[str, dict[str, Any]] = {
    "32 px": {"image_size": 32, "patch_size": 4, "width": 128, "depth": 4, "heads": 4, "batch_size": 256},
    "photos, 96 px": {
        "image_size": 96, "stored_size": 144, "patch_size": 16, "width": 192, "depth": 4, "heads": 3, "batch_size": 128,
        "color_strength": 1.0, "blur": 0.5,
    },
}  # fmt: skip
SOURCES = {
    "32 px": [("cifar10/train.parquet", 4096)],
    "photos, 96 px": [("caltech101/train.parquet", 1485), ("clothing10/train.parquet", 700)],
}
OBJECTIVES = ("mae", "simclr", "dino")


def settings_of(kind: str, objective: str, folder: Path) -> TrainSettings:
    """An endless training: it is stopped by the clock."""
    known = SETTINGS[objective].model_fields
    values = {k: v for k, v in SETTINGS_OF[kind].items() if k in known}
    return SETTINGS[objective](data=[str(folder)], epochs=10_000, checkpoint_every=10**9, knn_every=0, **values)


def write_folder(kind: str, folder: Path) -> None:
    """The encoded images as files, in one folder."""
    for source, count in SOURCES[kind]:
        dataset = read_dataset(DATA / source)
        for i in range(count):
            (folder / f"{Path(source).parent.name}-{i:05}.jpg").write_bytes(dataset.read(i))


class Clock:
    """Counts steps after the warm-up, until the time is over."""

    def __init__(self) -> None:
        self.steps, self.start = -WARM_UP, 0.0

    def tick(self) -> bool:
        """Called when a step begins; False when it is one too many."""
        if self.steps == 0:
            self.start = time.perf_counter()
        self.steps += 1
        return self.steps <= 1 or time.perf_counter() - self.start < SECONDS

    def rate(self, batch: int) -> float:
        return (self.steps - 1) * batch / (time.perf_counter() - self.start)


def ours(settings: TrainSettings, folder: Path) -> tuple[float, float]:
    """The real loop with its display, metrics and report; images/s, and what decoding once took, seconds."""
    console = Console(file=io.StringIO())
    begin = time.perf_counter()
    images = load_images([str(folder)], settings.stored_size or settings.image_size, None, console)
    decoding = time.perf_counter() - begin
    with tempfile.TemporaryDirectory() as run:
        trainer = Trainer(build(settings), images, None, settings, Path(run), console)
        clock, update = Clock(), trainer.updater.update

        def timed(batch: torch.Tensor, step: int) -> dict[str, float]:
            if not clock.tick():
                raise TimeoutError
            return update(batch, step)

        trainer.updater.update = timed  # type: ignore[method-assign, assignment]
        try:
            trainer.train()
        except TimeoutError:
            rate = clock.rate(settings.batch_size)
    return rate, decoding


def lightly(settings: TrainSettings, folder: Path) -> tuple[float, float]:
    import lightly_steps

    device = pick_device("auto")
    dtype = pick_precision("auto", device)
    with device:
        step, after, parameters = lightly_steps.build(settings, build(settings))
    trained = [p for p in parameters if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.lr, fused=True)
    clock = Clock()
    for views in lightly_steps.batches(settings, folder, os.cpu_count() or 1):
        if not clock.tick():
            break
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss = step([view.to(device, non_blocking=True) for view in views])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, settings.clip_grad)
        optimizer.step()
        after()
        loss.item()
    return clock.rate(settings.batch_size), 0.0


def bare(settings: TrainSettings, folder: Path) -> tuple[float, float]:  # noqa: ARG001
    """Forward and backward on noise."""
    device = pick_device("auto")
    updater = Updater(build(settings), settings, device, pick_precision("auto", device), 10**6, 10**3)
    size = settings.stored_size or settings.image_size
    images = torch.randint(0, 256, (settings.batch_size, 3, size, size), dtype=torch.uint8, device=device)
    views = updater.objective.views(images, Randomness(torch.Generator(device).manual_seed(0)))
    clock = Clock()
    while clock.tick():
        updater.optimizer.zero_grad()
        updater.backward(views, When(0.5, 0.5))["loss"].item()
    return clock.rate(settings.batch_size), 0.0


def memory() -> float:
    """MiB of this process and its children, pages that they share counted once."""
    me = os.getpid()
    children = Path(f"/proc/{me}/task/{me}/children").read_text().split()
    total = 0
    for process in [str(me), *children]:
        rollup = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        total += next(int(line.split()[1]) for line in rollup if line.startswith("Pss:"))
    return total / 1024


def peak_memory(children: bool) -> float:
    """MiB at the end of the measured steps; for one process alone its peak."""
    import resource

    return memory() if children else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(kind: str, objective: str, arm: str, folder: Path) -> dict[str, float]:
    """One arm in a process of its own."""
    line = [sys.executable, __file__, "--kind", kind, "--objective", objective, "--arm", arm, "--folder", str(folder)]
    done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for kind in SETTINGS_OF:
            folder = Path(temporary) / kind.replace(" ", "-")
            folder.mkdir()
            write_folder(kind, folder)
            for objective in OBJECTIVES:
                rounds = [{arm: measure(kind, objective, arm, folder) for arm in ARMS} for _ in range(ROUNDS)]
                results[f"{objective}, {kind}"] = summary(rounds)
                print(objective, kind, json.dumps(results[f"{objective}, {kind}"]), flush=True)
    save("training", {"rounds": ROUNDS, "seconds": SECONDS, "settings": SETTINGS_OF, "results": results})
    publish("training", table(results))


def summary(rounds: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Medians, and the ratios within each round."""
    found: dict[str, Any] = {}
    for arm in ARMS:
        found[arm] = {key: round(statistics.median(r[arm][key] for r in rounds), 1) for key in rounds[0][arm]}
    for name, arm in (("times lightly", "lightly"), ("share of bare", "bare")):
        ratios = sorted(r["ours"]["images_per_s"] / r[arm]["images_per_s"] for r in rounds)
        found[name] = {"median": statistics.median(ratios), "least": ratios[0], "most": ratios[-1]}
    return found


def table(results: dict[str, Any]) -> str:
    lines = [
        "| objective, data | patchsight, images/s | from lightly's parts | ratio (least to most) | "
        "of the bare forward and backward | memory, MiB: ours, lightly's |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, r in results.items():
        ratio, share = r["times lightly"], r["share of bare"]
        lines.append(
            f"| {name} | {r['ours']['images_per_s']:.0f} | {r['lightly']['images_per_s']:.0f} | "
            f"**{ratio['median']:.2f}×** ({ratio['least']:.2f} to {ratio['most']:.2f}) | {share['median']:.0%} | "
            f"{r['ours']['memory_mib']:.0f}, {r['lightly']['memory_mib']:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--kind")
    parser.add_argument("--objective")
    parser.add_argument("--arm")
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    if given.arm:
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002 - torchvision's workers
        chosen = settings_of(given.kind, given.objective, given.folder)
        rate, decoding = {"ours": ours, "lightly": lightly, "bare": bare}[given.arm](chosen, given.folder)
        print(
            json.dumps(
                {"images_per_s": rate, "decoding_s": decoding, "memory_mib": peak_memory(given.arm == "lightly")}
            )
        )
    else:
        main()
