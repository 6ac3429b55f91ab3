import copy
import math
from collections.abc import Callable
from typing import cast

import pytest
import torch
from torch import Generator, Tensor, nn

from patchsight_train.data import Images
from patchsight_train.dino import DINO, DINOHead, cosine_to_one, dino_loss, update_center
from patchsight_train.loop import Trainer

Advance = Callable[[Trainer, int], list[dict[str, float]]]


def H(t: Tensor, s: Tensor, C: Tensor, tps: float, tpt: float) -> Tensor:  # noqa: N802 - the letter of the paper
    """As in the paper's Algorithm 1, letter by letter."""
    t = t.detach()
    s = torch.softmax(s / tps, dim=1)
    t = torch.softmax((t - C) / tpt, dim=1)
    return -(t * torch.log(s)).sum(dim=1).mean()


@pytest.fixture
def dino(trainer: Callable[..., Trainer], random_pixels: Tensor) -> DINO:
    return cast(DINO, trainer("dino", random_pixels, prototypes=24).objective)


@pytest.mark.parametrize("B", [1, 6])
@pytest.mark.parametrize("K", [3, 40])
@pytest.mark.parametrize(("tau_s", "tau_t"), [(0.1, 0.04), (0.1, 0.07), (1.0, 1.0)])
def test_loss_and_gradient_are_those_of_algorithm_1(
    B: int, K: int, tau_s: float, tau_t: float, generator: Generator
) -> None:
    s, t = torch.randn(2, B, K, generator=generator) / 4, torch.randn(2, B, K, generator=generator) / 4
    C = torch.randn(1, K, generator=generator) / 4
    ours, slow = s.clone().requires_grad_(), s.double().requires_grad_()
    loss, entropy = dino_loss((ours[0], ours[1]), (t[0], t[1]), C, tau_s, tau_t)
    d = (t.double(), C.double())
    expected = H(d[0][0], slow[1], d[1], tau_s, tau_t) / 2 + H(d[0][1], slow[0], d[1], tau_s, tau_t) / 2
    loss.backward()  # type: ignore[no-untyped-call]
    expected.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(loss.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.grad, slow.grad.float(), atol=1e-5, rtol=1e-4)  # type: ignore[union-attr]
    p = torch.softmax((d[0] - d[1]) / tau_t, dim=-1)
    torch.testing.assert_close(entropy.double(), -(p * p.log()).sum(dim=-1).mean(), atol=1e-5, rtol=1e-5)


def test_uniform_outputs_cost_the_logarithm_of_k() -> None:
    views = (torch.zeros(4, 50), torch.zeros(4, 50))
    loss, entropy = dino_loss(views, views, torch.zeros(1, 50), 0.1, 0.04)
    assert loss.item() == pytest.approx(math.log(50), abs=1e-5)
    assert entropy.item() == pytest.approx(math.log(50), abs=1e-5)


def test_no_gradient_flows_into_the_teacher(dino: DINO, random_pixels: Tensor, generator: Generator) -> None:
    t = torch.randn(4, 5, requires_grad=True)
    s = torch.randn(4, 5, requires_grad=True)
    dino_loss((s, s), (t, t), torch.zeros(1, 5), 0.1, 0.04)[0].backward()  # type: ignore[no-untyped-call]
    assert t.grad is None
    assert s.grad is not None
    dino.loss(dino.views(random_pixels, generator), generator)[0].backward()  # type: ignore[no-untyped-call]
    assert all(not p.requires_grad and p.grad is None for p in dino.teacher_parameters())
    trained = [p for p in dino.student_parameters() if p.requires_grad]
    assert all(p.grad is not None and (p.grad != 0).any() for p in trained)


def test_center_is_the_moving_average_of_the_teachers_logits(generator: Generator) -> None:
    C, t = torch.randn(1, 7, generator=generator), torch.randn(10, 7, generator=generator)
    expected = torch.tensor([[0.9 * C[0, k] + 0.1 * sum(t[:, k].tolist()) / 10 for k in range(7)]])
    torch.testing.assert_close(update_center(C, t, 0.9), expected)


def test_teacher_starts_as_the_student(dino: DINO) -> None:
    for teacher, student in zip(dino.teacher_parameters(), dino.student_parameters(), strict=True):
        assert torch.equal(teacher, student)
        assert teacher is not student


def test_two_iterations_are_those_of_algorithm_1(dino: DINO, random_pixels: Tensor) -> None:
    """The whole loop of the paper's pseudocode, with SGD, on copies of the networks."""
    lr, m, tps, tpt = 0.1, 0.9, 0.1, 0.04
    gs = nn.ModuleList([copy.deepcopy(dino.student), rebuilt(dino.student_head)])
    gt = nn.ModuleList([copy.deepcopy(dino.student), rebuilt(dino.student_head)])
    C = torch.zeros(1, 24)
    trained = [p for p in dino.student_parameters() if p.requires_grad]
    sgd = torch.optim.SGD(trained, lr=lr)

    def g(network: nn.ModuleList, x: Tensor) -> Tensor:
        out: Tensor = network[1](network[0](x)[:, 0])
        return out

    for step, progress in enumerate((0.0, 0.5)):
        x1, x2 = dino.views(random_pixels, Generator().manual_seed(step))
        s1, s2, t1, t2 = g(gs, x1), g(gs, x2), g(gt, x1), g(gt, x2)
        expected = H(t1, s2, C, tps, tpt) / 2 + H(t2, s1, C, tps, tpt) / 2
        gs.zero_grad()
        expected.backward()  # type: ignore[no-untyped-call]
        l = 1 - (1 - 0.996) * (math.cos(math.pi * progress) + 1) / 2  # noqa: E741 - the paper's letter
        with torch.no_grad():
            for p in gs.parameters():
                if p.grad is not None:
                    p -= lr * p.grad
            for teacher, student in zip(gt.parameters(), gs.parameters(), strict=True):
                teacher.copy_(l * teacher + (1 - l) * student)
            C = m * C + (1 - m) * torch.cat([t1, t2]).mean(dim=0)

        loss, _ = dino.loss([x1, x2], Generator())
        sgd.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        sgd.step()
        dino.after_update(progress)

        torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(dino.center, C.detach(), atol=1e-6, rtol=0)
        for ours, theirs in zip(dino.student_parameters(), gs.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
        for ours, theirs in zip(dino.teacher_parameters(), gt.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def rebuilt(head: DINOHead) -> DINOHead:
    """A copy: weight_norm cannot be deep-copied."""
    first, last = head.mlp[0], head.mlp[-1]
    assert isinstance(first, nn.Linear)
    assert isinstance(last, nn.Linear)
    new = DINOHead(first.in_features, first.out_features, last.out_features, head.last_layer.out_features)
    new.load_state_dict(head.state_dict())
    return new


def test_momentum_goes_from_its_start_to_one() -> None:
    assert cosine_to_one(0.996, 0.0) == pytest.approx(0.996)
    assert cosine_to_one(0.996, 0.5) == pytest.approx(0.998)
    assert cosine_to_one(0.996, 1.0) == 1.0
    values = [cosine_to_one(0.9, i / 100) for i in range(101)]
    assert values == sorted(values)


def test_momentum_of_one_leaves_the_teacher(dino: DINO) -> None:
    dino.teacher_logits = torch.zeros(2, 24)
    before = [p.clone() for p in dino.teacher_parameters()]
    with torch.no_grad():
        for parameter in dino.student_parameters():
            parameter.add_(1)
    dino.after_update(1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, dino.teacher_parameters(), strict=True))


@pytest.mark.parametrize("epochs", [0, 1, 2])
def test_the_last_layer_is_frozen_at_first(
    epochs: int, trainer: Callable[..., Trainer], random_pixels: Tensor, advance: Advance
) -> None:
    learner = trainer("dino", random_pixels, freeze_last_layer_epochs=epochs)
    objective = cast(DINO, learner.objective)
    directions = objective.student_head.last_layer.parametrizations.weight.original1
    start, rest = directions.clone(), objective.student.norm.weight.clone()
    advance(learner, epochs * learner.steps_per_epoch)
    assert torch.equal(directions, start)
    advance(learner, 1)
    assert not torch.equal(directions, start)
    assert not torch.equal(objective.student.norm.weight, rest)


def test_prototypes_keep_length_one(trainer: Callable[..., Trainer], random_pixels: Tensor, advance: Advance) -> None:
    learner = trainer("dino", random_pixels, freeze_last_layer_epochs=0, lr=0.05)
    advance(learner, 4)
    objective = cast(DINO, learner.objective)
    for head in (objective.student_head, objective.teacher_head):
        torch.testing.assert_close(head.last_layer.weight.norm(dim=1), torch.ones(32), atol=1e-5, rtol=0)


def test_logits_are_cosines_in_float32(dino: DINO, generator: Generator) -> None:
    x = 50 * torch.randn(64, 16, generator=generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = dino.student_head(x)
    assert logits.dtype == torch.float32
    assert (logits.abs() <= 1 + 1e-5).all()
    assert len(logits.unique()) > 0.9 * logits.numel()  # bf16 has but 256 values an octave


def test_the_evaluated_encoder_is_the_teacher(dino: DINO) -> None:
    assert dino.kept is dino.teacher


@pytest.mark.parametrize(("center_momentum", "collapses"), [(0.5, False), (1.0, True)])
def test_centering_keeps_real_photos_apart(
    center_momentum: float, collapses: bool, trainer: Callable[..., Trainer], photos: Images, advance: Advance
) -> None:
    """Information that the teacher assigns by picture: none after a collapse, be it to one prototype or to
    all of them. With the center held at zero (momentum 1) it does collapse, so this can fail."""
    learner = trainer(
        "dino", photos.pixels, patch_size=8, width=48, depth=2, epochs=15, batch_size=100, lr=3e-4, prototypes=64,
        head_hidden=128, bottleneck=32, teacher_momentum=0.9, center_momentum=center_momentum,
    )  # fmt: skip
    metrics = advance(learner, 20)
    objective = cast(DINO, learner.objective)
    with torch.no_grad():
        first, _ = objective.views(photos.pixels, Generator().manual_seed(9))
        logits = objective.teacher_head(objective.teacher(first)[:, 0])
        p = ((logits - objective.center) / 0.04).softmax(dim=1)
    entropy = -torch.special.xlogy(p, p).sum(dim=1).mean()
    marginal = p.mean(dim=0)
    information = -torch.special.xlogy(marginal, marginal).sum() - entropy
    if collapses:
        assert information < 0.1
        assert metrics[-1]["loss"] < 0.3
    else:
        assert information > 0.3
        assert 0.5 < entropy < math.log(64) - 0.3
        assert metrics[-1]["loss"] > 1.0
