"""Memory of a DINO step against the number of local crops: in parts, as it trains, and in one graph.

    python benchmarks/multi_crop.py        # about 3 minutes

ViT-Tiny, two global views of 96 px and n local ones of 48 px, batch 32; each measured in a process of its own, as its
peak resident memory less what it held before the first step. Writes `benchmarks/results/multi_crop.json`.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import publish, save
from torch import Tensor

from patchsight_train.build import build
from patchsight_train.objective import Metrics, When
from patchsight_train.objective_settings import SETTINGS
from patchsight_train.update import Updater

COUNTS = (2, 4, 6, 8, 10)
STEPS = 3


def one_graph(updater: Updater, views: list[Tensor], when: When) -> Metrics:
    """What parts are there to avoid: all crops' activations are held until one backward at the end."""
    parts, metrics = zip(*updater.forward(views, when), strict=True)
    torch.stack(parts).sum().backward()  # type: ignore[no-untyped-call]
    return {"loss": torch.stack([values["loss"] for values in metrics]).sum()}


def resident() -> float:
    """MiB held now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def step_memory(local_crops: int, chunked: bool) -> float:
    """MiB that steps need beyond weights and program."""
    values: dict[str, Any] = {"image_size": 96, "patch_size": 8, "batch_size": 32, "prototypes": 1024, "device": "cpu"}
    settings = SETTINGS["dino"](data=["noise"], local_crops=local_crops, **values)  # type: ignore[call-arg]
    torch.manual_seed(0)
    updater = Updater(build(settings), settings, torch.device("cpu"), torch.float32, STEPS, STEPS)
    if not chunked:
        updater.backward = partial(one_graph, updater)  # type: ignore[method-assign]
    images = torch.randint(0, 256, (32, 3, 96, 96), dtype=torch.uint8)
    before = resident()
    for step in range(STEPS):
        updater.update(images, step)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before


def main() -> None:
    found: dict[str, dict[int, float]] = {"in parts": {}, "one graph": {}}
    for count in COUNTS:
        for arm in found:
            line = [
                sys.executable,
                __file__,
                "--local-crops",
                str(count),
                *(["--chunked"] if arm == "in parts" else []),
            ]
            # A freed tensor goes back to the system at once, so that the peak is what was needed at one time.
            environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
            done = subprocess.run(line, capture_output=True, text=True, check=True, env=environment)
            found[arm][count] = float(done.stdout)
            print(count, arm, round(found[arm][count]), flush=True)
    growth = {arm: values[COUNTS[-1]] / values[COUNTS[0]] - 1 for arm, values in found.items()}
    save("multi_crop", {"MiB": found, "growth from 2 to 10": growth})
    lines = [
        "| local crops | " + " | ".join(map(str, COUNTS)) + " | growth |",
        "| --- |" + " --- |" * (len(COUNTS) + 1),
    ]
    for arm, values in found.items():
        lines.append(f"| {arm}, MiB | " + " | ".join(f"{v:.0f}" for v in values.values()) + f" | {growth[arm]:+.0%} |")
    publish("multi_crop", "\n".join(lines))
    print(json.dumps(growth))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--local-crops", type=int)
    parser.add_argument("--chunked", action="store_true")
    given = parser.parse_args()
    if given.local_crops:
        print(step_memory(given.local_crops, given.chunked))
    else:
        main()
