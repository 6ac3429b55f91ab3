"""`torchrun` on two CPU ranks against one process: the same run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TINY = [
    "--image-size=16", "--patch-size=4", "--width=16", "--depth=1", "--heads=2", "--batch-size=4", "--device=cpu",
    "--precision=fp32", "--threads=1", "--knn-every=3", "--checkpoint-every=3", "--warmup-epochs=1", "--lr=1e-3",
]  # fmt: skip
OWN = {
    "simclr": ["--projection-hidden=32", "--projection-width=16", "--stem=conv"],
    "dino": ["--prototypes=32", "--head-hidden=32", "--bottleneck=16", "--local-crops=2"],
}


def train(objective: str, pictures: Path, run: Path, epochs: int, ranks: int) -> list[dict[str, float]]:
    """By the command; the metrics of all steps."""
    # Without the --, torchrun takes --run for one of its own options.
    how = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m", "--"]
    line = [
        sys.executable,
        *(how if ranks > 1 else ["-m"]),
        "patchsight_train",
        objective,
        f"--data={pictures}",
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
    return [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("objective", ["simclr", "dino"])
def test_two_ranks_train_as_one(objective: str, picture_folder: Path, tmp_path: Path) -> None:
    alone = train(objective, picture_folder, tmp_path / "alone", 3, 1)
    together = train(objective, picture_folder, tmp_path / "together", 3, 2)
    assert [line["step"] for line in together] == [line["step"] for line in alone] == list(range(1, 10))
    for a, b in zip(alone, together, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
        assert b["gradient_norm"] == pytest.approx(a["gradient_norm"], rel=1e-3)
    assert "knn" in together[-1]
