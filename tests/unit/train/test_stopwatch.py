import json
import time
from pathlib import Path

import pytest

from patchsight_train.stopwatch import Stopwatch


def test_time_adds_up_over_starts_and_a_step_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = {"wall": 100.0, "cpu": 10.0}
    monkeypatch.setattr(time, "monotonic", lambda: now["wall"])
    monkeypatch.setattr(time, "process_time", lambda: now["cpu"])
    first = Stopwatch(tmp_path)
    for step in (5, 10):
        now["wall"] += 60
        now["cpu"] += 30
        first.write(step)
    now.update(wall=7.0, cpu=0.0)  # another process
    second = Stopwatch(tmp_path)
    now["wall"] += 5
    second.write(10)
    assert json.loads((tmp_path / "time.json").read_text()) == {"step": 10, "wall_s": 120.0, "cpu_s": 60.0}
    second.write(11)
    assert (second.wall_s, second.cpu_s) == (125.0, 60.0)
