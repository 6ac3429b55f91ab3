import sys
from pathlib import Path

import pytest

from patchsight_serve.errors import InvalidRequest
from patchsight_train.tensorboard_log import TensorBoardLog


def read(run: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    log = TensorBoardLog(tmp_path)
    log.write(1, {"loss": 3.5, "lr": 0.25})
    log.write(2, {"loss": 2.5, "lr": float("nan"), "knn": 0.5})
    log.close()
    assert read(tmp_path) == {
        "training/loss": [(1, 3.5), (2, 2.5)], "training/lr": [(1, 0.25)], "evaluation/knn": [(2, 0.5)],
    }  # fmt: skip


def test_a_resumed_run_replaces_the_steps_that_a_kill_undid(tmp_path: Path) -> None:
    for start, loss in ((0, 1.0), (2, 2.0)):
        log = TensorBoardLog(tmp_path, start)
        for step in range(start + 1, 5):
            log.write(step, {"loss": loss})
        log.close()
    assert read(tmp_path) == {"training/loss": [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]}


def test_the_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(InvalidRequest, match=r"pip install 'patchsight\[tensorboard\]'"):
        TensorBoardLog(tmp_path)
    assert list(tmp_path.iterdir()) == []
