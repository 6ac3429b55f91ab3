import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from patchsight_train import checkpoint
from patchsight_train.data import Images
from patchsight_train.evaluation import Evaluation
from patchsight_train.loop import Trainer
from patchsight_train.objective import When
from patchsight_train.probe import Probe

Make = Callable[..., Trainer]


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """All but the speed, which no two runs share."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_s"} for line in lines]


def files_of(run: Path, step: int) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (run / "checkpoints" / str(step)).iterdir()}


def test_every_epoch_visits_every_image_in_its_own_order(trainer: Make) -> None:
    pixels = torch.zeros(16, 3, 16, 16, dtype=torch.uint8)
    learner = trainer("mae", pixels, batch_size=4)
    assert (learner.steps_per_epoch, learner.total_steps) == (4, 12)
    orders = torch.stack(list(learner.orders())).view(3, 16)
    assert torch.equal(orders.sort(dim=1).values, torch.arange(16).expand(3, -1))
    assert len(orders.unique(dim=0)) == 3
    learner.step = 5  # as after a resume
    assert torch.equal(torch.stack(list(learner.orders())).flatten(), orders.flatten()[20:])
    other = trainer("mae", pixels, run="other", batch_size=4, seed=1)
    assert not torch.equal(next(other.orders()), orders[0, :4])


def test_fewer_images_than_a_batch_are_one_step(trainer: Make, random_pixels: Tensor) -> None:
    learner = trainer("simclr", random_pixels[:3], batch_size=8)
    assert learner.total_steps == 3
    assert len(next(learner.orders())) == 3


def test_neighbors_are_judged_when_due(trainer: Make, random_pixels: Tensor) -> None:
    learner = trainer("simclr", random_pixels, epochs=5, knn_every=2)
    probe = Probe(Images(random_pixels, torch.arange(20) % 2), Images(random_pixels[:4], torch.arange(4) % 2))
    learner.evaluation = Evaluation(Images(random_pixels, None), probe, learner.run)
    learner.train()
    judged = [line["step"] for line in metrics_of(learner.run) if "knn" in line]
    assert judged == [4, 8, 10]  # two steps an epoch: after epochs 2 and 4, and at the end
    assert all(0 <= line["knn"] <= 1 for line in metrics_of(learner.run) if "knn" in line)


@pytest.mark.parametrize("objective", ["mae", "simclr", "dino"])
def test_stopped_and_resumed_equals_never_stopped(objective: str, trainer: Make, random_pixels: Tensor) -> None:
    """Ctrl-C in the midst of an update, at three places; it is finished first."""
    whole = trainer(objective, random_pixels, run="whole", epochs=5)
    handler = signal.getsignal(signal.SIGINT)
    whole.train()
    for stop in (1, 4, 7, None):
        part = trainer(objective, random_pixels, run="part", epochs=5)
        if stop is None:
            part.train()
            break
        interrupt_during(part, stop)
        with pytest.raises(KeyboardInterrupt):
            part.train()
        assert checkpoint.complete(part.run)[-1] == stop
    assert metrics_of(whole.run) == metrics_of(part.run)
    assert files_of(whole.run, 10) == files_of(part.run, 10)
    assert signal.getsignal(signal.SIGINT) is handler


def interrupt_during(trainer: Trainer, step: int) -> None:
    after_update = trainer.objective.after_update

    def interrupted(when: When) -> None:
        if trainer.step + 1 == step:
            signal.raise_signal(signal.SIGINT)
        after_update(when)

    trainer.objective.after_update = interrupted  # type: ignore[method-assign]


def test_a_second_ctrl_c_ends_at_once(trainer: Make, random_pixels: Tensor) -> None:
    learner = trainer("mae", random_pixels)

    def impatient(_: When) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    learner.objective.after_update = impatient  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        learner.train()
    assert checkpoint.complete(learner.run) == []


def test_a_finished_run_does_nothing_more(trainer: Make, random_pixels: Tensor) -> None:
    trainer("mae", random_pixels).train()
    again = trainer("mae", random_pixels)
    before = files_of(again.run, again.total_steps), metrics_of(again.run)
    again.train()
    assert (files_of(again.run, again.total_steps), metrics_of(again.run)) == before
