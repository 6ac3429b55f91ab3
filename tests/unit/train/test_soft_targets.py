import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from patchsight_serve.errors import InvalidRequest
from patchsight_serve.sample_gallery import SAMPLES
from patchsight_train import checkpoint
from patchsight_train.data import Images
from patchsight_train.loop import Trainer
from patchsight_train.objective import Objective
from patchsight_train.soft_targets import SoftTargets, soft_target_loss

Make = Callable[..., Objective]
Views = Callable[..., list[Tensor]]
BUNDLE = Path(__file__).resolve().parents[3] / "model_repository" / "simclr-vit-cifar10"
RESNET: dict[str, Any] = {"backbone": "resnet18", "width": None, "depth": None, "heads": None}


@pytest.fixture
def student(objective: Make) -> Callable[..., SoftTargets]:
    """`student(**changes)`: the teacher's classes are those of forty of the photos that ship."""
    return lambda **changes: cast(
        SoftTargets, objective("soft_targets", teacher=BUNDLE, **{"data": [str(SAMPLES)], "limit": 40, **changes})
    )


@pytest.mark.parametrize("T", [1.0, 2.5, 20.0])
def test_loss_against_the_papers_equations(T: float, generator: Generator) -> None:
    """Section 2: q_i = exp(z_i / T) / Σ exp(z_j / T), cross-entropy with p, times T²; p's entropy is no loss."""
    z, v = 4 * torch.randn(2, 6, 5, generator=generator)
    total = 0.0
    for n in range(6):
        q = [math.exp(float(z[n, i]) / T) / sum(math.exp(float(z[n, j]) / T) for j in range(5)) for i in range(5)]
        p = [math.exp(float(v[n, i]) / T) / sum(math.exp(float(v[n, j]) / T) for j in range(5)) for i in range(5)]
        cross = -sum(p[i] * math.log(q[i]) for i in range(5))
        entropy = -sum(p[i] * math.log(p[i]) for i in range(5))
        total += T**2 * (cross - entropy) / 6
    assert soft_target_loss(z, v, T).item() == pytest.approx(total, rel=1e-4)
    theirs = T**2 * F.kl_div(F.log_softmax(z / T, 1), F.softmax(v / T, 1), reduction="batchmean")
    torch.testing.assert_close(soft_target_loss(z, v, T), theirs, atol=1e-5, rtol=1e-4)


def test_gradient_at_a_high_temperature_is_that_of_matching_logits(generator: Generator) -> None:
    """Eq. 4: with zero-mean logits, dC/dz_i → (z_i − v_i) / (N T²), N the number of classes; C here is times T²."""
    z, v = torch.randn(2, 1, 10, generator=generator, dtype=torch.float32)
    z, v = z - z.mean(), v - v.mean()
    z.requires_grad_()
    soft_target_loss(z, v, 200.0).backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(z.grad, (z.detach() - v) / 10, atol=2e-3, rtol=0)


def test_equal_distributions_cost_nothing(generator: Generator) -> None:
    v = torch.randn(4, 7, generator=generator)
    assert soft_target_loss(v + 3, v, 4.0).item() == pytest.approx(0, abs=1e-5)
    assert soft_target_loss(-v, v, 4.0) > 0.1


def test_half_precision_logits_are_compared_in_float32(generator: Generator) -> None:
    z, v = torch.randn(2, 4, 7, generator=generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = soft_target_loss(z.bfloat16(), v, 2.0)
    assert found.dtype == torch.float32
    assert torch.equal(found, soft_target_loss(z.bfloat16().float(), v, 2.0))


@pytest.mark.parametrize("choices", [{}, {"image_size": 24, "patch_size": 8, "temperature": 1.5}, RESNET])
def test_loss_is_that_of_the_teachers_classes_of_the_same_view(
    choices: dict[str, Any], student: Callable[..., SoftTargets], views: Views
) -> None:
    model = student(**choices).eval()
    (x,) = views(model)
    v = model.teacher(x) @ model.teacher_weight.T + model.teacher_bias
    assert v.shape == (20, 9)  # one of the classes is not among the forty
    tokens = model.encoder(x)
    z = model.classifier(tokens.mean(dim=1) if choices is RESNET else tokens[:, 0])
    loss, metrics = model.loss([x])
    torch.testing.assert_close(loss, soft_target_loss(z, v, choices.get("temperature", 4.0)))
    agreeing = sum(int(z[i].argmax() == v[i].argmax()) for i in range(20))
    assert metrics["agreement"].item() == pytest.approx(agreeing / 20)


def test_mixed_precision_leaves_the_teacher_alone(student: Callable[..., SoftTargets], views: Views) -> None:
    model = student()
    (x,) = views(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        v, (loss, _) = model.teacher_logits(x), model.loss([x])
    assert torch.equal(v, model.teacher_logits(x))
    assert loss.dtype == torch.float32


def test_its_classes_are_in_the_checkpoint_and_its_teacher_is_not(student: Callable[..., SoftTargets]) -> None:
    model, again = student(), student()
    names = {name.split(".")[0] for name in model.state_dict()}
    assert names == {"encoder", "classifier", "teacher_weight", "teacher_bias"}
    assert torch.equal(model.teacher_weight, again.teacher_weight)
    assert torch.equal(model.teacher_bias, again.teacher_bias)
    assert not {id(model.teacher_weight), id(model.teacher_bias)} & {id(p) for p in model.parameters()}


def test_a_resumed_run_has_the_classes_that_it_began_with(
    trainer: Callable[..., Trainer], random_pixels: Tensor, picture_folder: Path, tmp_path: Path
) -> None:
    """Though the labels have changed since: the folders' names are swapped."""

    def begun(run: str, labels: Path) -> Trainer:
        return trainer("soft_targets", random_pixels, run, teacher=BUNDLE, teacher_labels=[str(labels)])

    whole = begun("whole", picture_folder)
    for step in range(3):
        whole.updater.update(random_pixels[:8], step)
        if step == 1:
            checkpoint.save(tmp_path / "part", 2, whole.objective, whole.updater.optimizer)
    swapped = tmp_path / "swapped"
    shutil.copytree(picture_folder / "cats", swapped / "dogs")
    shutil.copytree(picture_folder / "dogs", swapped / "cats")
    part = begun("part", swapped)
    assert part.step == 2
    part.updater.update(random_pixels[:8], 2)
    state = part.objective.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in whole.objective.state_dict().items())


def test_labels_come_from_elsewhere_where_so_asked(student: Callable[..., SoftTargets], picture_folder: Path) -> None:
    cats = [str(picture_folder / "cats")]
    assert student(data=cats, teacher_labels=[str(SAMPLES)]).teacher_weight.shape == (10, 128)
    assert student(teacher_labels=[str(picture_folder)]).teacher_weight.shape == (2, 128)
    with pytest.raises(InvalidRequest, match="no labels"):
        student(data=cats)


def test_micro_batches_change_no_number(
    student: Callable[..., SoftTargets], views: Views, backward: Callable[..., dict[str, Tensor]]
) -> None:
    whole, parts = student(), student(micro_batch=7)
    a, b = backward(whole, views(whole)), backward(parts, views(parts))
    assert a.keys() == b.keys() == {"loss", "agreement"}
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-6, rtol=1e-6)
    for (name, p), q in zip(whole.named_parameters(), parts.parameters(), strict=True):
        assert p.grad is not None, name
        torch.testing.assert_close(p.grad, q.grad, atol=1e-6, rtol=1e-4, msg=name)


def test_a_smaller_student_comes_to_agree_on_photos(
    photos: Images, learn: Callable[..., tuple[Objective, list[dict[str, float]]]], views: Views
) -> None:
    pixels = photos.pixels[::5]
    choices = {
        "data": [str(SAMPLES)], "teacher": BUNDLE, "patch_size": 8, "width": 48, "depth": 2, "epochs": 30,
        "batch_size": 20, "lr": 3e-3, "warmup_epochs": 0, "crop_scale": (1.0, 1.0),
    }  # fmt: skip
    before, _ = learn("soft_targets", pixels, 0, **choices)
    after, _ = learn("soft_targets", pixels, 60, **choices)
    with torch.no_grad():
        first, last = (model.loss(views(model, 9, pixels)) for model in (before, after))
    assert last[0] < 0.75 * first[0]
    assert last[1]["agreement"] > first[1]["agreement"] + 0.2
