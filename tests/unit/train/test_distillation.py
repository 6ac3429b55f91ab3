from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from patchsight_train import distillation
from patchsight_train.data import Images
from patchsight_train.distillation import Distillation, cosine_distance
from patchsight_train.objective import Objective, When

Make = Callable[..., Objective]
Views = Callable[..., list[Tensor]]
BUNDLE = Path(__file__).resolve().parents[3] / "model_repository" / "simclr-vit-cifar10"
NOW = When(1.0, 0.5)
RESNET: dict[str, Any] = {"backbone": "resnet18", "width": None, "depth": None, "heads": None}


@pytest.fixture
def student(objective: Make) -> Callable[..., Distillation]:
    """`student(**changes)`."""
    return lambda **changes: cast(Distillation, objective("distillation", teacher=BUNDLE, **changes))


def test_distance_against_its_definition(generator: Generator) -> None:
    a, b = torch.randn(2, 5, 7, generator=generator)
    cosines = [float(a[i] @ b[i] / (a[i].norm() * b[i].norm())) for i in range(5)]
    assert cosine_distance(a, b).item() == pytest.approx(1 - sum(cosines) / 5, abs=1e-6)
    twice = F.mse_loss(F.normalize(a, dim=1), F.normalize(b, dim=1), reduction="sum") / 5  # arXiv:2006.07733, Eq. 2
    assert cosine_distance(a, b).item() == pytest.approx(twice.item() / 2, abs=1e-6)
    assert cosine_distance(3 * b, b).item() == pytest.approx(0, abs=1e-6)
    assert cosine_distance(-b, b).item() == pytest.approx(2, abs=1e-6)


def test_half_precision_predictions_are_compared_in_float32(generator: Generator) -> None:
    a, b = torch.randn(2, 5, 7, generator=generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = cosine_distance(a.bfloat16(), b)
    assert found.dtype == torch.float32
    assert torch.equal(found, cosine_distance(a.bfloat16().float(), b))


@pytest.mark.parametrize("choices", [{}, {"registers": 1}, {"image_size": 24, "patch_size": 8}, RESNET])
def test_loss_is_that_of_the_teachers_embedding_of_the_same_view(
    choices: dict[str, Any], student: Callable[..., Distillation], views: Views
) -> None:
    model = student(**choices).eval()
    (x,) = views(model)
    seen = model.teacher(x)
    target = seen - seen.mean(dim=0)
    tokens = model.encoder(x)
    pooled = tokens.mean(dim=1) if choices is RESNET else tokens[:, 0]
    predicted = pooled @ model.regressor.weight.T + model.regressor.bias
    expected = sum(1 - F.cosine_similarity(predicted[i], target[i], dim=0) for i in range(20)) / 20
    ((loss, metrics),) = model.parts([x], NOW)
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=0)
    assert torch.equal(loss, metrics["loss"])


def test_the_same_answer_for_every_picture_is_worth_nothing(
    student: Callable[..., Distillation], views: Views, photos: Images
) -> None:
    """As the teacher's embeddings are, a constant would do well."""
    model = student()
    (x,) = views(model, pixels=photos.pixels[::2])
    seen, target = model.teacher(x), model.targets(x)
    assert cosine_distance(seen.mean(dim=0).expand_as(seen), seen) < 0.15
    for direction in (seen.mean(dim=0), target[0], torch.ones(128)):
        assert abs(cosine_distance(direction.expand_as(target), target) - 1) < 0.15


def test_the_mean_is_that_of_all_ranks(
    student: Callable[..., Distillation], views: Views, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks, of which the other one's mean is 7 in every channel."""
    model = student()
    (x,) = views(model)
    monkeypatch.setattr(distillation, "mean_over_ranks", lambda mean: (mean + 7) / 2)
    seen = model.teacher(x)
    torch.testing.assert_close(model.targets(x), seen - (seen.mean(dim=0) + 7) / 2)


def test_views_alone_ask_no_teacher(student: Callable[..., Distillation], views: Views) -> None:
    """One rank draws them by itself, for people to look at: there it may neither wait for others nor pay for these."""
    model = student()
    model.teacher = None  # type: ignore[assignment]
    assert [x.shape for x in views(model)] == [(20, 3, 16, 16)]


def test_the_teacher_is_no_part_of_the_checkpoint(student: Callable[..., Distillation]) -> None:
    model = student()
    assert {name.split(".")[0] for name in model.state_dict()} == {"encoder", "regressor"}
    assert model.kept is model.encoder


def test_views_follow_the_seed(student: Callable[..., Distillation], views: Views) -> None:
    model = student()
    first, again, other = views(model), views(model), views(model, 1)
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other))


def test_micro_batches_change_no_number(
    student: Callable[..., Distillation], views: Views, backward: Callable[..., dict[str, Tensor]]
) -> None:
    whole, parts = student(), student(micro_batch=7)
    a, b = backward(whole, views(whole)), backward(parts, views(parts))
    torch.testing.assert_close(a["loss"], b["loss"], atol=1e-6, rtol=0)
    for (name, p), q in zip(whole.named_parameters(), parts.parameters(), strict=True):
        assert p.grad is not None, name
        torch.testing.assert_close(p.grad, q.grad, atol=1e-6, rtol=1e-4, msg=name)


def test_a_smaller_student_learns_from_photos(
    photos: Images, learn: Callable[..., tuple[Objective, list[dict[str, float]]]], views: Views
) -> None:
    pixels = photos.pixels[::5]
    choices = {
        "teacher": BUNDLE, "patch_size": 8, "width": 48, "depth": 2, "epochs": 30, "batch_size": 20, "lr": 3e-3,
        "warmup_epochs": 0,
    }  # fmt: skip
    before, _ = learn("distillation", pixels, 0, **choices)
    after, _ = learn("distillation", pixels, 30, **choices)
    with torch.no_grad():
        distances = [next(model.parts(views(model, 9, pixels), NOW))[0].item() for model in (before, after)]
    assert distances[1] < 0.7 < 0.9 < distances[0]
