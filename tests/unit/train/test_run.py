import json
import math
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from patchsight_serve.errors import InvalidRequest
from patchsight_train import run as run_module
from patchsight_train.objective_settings import SETTINGS
from patchsight_train.run import Metrics, commit, config_of, open_run, read_config
from patchsight_train.settings import TrainSettings


@pytest.fixture
def config(settings: Callable[..., TrainSettings]) -> Callable[..., dict[str, Any]]:
    return lambda **changes: config_of(settings("simclr", **changes))


def test_config_repeats_the_run(tmp_path: Path, settings: Callable[..., TrainSettings]) -> None:
    chosen = settings("simclr", dataset='a "quoted" name, ÄÖ\n', crop_scale=(0.2, 1.0), final_lr=1e-6, run=tmp_path)
    open_run(tmp_path, config_of(chosen))
    found = read_config(tmp_path)
    assert found["objective"] == "simclr"
    assert {"commit", "patchsight", "torch"} < found.keys()
    fields = {k: v for k, v in found.items() if k in SETTINGS["simclr"].model_fields}
    assert SETTINGS["simclr"](**fields, run=tmp_path) == chosen


def test_config_is_written_once(tmp_path: Path, config: Callable[..., dict[str, Any]]) -> None:
    open_run(tmp_path / "new" / "run", config())
    path = tmp_path / "new" / "run" / "config.toml"
    before = path.read_bytes()
    open_run(path.parent, config(data=["moved"], checkpoint_every=7, threads=3, device="auto"))
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["config.toml"]


def test_changed_settings_are_refused_and_named(tmp_path: Path, config: Callable[..., dict[str, Any]]) -> None:
    open_run(tmp_path, config(temperature=0.2))
    with pytest.raises(InvalidRequest, match=r"\(lr was 0.001, is now 0.5, temperature was 0.2, is now 0.3\)"):
        open_run(tmp_path, config(temperature=0.3, lr=0.5))
    with pytest.raises(InvalidRequest, match=r"limit was None, is now 10\); choose another --run"):
        open_run(tmp_path, config(limit=10))


def test_another_objective_is_refused(tmp_path: Path, settings: Callable[..., TrainSettings]) -> None:
    open_run(tmp_path, config_of(settings("simclr")))
    with pytest.raises(InvalidRequest, match=r"\(objective was 'simclr', is now 'mae', "):
        open_run(tmp_path, config_of(settings("mae")))


def test_a_folder_that_is_no_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="not a run folder, config.toml is missing"):
        read_config(tmp_path)
    (tmp_path / "config.toml").write_text("a = \n")
    with pytest.raises(InvalidRequest, match=r"config\.toml: Invalid value"):
        read_config(tmp_path)


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_metrics_are_cut_to_the_checkpoint_and_go_on(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, 0)
    for step in range(1, 6):
        metrics.write(step, loss=1 / step)
    metrics.sync()
    metrics.close()
    again = Metrics(tmp_path, 3)
    again.write(4, loss=0.5)
    again.close()
    assert lines(tmp_path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}, {"step": 3, "loss": 1 / 3},
                               {"step": 4, "loss": 0.5}]  # fmt: skip
    Metrics(tmp_path, 0).close()
    assert lines(tmp_path) == []


@pytest.mark.parametrize("half", ['{"step": 3, "lo', '{"step": 3, "loss": 1.0}', "{"])
def test_half_a_line_at_the_end_is_dropped(tmp_path: Path, half: str) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n' + half)
    metrics = Metrics(tmp_path, 2)
    metrics.write(3, loss=1.5)
    metrics.close()
    assert [line["loss"] for line in lines(tmp_path)] == [3.0, 2.0, 1.5]


def test_each_line_can_be_followed_while_training(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, 0)
    metrics.write(1, loss=0.1)
    assert lines(tmp_path) == [{"step": 1, "loss": 0.1}]
    metrics.close()


@pytest.mark.parametrize("x", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_null_on_disk_and_not_a_number_when_read(tmp_path: Path, x: float) -> None:
    metrics = Metrics(tmp_path, 0)
    metrics.write(1, loss=x, warning="the loss is not finite")
    assert json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail) == {
        "step": 1, "loss": None, "warning": "the loss is not finite",
    }  # fmt: skip
    [row] = metrics.lines()
    metrics.close()
    assert math.isnan(row["loss"])


def test_commit_is_that_of_our_own_tree_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel in an environment inside of somebody else's repository must not claim that repository's commit."""

    def git(*arguments: str) -> str:
        options = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.run(
            ["git", *options, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout

    installed = tmp_path / "site-packages" / "run.py"
    installed.parent.mkdir()
    installed.write_text("1")
    (tmp_path / "theirs").write_text("1")
    monkeypatch.setattr(run_module, "__file__", str(installed))
    git("init", "-q")
    git("add", "theirs")
    git("commit", "-qm", "theirs")
    assert commit() == "unknown"
    git("add", "-f", "site-packages/run.py")
    git("commit", "-qm", "ours")
    head = git("rev-parse", "HEAD")[:12]
    assert commit() == head
    installed.write_text("2")
    assert commit() == f"{head}+changes"
