"""`torchrun` on two CPU ranks against one process: the same run."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

TINY = [
    "--image-size=16", "--patch-size=4", "--width=16", "--depth=1", "--heads=2", "--batch-size=4", "--device=cpu",
    "--precision=fp32", "--threads=1", "--knn-every=3", "--checkpoint-every=3", "--warmup-epochs=1", "--lr=1e-3",
]  # fmt: skip
OWN = {
    "simclr": ["--projection-hidden=32", "--projection-width=16", "--stem=conv"],
    "dino": ["--prototypes=32", "--head-hidden=32", "--bottleneck=16", "--local-crops=2"],
}


def train(objective: str, data: Path, run: Path, epochs: int, ranks: int) -> list[dict[str, float]]:
    """By the command; the metrics of all steps."""
    # Without the --, torchrun takes --run for one of its own options.
    how = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m", "--"]
    line = [
        sys.executable,
        *(how if ranks > 1 else ["-m"]),
        "patchsight_train",
        objective,
        f"--data={data}",
        f"--run={run}",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*line, f"--epochs={epochs}", *TINY, *OWN[objective]],
        capture_output=True,
        text=True,
        env=environment,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return metrics(run)


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def pictures(draw_pictures: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def alone(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`alone("dino")`: the folder of a finished run on one rank."""

    @cache
    def alone(objective: str) -> Path:
        run = tmp_path_factory.mktemp(objective) / "alone"
        train(objective, pictures, run, 3, 1)
        return run

    return alone


@pytest.mark.parametrize("objective", ["simclr", "dino"])
def test_two_ranks_train_as_one(objective: str, alone: Callable[[str], Path], pictures: Path, tmp_path: Path) -> None:
    together = train(objective, pictures, tmp_path / "together", 3, 2)
    assert_alike(together, metrics(alone(objective)))
    assert "knn" in together[-1]


def test_a_run_goes_on_with_another_number_of_ranks(
    alone: Callable[[str], Path], pictures: Path, tmp_path: Path
) -> None:
    run = tmp_path / "crossed"
    shutil.copytree(alone("simclr"), run)
    newest = max((run / "checkpoints").iterdir(), key=lambda folder: int(folder.name))
    assert int(newest.name) == 9
    shutil.rmtree(newest)  # as if killed before it
    assert_alike(train("simclr", pictures, run, 3, 2), metrics(alone("simclr")))
    saved = [load_file(folder / "checkpoints" / newest.name / "model.safetensors") for folder in (run, alone("simclr"))]
    assert not all(torch.equal(saved[0][name], saved[1][name]) for name in saved[1])  # other sums: it was trained anew


def assert_alike(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    assert [line["step"] for line in found] == [line["step"] for line in expected] == list(range(1, 10))
    for a, b in zip(found, expected, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=1e-3)
