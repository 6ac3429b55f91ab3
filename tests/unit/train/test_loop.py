import json
import math
import multiprocessing
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from patchsight_serve.errors import InvalidRequest
from patchsight_train import checkpoint
from patchsight_train.__main__ import main
from patchsight_train.data import Images
from patchsight_train.loop import Trainer, adamw, pick_device, pick_precision
from patchsight_train.probe import Probe

Make = Callable[..., Trainer]


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """All but the speed, which no two runs share."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_s"} for line in lines]


def files_of(run: Path, step: int) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (run / "checkpoints" / str(step)).iterdir()}


def test_every_epoch_visits_every_image_in_its_own_order(trainer: Make) -> None:
    pixels = torch.arange(16, dtype=torch.uint8).view(16, 1, 1, 1).expand(-1, 3, 16, 16)
    learner = trainer("mae", pixels, batch_size=4)
    assert (learner.steps_per_epoch, learner.total_steps) == (4, 12)
    orders = []
    for _ in range(3):
        seen: list[int] = []
        for _ in range(4):
            seen += learner.batch()[:, 0, 0, 0].tolist()
            learner.step += 1
        assert sorted(seen) == list(range(16))
        orders.append(tuple(seen))
    assert len(set(orders)) == 3
    other = trainer("mae", pixels, run="other", batch_size=4, seed=1)
    assert tuple(other.batch()[:, 0, 0, 0].tolist()) != orders[0][:4]


def test_fewer_images_than_a_batch_are_one_step(trainer: Make, random_pixels: Tensor) -> None:
    learner = trainer("simclr", random_pixels[:3], batch_size=8)
    assert learner.total_steps == 3
    assert learner.batch().shape == (3, 3, 16, 16)


def test_rates_follow_their_schedules(trainer: Make, random_pixels: Tensor) -> None:
    learner = trainer(
        "mae", random_pixels, epochs=10, warmup_epochs=1.5, lr=0.3, final_lr=0.1, weight_decay=0.2,
        final_weight_decay=0.6,
    )  # fmt: skip
    assert learner.steps_per_epoch == 2
    seen = []
    for learner.step in (0, 2, 3, 20):
        learner.set_rates()
        decays, plain = learner.optimizer.param_groups
        assert decays["lr"] == plain["lr"]
        assert plain["weight_decay"] == 0
        seen.append((decays["lr"], decays["weight_decay"]))
    assert [lr for lr, _ in seen] == pytest.approx([0.1, 0.3, 0.3, 0.1])
    assert [decay for _, decay in seen] == pytest.approx(
        [0.6 - 0.4 * (1 + math.cos(math.pi * step / 20)) / 2 for step in (0, 2, 3, 20)]
    )


@pytest.mark.parametrize("objective", ["mae", "simclr", "dino"])
def test_matrices_decay_and_nothing_else_does(
    objective: str, trainer: Make, random_pixels: Tensor, settings: Callable[..., Any]
) -> None:
    module = trainer(objective, random_pixels, registers=2).objective
    decays, plain = adamw(module, settings(objective)).param_groups
    names = {p: n for n, p in module.named_parameters()}
    assert all(p.requires_grad for group in (decays, plain) for p in group["params"])
    together = [names[p] for group in (decays, plain) for p in group["params"]]
    assert sorted(together) == sorted(n for n, p in module.named_parameters() if p.requires_grad)
    assert all(names[p].endswith(("weight", "original1")) and p.ndim >= 2 for p in decays["params"])
    assert not any(p.ndim >= 2 and names[p].endswith("weight") for p in plain["params"])
    if objective != "mae":  # whose positions are fixed
        assert any(names[p].endswith("pos_embed") for p in plain["params"])


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
    learner.update(learner.batch())
    before = {k: v.clone() for k, v in learner.objective.state_dict().items()}
    with monkeypatch.context() as patch:
        views = learner.objective.views
        patch.setattr(
            learner.objective, "views", lambda *a: [v.index_fill(0, torch.tensor(0), poison) for v in views(*a)]
        )
        values = learner.update(learner.batch())
    assert values["skipped"] == 1
    assert all(torch.equal(before[k], v) for k, v in learner.objective.state_dict().items())
    assert "skipped" not in learner.update(learner.batch())
    assert not all(torch.equal(before[k], v) for k, v in learner.objective.state_dict().items())


def test_gradients_are_clipped(trainer: Make, random_pixels: Tensor) -> None:
    learner = trainer("mae", random_pixels, clip_grad=0.01)
    values = learner.update(learner.batch())
    clipped = torch.stack([p.grad.norm() for p in learner.objective.parameters() if p.grad is not None]).norm()
    assert values["gradient_norm"] > 0.1
    assert clipped.item() == pytest.approx(0.01, rel=1e-3)


def test_neighbors_are_judged_when_due(trainer: Make, random_pixels: Tensor) -> None:
    learner = trainer("simclr", random_pixels, epochs=5, knn_every=2)
    learner.probe = Probe(Images(random_pixels, torch.arange(20) % 2), Images(random_pixels[:4], torch.arange(4) % 2))
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

    def interrupted(progress: float) -> None:
        if trainer.step + 1 == step:
            signal.raise_signal(signal.SIGINT)
        after_update(progress)

    trainer.objective.after_update = interrupted  # type: ignore[method-assign]


def test_a_second_ctrl_c_ends_at_once(trainer: Make, random_pixels: Tensor) -> None:
    learner = trainer("mae", random_pixels)

    def impatient(_: float) -> None:
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


def kill_and_resume(kills: int, epochs: int, pictures: Path, tmp_path: Path, seed: int) -> None:
    """Train in a process that is killed so many times, at any moment after a further checkpoint; then compare with a
    run in this process that never stopped."""
    arguments = [
        "dino", f"--data={pictures}", f"--epochs={epochs}", "--image-size=16", "--width=16", "--depth=1", "--heads=2",
        "--batch-size=4", "--prototypes=32", "--head-hidden=32", "--bottleneck=16", "--warmup-epochs=2", "--device=cpu",
        "--precision=fp32", "--threads=1", "--knn-every=3", "--checkpoint-every=2",
    ]  # fmt: skip
    steps = epochs * 3
    main([*arguments, f"--run={tmp_path / 'whole'}"])
    run = tmp_path / "killed"
    # Each process is forked from one that has imported torch, which takes longer than the training.
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["patchsight_train.__main__", "patchsight_train.loop", "torch._dynamo"])
    rng = random.Random(seed)
    for kill in range(kills):
        target = (kill + 1) * (steps - 20) // kills
        process = processes.Process(target=main, args=([*arguments, f"--run={run}"],))
        process.start()
        while process.is_alive() and max(checkpoint.complete(run), default=0) < target:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert 0 < max(checkpoint.complete(run)) < steps
    main([*arguments, f"--run={run}"])
    assert metrics_of(run) == metrics_of(tmp_path / "whole")
    assert sum("knn" in line for line in metrics_of(run)) == epochs // 3
    assert files_of(run, steps) == files_of(tmp_path / "whole", steps)


def test_killed_and_resumed_equals_never_stopped(picture_folder: Path, tmp_path: Path) -> None:
    kill_and_resume(3, 21, picture_folder, tmp_path, seed=1)


@pytest.mark.acceptance
@pytest.mark.timeout(1800)
def test_killed_fifty_times_and_resumed_equals_never_stopped(picture_folder: Path, tmp_path: Path) -> None:
    kill_and_resume(50, 300, picture_folder, tmp_path, seed=2)


def test_a_gpu_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto").type == "cpu"
    with pytest.raises(InvalidRequest, match="--device cuda: torch finds no GPU"):
        pick_device("cuda")


def test_precision_is_as_asked_and_never_fp16() -> None:
    cpu = torch.device("cpu")
    assert pick_precision("fp32", cpu) == torch.float32
    assert pick_precision("bf16", cpu) == torch.bfloat16
    assert pick_precision("auto", cpu) in (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("objective", ["mae", "simclr", "dino"])
def test_bf16_trains_float32_parameters(objective: str, trainer: Make, random_pixels: Tensor) -> None:
    learner = trainer(objective, random_pixels, precision="bf16")
    values = learner.update(learner.batch())
    assert math.isfinite(values["loss"])
    assert all(p.dtype == torch.float32 for p in learner.objective.parameters())
    full = trainer(objective, random_pixels, run="fp32")
    assert values["loss"] == pytest.approx(full.update(full.batch())["loss"], rel=0.05)
