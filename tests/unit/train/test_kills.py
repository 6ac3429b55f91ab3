"""`kill -9` at any moment: what it costs is the steps since the last checkpoint, and nothing in the outcome."""

import json
import random
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from patchsight_train import checkpoint
from patchsight_train.__main__ import main

EVERY = 3  # steps between checkpoints
COMMON = [
    "--image-size=16", "--patch-size=4", "--width=16", "--depth=1", "--heads=2", "--stem=patch", "--batch-size=4",
    "--stored-size=20", "--lr=0.001", "--warmup-epochs=2", "--device=cpu", "--precision=fp32", "--threads=1",
    f"--checkpoint-every={EVERY}",
]  # fmt: skip
CROPS = ["--prototypes=32", "--local-crops=2", "--local-size=8"]
OWN = {
    "mae": ["--decoder-width=16", "--decoder-depth=1", "--decoder-heads=2"],
    "simclr": ["--projection-hidden=32", "--projection-width=16", "--micro-batch=3"],
    "dino": [*CROPS, "--head-hidden=32", "--bottleneck=16", "--teacher-momentum=0.99", "--freeze-last-layer-epochs=1"],
    "swav": [*CROPS, "--projection-hidden=32", "--projection-width=16"],
}

Forked = Callable[[str], BaseProcess]


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """All but the speed, which no two runs share."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_s"} for line in lines]


def files_of(run: Path, step: int) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (run / "checkpoints" / str(step)).iterdir()}


def steps_done(run: Path) -> int:
    """Those that are in the metrics; a kill may leave half a line."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)


def newest(run: Path) -> int:
    return max(checkpoint.complete(run), default=0)


def wait_for(condition: Callable[[], bool], process: BaseProcess) -> None:
    while process.is_alive() and not condition():
        time.sleep(0.0005)


def kill(process: BaseProcess, run: Path, moment: int, rng: random.Random) -> None:
    """While it writes a checkpoint; at any moment after a further one; or while it starts, or soon after."""
    before = newest(run)
    match moment % 3:
        case 0:
            wait_for(lambda: newest(run) > before, process)
            wait_for((run / "checkpoints" / ".partial").exists, process)
        case 1:
            wait_for(lambda: newest(run) > before, process)
            time.sleep(rng.uniform(0, 0.05))
        case _:
            time.sleep(rng.uniform(0, 0.3))
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def kill_and_resume(objective: str, kills: int, epochs: int, pictures: Path, tmp_path: Path, forked: Forked) -> None:
    """Train in processes that are killed so many times; then compare with a run in this process that never stopped."""
    arguments = [
        objective, f"--data={pictures}", f"--epochs={epochs}", f"--knn-every={epochs // 2}", *COMMON, *OWN[objective],
    ]  # fmt: skip
    steps = epochs * 3
    main([*arguments, f"--run={tmp_path / 'whole'}"])
    run, rng = tmp_path / "killed", random.Random(kills)
    partial = 0
    for moment in range(kills):
        process = forked(f"from patchsight_train.__main__ import main\nmain({[*arguments, f'--run={run}']!r})\n")
        kill(process, run, moment, rng)
        partial += (run / "checkpoints" / ".partial").exists()
        assert steps_done(run) - newest(run) <= EVERY
    assert partial, "no kill met a checkpoint that was being written"
    assert 0 < newest(run) < steps
    main([*arguments, f"--run={run}"])
    assert metrics_of(run) == metrics_of(tmp_path / "whole")
    assert sum("knn" in line for line in metrics_of(run)) == 2
    assert files_of(run, steps) == files_of(tmp_path / "whole", steps)


@pytest.mark.parametrize(("objective", "kills"), [("mae", 2), ("simclr", 2), ("dino", 3), ("swav", 3)])
def test_killed_ten_times_in_all_equals_never_killed(
    objective: str, kills: int, picture_folder: Path, tmp_path: Path, forked: Forked
) -> None:
    kill_and_resume(objective, kills, 16, picture_folder, tmp_path, forked)


@pytest.mark.acceptance
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("objective", "kills"), [("mae", 12), ("simclr", 12), ("dino", 13), ("swav", 13)])
def test_killed_fifty_times_in_all_equals_never_killed(
    objective: str, kills: int, picture_folder: Path, tmp_path: Path, forked: Forked
) -> None:
    kill_and_resume(objective, kills, 90, picture_folder, tmp_path, forked)
