"""One step of the optimizer, for every objective."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from patchsight_train.loop import Trainer

Make = Callable[..., Trainer]


def step(learner: Trainer) -> dict[str, float]:
    """One update on the next batch."""
    values = learner.updater.update(next(learner.images.batches(learner.orders(), learner.device)), learner.step)
    learner.step += 1
    return values


@pytest.mark.parametrize("objective", ["mae", "dino"])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_step_that_is_not_finite_moves_nothing(
    objective: str, poison: float, trainer: Make, random_pixels: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = (
        trainer(objective, random_pixels, freeze_last_layer_epochs=0)
        if objective == "dino"
        else trainer(objective, random_pixels)
    )
    step(learner)
    before = {k: v.clone() for k, v in learner.objective.state_dict().items()}
    with monkeypatch.context() as patch:
        views = learner.objective.views
        patch.setattr(
            learner.objective, "views", lambda *a: [v.index_fill(0, torch.tensor(0), poison) for v in views(*a)]
        )
        values = step(learner)
    assert values["skipped"] == 1
    assert all(torch.equal(before[k], v) for k, v in learner.objective.state_dict().items())
    assert "skipped" not in step(learner)
    assert not all(torch.equal(before[k], v) for k, v in learner.objective.state_dict().items())


def test_gradients_are_clipped(trainer: Make, random_pixels: Tensor) -> None:
    learner = trainer("mae", random_pixels, clip_grad=0.01)
    values = step(learner)
    clipped = torch.stack([p.grad.norm() for p in learner.objective.parameters() if p.grad is not None]).norm()
    assert values["gradient_norm"] > 0.1
    assert clipped.item() == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("objective", ["mae", "simclr", "dino"])
def test_bf16_trains_float32_parameters(objective: str, trainer: Make, random_pixels: Tensor) -> None:
    learner = trainer(objective, random_pixels, precision="bf16")
    values = step(learner)
    assert math.isfinite(values["loss"])
    assert all(p.dtype == torch.float32 for p in learner.objective.parameters())
    full = trainer(objective, random_pixels, run="fp32")
    assert values["loss"] == pytest.approx(step(full)["loss"], rel=0.05)


@pytest.mark.parametrize("objective", ["autoencoder", "mae", "simclr", "dino", "swav"])
def test_memory_savers_change_no_number(objective: str, trainer: Make, random_pixels: Tensor) -> None:
    plain = trainer(objective, random_pixels, run="plain")
    saving = trainer(objective, random_pixels, run="saving", micro_batch=3, recompute=True)
    for _ in range(3):
        a, b = step(plain), step(saving)
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=1e-3)
