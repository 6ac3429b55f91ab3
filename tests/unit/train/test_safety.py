"""Real failures in mid-run, of memory, disk, data, numbers and patience: the run ends with what to do, and goes on from
its checkpoint as if nothing had been."""

import json
import math
import os
import resource
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from patchsight_train import checkpoint
from patchsight_train.__main__ import main
from patchsight_train.loop import Trainer
from patchsight_train.objective import When
from patchsight_train.objective_settings import SETTINGS
from patchsight_train.update import Updater

Forked = Callable[[str], BaseProcess]
Make = Callable[..., Trainer]

STEPS = 24  # of 12 images in batches of 4, 8 epochs
TINY = [
    "--image-size=16", "--stored-size=20", "--patch-size=4", "--width=16", "--depth=1", "--heads=2", "--stem=patch",
    "--batch-size=4", "--epochs=8", "--lr=0.001", "--warmup-epochs=2", "--device=cpu", "--precision=fp32",
    "--threads=1", "--checkpoint-every=5", "--knn-every=0",
]  # fmt: skip
MAE = ["mae", *TINY, "--decoder-width=16", "--decoder-depth=1", "--decoder-heads=2"]


@pytest.fixture
def whole(picture_folder: Path, tmp_path: Path) -> Path:
    """A run that nothing happened to."""
    main([*MAE, f"--data={picture_folder}", f"--run={tmp_path / 'whole'}"])
    return tmp_path / "whole"


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What `patchsight-train` says on stderr when it ends with status 1."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 1
    return capsys.readouterr().err


def assert_same_outcome(run: Path, other: Path) -> None:
    """Weights, optimizer and metrics to the last bit; the speed aside."""
    assert files_of(run) == files_of(other)
    assert metrics_of(run) == metrics_of(other)


def files_of(run: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (run / "checkpoints" / str(STEPS)).iterdir()}


def metrics_of(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_s"} for line in lines]


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], object]], None]:
    """`at_step(7, action)`: just before the update of step 7, counted from 0."""

    def at_step(step: int, action: Callable[[], object]) -> None:
        update = Updater.update

        def acting(self: Updater, images: Tensor, now: int) -> dict[str, float]:
            if now == step:
                action()
            return update(self, images, now)

        monkeypatch.setattr(Updater, "update", acting)

    return at_step


def largest_file(size: int) -> None:
    """From now on the system refuses this process to write further into any file. Python ignores the signal of it."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.mark.parametrize("refused", ["metrics.jsonl", "model.safetensors", "optimizer.safetensors"])
def test_a_disk_that_is_full_ends_the_run_and_once_there_is_room_nothing_was_lost(
    refused: str, whole: Path, picture_folder: Path, tmp_path: Path, at_step: Callable[..., None],
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    run = tmp_path / "part"
    arguments = [*MAE, f"--data={picture_folder}", f"--run={run}"]
    if refused == "metrics.jsonl":
        limit = (whole / refused).stat().st_size * 13 // STEPS
    else:
        limit = (whole / "checkpoints" / str(STEPS) / refused).stat().st_size - 1
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        at_step(11, lambda: largest_file(limit))
        said = fails(arguments, capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert f"cannot write {run}" in said
    assert "File too large. Once it can be written again, the same command goes on." in said
    assert f"The newest checkpoint is {run / 'checkpoints' / '10'}" in said
    assert "Traceback" not in said
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["10", "5"]
    monkeypatch.undo()
    main(arguments)
    assert_same_outcome(run, whole)


def test_a_run_folder_that_cannot_be_made_is_named(
    picture_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    run = tmp_path / "file" / "run"
    said = fails([*MAE, f"--data={picture_folder}", f"--run={run}"], capsys)
    assert f"cannot write {run}: Not a directory" in said


def test_no_memory_names_the_knob_which_then_helps(picture_folder: Path, tmp_path: Path, forked: Forked) -> None:
    """A limit on the address space of a real training process: a step on 12 pictures does not fit, on one it does."""
    run = tmp_path / "run"
    arguments = [
        "simclr", f"--data={picture_folder}", f"--run={run}", "--image-size=64", "--stored-size=64", "--patch-size=4",
        "--width=96", "--depth=8", "--heads=3", "--stem=patch", "--batch-size=12", "--epochs=2", "--device=cpu",
        "--precision=fp32", "--threads=1", "--knn-every=0",
    ]  # fmt: skip
    code = f"""
import resource
from pathlib import Path
from patchsight_train.__main__ import main
from patchsight_train.update import Updater

def limited(self, images, step, update=Updater.update):
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 150 * 2**20, -1))
    return update(self, images, step)

Updater.update = limited
main({arguments!r} + EXTRA)
"""
    process = forked(code.replace("EXTRA", "[]"))
    process.join(120)
    said = (tmp_path / "output").read_text()
    assert process.exitcode == 1, said
    assert "out of memory in a step at micro_batch 12: give the same command with --micro-batch 6" in said
    assert "There is no checkpoint yet" in said
    assert "Traceback" not in said
    process = forked(code.replace("EXTRA", "['--micro-batch=1', '--recompute']"))
    process.join(120)
    assert process.exitcode == 0, (tmp_path / "output").read_text()
    assert checkpoint.complete(run)[-1] == 2


def test_data_that_vanishes_ends_the_run_with_a_checkpoint_and_comes_back(
    whole: Path, picture_folder: Path, tmp_path: Path, at_step: Callable[..., None],
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    run, gone = tmp_path / "part", tmp_path / "unmounted"
    arguments = [*MAE, f"--data={picture_folder}", f"--run={run}", "--no-resident"]
    at_step(7, lambda: picture_folder.rename(gone))
    said = fails(arguments, capsys)
    assert f"{picture_folder}: 8 images in a row cannot be read" in said
    last = checkpoint.complete(run)[-1]
    assert 8 <= last < STEPS
    assert last == metrics_of(run)[-1]["step"]
    assert f"The newest checkpoint is {run / 'checkpoints' / str(last)}" in said
    gone.rename(picture_folder)
    monkeypatch.undo()
    main(arguments)
    assert_same_outcome(run, whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop_it_finishes_the_step_and_writes_a_checkpoint(
    number: signal.Signals, whole: Path, picture_folder: Path, tmp_path: Path, forked: Forked
) -> None:
    """From outside, at whatever moment; schedulers send SIGTERM."""
    run = tmp_path / "part"
    arguments = [*MAE, f"--data={picture_folder}", f"--run={run}"]
    process = forked(f"from patchsight_train.__main__ import main\nmain({arguments!r})\n")
    while not checkpoint.complete(run) and process.is_alive():
        time.sleep(0.001)
    os.kill(process.pid or 0, number)
    process.join(60)
    assert process.exitcode == 130
    stopped = checkpoint.complete(run)[-1]
    assert 5 <= stopped == metrics_of(run)[-1]["step"] < STEPS
    assert f"stopped at step {stopped}; the same command goes on from there" in (tmp_path / "output").read_text()
    main(arguments)
    assert_same_outcome(run, whole)


OBJECTIVES = [name for name, settings in SETTINGS.items() if "teacher" not in settings.model_fields]


@pytest.mark.parametrize("backbone", ["vit-tiny", "resnet18"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_step_that_is_not_finite_leaves_no_trace(
    objective: str, backbone: str, trainer: Make, random_pixels: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parameters, the optimizer's state, and buffers: the statistics of batch norm, DINO's center."""
    if backbone == "resnet18":
        if objective in ("mae", "skip_autoencoder"):
            return  # they have no ResNet
        changes: dict[str, Any] = {"backbone": backbone, "width": None, "depth": None, "heads": None}
    else:
        changes = {}
    learner = trainer(objective, random_pixels, warmup_epochs=0, **changes)
    batches = learner.images.batches(learner.orders(), learner.device)
    updater = learner.updater
    assert "skipped" not in updater.update(next(batches), 0)
    before, images = state(updater), next(batches)
    with monkeypatch.context() as patch:
        views = updater.objective.views
        patch.setattr(updater.objective, "views", lambda *a: poisoned(views(*a)))
        assert updater.update(images, 1)["skipped"] == 1
    assert_equal(state(updater), before)
    assert "skipped" not in updater.update(images, 1)
    after = state(updater)
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert {name.split("|")[-1] for name in changed} >= {"exp_avg", "exp_avg_sq", "step"}
    if backbone == "resnet18":
        assert any(name.endswith("running_mean") for name in changed)
    if objective == "dino":
        assert "center" in changed


def poisoned(views: list[Tensor]) -> list[Tensor]:
    return [v.index_fill(0, torch.tensor([0]), math.inf) if v.ndim == 4 else v for v in views]


def state(updater: Updater) -> dict[str, Tensor]:
    names = {p: name for name, p in updater.objective.named_parameters()}
    found = {name: value.clone() for name, value in updater.objective.state_dict().items()}
    for parameter, values in updater.optimizer.state.items():
        found |= {f"{names[parameter]}|{key}": value.clone() for key, value in values.items()}
    return found


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def test_a_run_that_is_not_finite_any_more_ends_with_good_weights(
    picture_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    backward = Updater.backward

    def diverging(self: Updater, views: list[Tensor], when: When) -> dict[str, Tensor]:
        return backward(self, views if when.progress < 0.2 else poisoned(views), when)

    monkeypatch.setattr(Updater, "backward", diverging)
    run = tmp_path / "run"
    said = fails([*MAE, f"--data={picture_folder}", f"--run={run}", "--epochs=30"], capsys)
    assert "50 steps in a row had a loss or a gradient that is not finite" in said
    assert "--lr 0.00025 (now 0.001), --clip-grad 1 (now 3)" in said
    done = metrics_of(run)
    assert [line["step"] for line in done if "skipped" in line] == list(range(19, 69))
    saved = checkpoint.load(run)
    assert 60 <= saved.step <= 69
    assert f"The newest checkpoint is {run / 'checkpoints' / str(saved.step)}" in said
    assert all(torch.isfinite(value).all() for value in {**saved.model, **saved.optimizer}.values())


def test_a_run_can_be_told_to_stop_at_a_sign_of_collapse(
    picture_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    arguments = [
        "simclr", *TINY, "--projection-hidden=32", "--projection-width=16", f"--data={picture_folder}", f"--run={run}",
        "--temperature=1000", "--epochs=40", "--lr=0.0001",
    ]  # fmt: skip
    said = fails([*arguments, "--on-collapse=stop"], capsys)
    assert "The loss is no better than chance, ln (2 · 4 − 1) = 1.946" in said
    assert "--temperature 0.2 (now 1000)" in said
    (line,) = [line for line in metrics_of(run) if "warning" in line]
    assert line["step"] == checkpoint.complete(run)[-1] == 3 + 45  # half of the warm-up, nine tenths of the patience
    main([*arguments, "--on-collapse=warn"])  # it was seen: whoever wants to goes on
    assert checkpoint.complete(run)[-1] == 120
    assert sum("warning" in line for line in metrics_of(run)) == 1
