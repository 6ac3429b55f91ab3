import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from patchsight_serve.errors import InvalidRequest
from patchsight_train import checkpoint
from patchsight_train.loop import Trainer

Make = Callable[..., Trainer]
Advance = Callable[[Trainer, int], list[dict[str, float]]]


def save(trainer: Trainer) -> None:
    checkpoint.save(trainer.run, trainer.step, trainer.objective, trainer.updater.optimizer)


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    """Everything that is trained, by name: parameters, buffers, and the optimizer's moments and step counts."""
    names = {p: n for n, p in trainer.objective.named_parameters()}
    moments = {f"{names[p]} {k}": v for p, state in trainer.updater.optimizer.state.items() for k, v in state.items()}
    return dict(trainer.objective.state_dict()) | moments


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("objective", ["mae", "simclr", "dino"])
def test_round_trip_is_bit_equal(objective: str, trainer: Make, random_pixels: Tensor, advance: Advance) -> None:
    first = trainer(objective, random_pixels)
    advance(first, 3)
    save(first)
    second = trainer(objective, random_pixels)
    assert second.step == 3
    assert same(state_of(first), state_of(second))
    assert any(name.endswith("exp_avg_sq") for name in state_of(second))
    assert not same(state_of(first), state_of(trainer(objective, random_pixels, run="other")))


def test_files_hold_everything_by_name(trainer: Make, random_pixels: Tensor, advance: Advance) -> None:
    learner = trainer("simclr", random_pixels)
    advance(learner, 2)
    save(learner)
    folder = learner.run / "checkpoints" / "2"
    assert sorted(p.name for p in folder.iterdir()) == ["model.safetensors", "optimizer.safetensors", "state.json"]
    assert json.loads((folder / "state.json").read_text()) == {"step": 2}
    model = load_file(folder / "model.safetensors")
    assert same(model, dict(learner.objective.state_dict()))
    moments = load_file(folder / "optimizer.safetensors")
    trained = {n for n, p in learner.objective.named_parameters() if p.requires_grad}
    assert moments.keys() == {f"{name}|{key}" for name in trained for key in ("step", "exp_avg", "exp_avg_sq")}


def test_two_are_kept(trainer: Make, random_pixels: Tensor, advance: Advance) -> None:
    learner = trainer("mae", random_pixels, epochs=10)
    for _ in range(11):
        advance(learner, 1)
        save(learner)
    assert checkpoint.complete(learner.run) == [10, 11]  # by number: "9" comes after "11" by name
    assert sorted(p.name for p in (learner.run / "checkpoints").iterdir()) == ["10", "11"]
    assert checkpoint.load(learner.run).step == 11
    assert checkpoint.load(learner.run, 10).step == 10
    with pytest.raises(InvalidRequest, match=r"no checkpoint of step 3; there are \[10, 11\]"):
        checkpoint.load(learner.run, 3)


def test_a_partial_one_does_not_count(trainer: Make, random_pixels: Tensor, advance: Advance) -> None:
    learner = trainer("mae", random_pixels)
    advance(learner, 1)
    save(learner)
    left_over = learner.run / "checkpoints" / ".partial"
    left_over.mkdir()
    (left_over / "model.safetensors").write_bytes(b"half")
    assert checkpoint.load(learner.run).step == 1
    advance(learner, 1)
    save(learner)
    assert sorted(p.name for p in (learner.run / "checkpoints").iterdir()) == ["1", "2"]
    assert trainer("mae", random_pixels).step == 2


@pytest.mark.parametrize("broken", ["save_file", "sync"])
def test_a_failing_save_leaves_the_last_one(
    broken: str, trainer: Make, random_pixels: Tensor, advance: Advance, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = trainer("mae", random_pixels)
    advance(learner, 1)
    save(learner)

    def disk_full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    advance(learner, 1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, broken, disk_full)
        with pytest.raises(OSError, match="No space"):
            save(learner)
    assert checkpoint.load(learner.run).step == 1
    save(learner)
    assert checkpoint.load(learner.run).step == 2


def test_a_complete_one_is_never_touched_again(trainer: Make, random_pixels: Tensor, advance: Advance) -> None:
    learner = trainer("mae", random_pixels)
    advance(learner, 1)
    save(learner)
    files = {p: p.stat().st_ino for p in (learner.run / "checkpoints" / "1").iterdir()}
    save(learner)
    assert files == {p: p.stat().st_ino for p in (learner.run / "checkpoints" / "1").iterdir()}


def test_none_at_all_is_an_error(tmp_path: Path) -> None:
    assert checkpoint.complete(tmp_path) == []
    with pytest.raises(InvalidRequest, match=r"no checkpoint; there are \[\]"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"width": 32}, r"encoder\.blocks\.0\.attn\.proj\.bias is \(16,\) instead of \(32,\)"),
        ({"depth": 2}, r"12 differences: encoder\.blocks\.1\.\S+ is missing"),
        (
            {"registers": 2},
            r"encoder\.pos_embed is \(1, 17, 16\) instead of \(1, 19, 16\); encoder\.reg_token is missing",
        ),
        ({"patch_size": 8}, r"encoder\.patch_embed\.proj\.weight is \(16, 3, 4, 4\) instead of \(16, 3, 8, 8\)"),
    ],
)
def test_another_architecture_is_refused_and_named(
    change: dict[str, int], named: str, trainer: Make, random_pixels: Tensor, advance: Advance
) -> None:
    learner = trainer("simclr", random_pixels)
    advance(learner, 1)
    save(learner)
    with pytest.raises(InvalidRequest, match=named) as caught:
        trainer("simclr", random_pixels, **change)
    assert "choose another --run, or the settings in" in caught.value.message


def test_another_objective_is_refused(trainer: Make, random_pixels: Tensor, advance: Advance) -> None:
    learner = trainer("simclr", random_pixels)
    advance(learner, 1)
    save(learner)
    with pytest.raises(InvalidRequest, match="30 differences: decoder_blocks"):
        trainer("mae", random_pixels)
