import copy
import math
from collections.abc import Callable
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from lightly.loss import DINOLoss
from lightly.models.utils import update_momentum
from torch import Generator, Tensor, nn

from patchsight_train.data import Images
from patchsight_train.dino import DINO, DINOHead, sharpen
from patchsight_train.multi_crop import entropy
from patchsight_train.objective import Objective, When

Learn = Callable[..., tuple[Objective, list[dict[str, float]]]]
Views = Callable[..., list[Tensor]]
Backward = Callable[..., dict[str, Tensor]]


def H(t: Tensor, s: Tensor, C: Tensor, tps: float, tpt: float) -> Tensor:  # noqa: N802 - the letter of the paper
    """As in the paper's Algorithm 1, letter by letter."""
    t = t.detach()
    s = torch.softmax(s / tps, dim=1)
    t = torch.softmax((t - C) / tpt, dim=1)
    return -(t * torch.log(s)).sum(dim=1).mean()


@pytest.fixture
def dino(objective: Callable[..., Objective]) -> DINO:
    """With three local crops, a teacher that is not the student, and a center that is not zero."""
    model = cast(DINO, objective("dino", prototypes=24, local_crops=3))
    generator = Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.teacher_parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        model.center += 0.1 * torch.randn(1, 24, generator=generator)
    return model


def student_logits(dino: DINO, views: list[Tensor]) -> list[Tensor]:
    return [dino.student_head(dino.student(x)[:, 0]) for x in views]


@torch.no_grad()
def teacher_logits(dino: DINO, views: list[Tensor]) -> list[Tensor]:
    return [dino.teacher_head(dino.teacher(x)[:, 0]) for x in views]


@pytest.mark.parametrize("local_crops", [0, 3])
@pytest.mark.parametrize(("tau_s", "tau_t"), [(0.1, 0.04), (0.2, 0.07), (1.0, 1.0)])
def test_loss_and_gradient_are_those_of_eq_3(
    local_crops: int, tau_s: float, tau_t: float, dino: DINO, views: Views, backward: Backward
) -> None:
    """With H of Algorithm 1 summed over x of the global views and x' of all others, and averaged."""
    dino.settings = dino.settings.model_copy(
        update={"student_temperature": tau_s, "teacher_temperature": tau_t, "warmup_teacher_temperature": tau_t}
    )
    seen = views(dino)[: 2 + local_crops]
    s, t = student_logits(dino, seen), teacher_logits(dino, seen[:2])
    pairs = [(i, j) for i in range(2) for j in range(len(seen)) if i != j]
    assert len(pairs) == 2 * (1 + local_crops)
    expected = torch.stack([H(t[i], s[j], dino.center, tau_s, tau_t) for i, j in pairs]).mean()
    expected.backward()  # type: ignore[no-untyped-call]
    slow = {name: p.grad.clone() for name, p in dino.named_parameters() if p.grad is not None}
    dino.zero_grad()
    found = backward(dino, seen)
    torch.testing.assert_close(found["loss"], expected.detach(), atol=1e-5, rtol=1e-5)
    ours = {name: p.grad for name, p in dino.named_parameters() if p.grad is not None}
    assert ours.keys() == slow.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, slow[name], atol=1e-6, rtol=1e-4)


def test_loss_center_and_temperatures_are_those_of_lightly(dino: DINO, views: Views, backward: Backward) -> None:
    """Over the epochs of a warm-up; its first center is ours."""
    dino.settings = dino.settings.model_copy(
        update={"warmup_teacher_epochs": 3, "warmup_teacher_temperature": 0.03, "teacher_temperature": 0.06}
    )
    theirs = DINOLoss(24, 0.03, 0.06, 3 + 1, 0.1, 0.9)  # they count the epochs before and after, we those between
    theirs.center.data = dino.center[None].clone()
    for epoch in range(5):
        seen = views(dino, epoch)
        with torch.no_grad():
            expected = theirs(teacher_logits(dino, seen[:2]), student_logits(dino, seen), epoch=epoch)
        found = backward(dino, seen, epoch)
        dino.center = dino.settings.center_momentum * dino.center + 0.1 * dino.teacher_mean
        torch.testing.assert_close(found["loss"], expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(dino.center, theirs.center[0], atol=1e-6, rtol=0)
        assert found["teacher_temperature"].item() == pytest.approx(0.03 + 0.01 * min(epoch, 3))


def test_the_teacher_moves_as_in_lightly(dino: DINO, views: Views, backward: Backward) -> None:
    theirs = copy.deepcopy(dino.teacher)
    backward(dino, views(dino))
    for progress in (0.0, 0.3, 0.9):
        update_momentum(dino.student, theirs, 1 - 0.004 * (math.cos(math.pi * progress) + 1) / 2)
        dino.after_update(When(1.0, progress))
    for ours, expected in zip(dino.teacher.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)


def test_uniform_outputs_cost_the_logarithm_of_k(dino: DINO, views: Views, backward: Backward) -> None:
    """And a teacher that says the same of every picture is told by the entropy of its mean."""
    with torch.no_grad():
        dino.center.zero_()
        for head in (dino.student_head, dino.teacher_head):
            last = head.mlp[-1]
            assert isinstance(last, nn.Linear)
            last.weight.zero_()
            last.bias.zero_()
    found = backward(dino, views(dino))
    for name in ("loss", "teacher_entropy", "teacher_mean_entropy"):
        assert found[name].item() == pytest.approx(math.log(24), abs=1e-5)
    with torch.no_grad():
        dino.center[0, 0] = -100  # all pictures to one prototype
    found = backward(dino, views(dino))
    assert found["teacher_entropy"].item() == pytest.approx(0, abs=1e-5)
    assert found["teacher_mean_entropy"].item() == pytest.approx(0, abs=1e-5)


def test_entropies_are_those_of_the_targets(dino: DINO, views: Views) -> None:
    seen = views(dino)
    targets, metrics = dino.targets(seen[:2], When(1.0, 0.5))
    p = torch.cat([torch.softmax((t - dino.center) / 0.04, dim=1) for t in teacher_logits(dino, seen[:2])]).double()
    torch.testing.assert_close(torch.cat(targets).double(), p, atol=1e-6, rtol=1e-4)
    mean = p.mean(dim=0)
    assert metrics["teacher_entropy"].item() == pytest.approx(-(p * p.log()).sum(dim=1).mean().item(), abs=1e-4)
    assert metrics["teacher_mean_entropy"].item() == pytest.approx(-(mean * mean.log()).sum().item(), abs=1e-4)
    assert metrics["teacher_entropy"] < metrics["teacher_mean_entropy"]


def test_no_gradient_flows_into_the_teacher(dino: DINO, views: Views, backward: Backward) -> None:
    backward(dino, views(dino))
    assert all(not p.requires_grad and p.grad is None for p in dino.teacher_parameters())
    trained = [p for p in dino.student_parameters() if p.requires_grad]
    assert all(p.grad is not None and (p.grad != 0).any() for p in trained)


def test_the_teacher_sees_the_global_views_alone(dino: DINO, views: Views, backward: Backward) -> None:
    seen: dict[str, list[tuple[int, ...]]] = {"student": [], "teacher": []}
    for name, shapes in seen.items():
        dino.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs, shapes=shapes: shapes.append(tuple(inputs[0].shape))
        )
    backward(dino, views(dino))
    assert seen["teacher"] == [(40, 3, 16, 16)]
    assert seen["student"] == [(40, 3, 16, 16), (60, 3, 8, 8)]  # views of one size in one batch


def test_teacher_starts_as_the_student(objective: Callable[..., Objective]) -> None:
    dino = cast(DINO, objective("dino"))
    for teacher, student in zip(dino.teacher_parameters(), dino.student_parameters(), strict=True):
        assert torch.equal(teacher, student)
        assert teacher is not student


def test_two_iterations_are_those_of_algorithm_1(
    objective: Callable[..., Objective], views: Views, backward: Backward
) -> None:
    """The whole loop of the paper's pseudocode, with SGD, on copies of the networks."""
    dino = cast(DINO, objective("dino", prototypes=24, local_crops=0))
    lr, m, tps, tpt = 0.1, 0.9, 0.1, 0.04
    gs = nn.ModuleList([copy.deepcopy(dino.student), rebuilt(dino.student_head)])
    gt = nn.ModuleList([copy.deepcopy(dino.student), rebuilt(dino.student_head)])
    C = torch.zeros(1, 24)
    sgd = torch.optim.SGD([p for p in dino.student_parameters() if p.requires_grad], lr=lr)

    def g(network: nn.ModuleList, x: Tensor) -> Tensor:
        out: Tensor = network[1](network[0](x)[:, 0])
        return out

    for step, progress in enumerate((0.0, 0.5)):
        x1, x2 = seen = views(dino, step)
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

        sgd.zero_grad()
        loss = backward(dino, seen)["loss"]
        sgd.step()
        dino.after_update(When(step, progress))

        torch.testing.assert_close(loss, expected.detach(), atol=1e-5, rtol=1e-5)
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


def test_momentum_of_one_leaves_the_teacher(dino: DINO, views: Views, backward: Backward) -> None:
    backward(dino, views(dino))
    before = [p.clone() for p in dino.teacher_parameters()]
    dino.after_update(When(3.0, 1.0))
    assert all(torch.equal(a, b) for a, b in zip(before, dino.teacher_parameters(), strict=True))
    dino.after_update(When(2.0, 0.9))
    assert not any(torch.equal(a, b) for a, b in zip(before, dino.teacher_parameters(), strict=True) if b.numel() > 50)


def test_the_teacher_of_a_resnet_has_its_own_statistics(
    objective: Callable[..., Objective], views: Views, backward: Backward
) -> None:
    """Of the global views, which are all it sees."""
    small = {"backbone": "resnet18", "width": None, "depth": None, "heads": None}
    dino = cast(DINO, objective("dino", **small, image_size=16, local_crops=1))
    seen = views(dino)
    with torch.no_grad():
        first = dino.teacher.get_submodule("conv1")(torch.cat(seen[:2])).mean(dim=(0, 2, 3))
    backward(dino, seen)
    dino.after_update(When(1.0, 0.5))
    ours, theirs = (network.get_buffer("bn1.running_mean") for network in (dino.teacher, dino.student))
    torch.testing.assert_close(ours, 0.1 * first, atol=1e-6, rtol=1e-4)
    assert not torch.allclose(ours, theirs)


@pytest.mark.parametrize("epochs", [0, 1, 2])
def test_the_last_layer_is_frozen_at_first(epochs: int, learn: Learn, random_pixels: Tensor) -> None:
    per_epoch = 2  # 20 images, 8 a step

    def after(steps: int) -> tuple[Tensor, Tensor]:
        dino = cast(DINO, learn("dino", random_pixels, steps, freeze_last_layer_epochs=epochs)[0])
        directions = dino.student_head.last_layer.parametrizations.weight.original1
        return directions, dino.student.get_parameter("norm.weight")

    (start, _), (frozen, _) = after(0), after(epochs * per_epoch)
    free, rest = after(epochs * per_epoch + 1)
    assert torch.equal(frozen, start)
    assert not torch.equal(free, start)
    assert not torch.equal(rest, torch.ones(16))


def test_prototypes_keep_length_one(learn: Learn, random_pixels: Tensor) -> None:
    dino = cast(DINO, learn("dino", random_pixels, 4, freeze_last_layer_epochs=0, lr=0.05)[0])
    for head in (dino.student_head, dino.teacher_head):
        torch.testing.assert_close(head.last_layer.weight.norm(dim=1), torch.ones(32), atol=1e-5, rtol=0)


def test_logits_are_cosines_in_float32(dino: DINO, generator: Generator) -> None:
    x = 50 * torch.randn(64, 16, generator=generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = dino.student_head(x)
    assert logits.dtype == torch.float32
    assert (logits.abs() <= 1 + 1e-5).all()
    assert len(logits.unique()) > 0.9 * logits.numel()  # bf16 has but 256 values an octave
    exact = F.normalize(dino.student_head.mlp(x), dim=1) @ F.normalize(dino.student_head.last_layer.weight, dim=1).T
    torch.testing.assert_close(dino.student_head(x), exact, atol=1e-6, rtol=0)


def test_the_evaluated_encoder_is_the_teacher(dino: DINO) -> None:
    assert dino.kept is dino.teacher


@pytest.mark.parametrize(("center_momentum", "collapses"), [(0.3, False), (1.0, True)])
def test_centering_keeps_real_photos_apart(
    center_momentum: float, collapses: bool, learn: Learn, photos: Images, views: Views
) -> None:
    """Information that the teacher assigns by picture: none after a collapse, be it to one prototype or to
    all of them. With the center held at zero (momentum 1) it does collapse, so this can fail."""
    found, metrics = learn(
        "dino", photos.pixels, 20, patch_size=8, width=48, depth=2, epochs=15, batch_size=100, lr=5e-4, prototypes=64,
        head_hidden=128, bottleneck=32, teacher_momentum=0.7, center_momentum=center_momentum, local_crops=0,
    )  # fmt: skip
    dino = cast(DINO, found)
    with torch.no_grad():
        p = sharpen(*teacher_logits(dino, views(dino, 9, photos.pixels)[:1]), dino.center, 0.04)
    certainty = entropy(p).mean()
    information = entropy(p.mean(dim=0)) - certainty
    if collapses:
        assert information < 0.1
        assert metrics[-1]["loss"] < 0.3
    else:
        assert information > 0.3
        assert 0.5 < certainty < math.log(64) - 0.3
        assert metrics[-1]["loss"] > 1.0
