"""Fine-tuning's objective: against torch's own label smoothing, mixup by hand, and a head trained on fixed features."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from patchsight_train.build import build_encoder
from patchsight_train.classification import Classification, mix, mixing_share, targets
from patchsight_train.finetune_settings import FineTuneSettings
from patchsight_train.randomness import Randomness
from patchsight_train.schedule import warmup_cosine
from patchsight_train.update import Updater
from patchsight_train.views import eval_view

LABELS = torch.arange(20) % 3

Make = Callable[..., Classification]


@pytest.fixture
def make(tiny: Callable[..., dict[str, Any]]) -> Make:
    """`make(**changes)`: tiny, three classes, always alike."""

    def make(**changes: Any) -> Classification:
        settings = FineTuneSettings(**tiny("finetune", test=["unread"], scratch=True, **changes))
        torch.manual_seed(0)
        objective = Classification(build_encoder(settings.architecture), 3, settings)
        nn.init.normal_(objective.head.weight, generator=Generator().manual_seed(2))
        return objective

    return make


def random(seed: int = 0) -> Randomness:
    return Randomness(Generator().manual_seed(seed))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_targets_are_torchs_label_smoothing(smoothing: float, generator: Generator) -> None:
    logits, labels = torch.randn(7, 5, generator=generator), torch.randint(0, 5, (7,), generator=generator)
    y = targets(labels, 5, smoothing)
    torch.testing.assert_close(y.sum(dim=1), torch.ones(7))
    torch.testing.assert_close(F.cross_entropy(logits, y), F.cross_entropy(logits, labels, label_smoothing=smoothing))


def test_mixup_is_that_of_its_equation(generator: Generator) -> None:
    x, y = torch.randn(5, 3, 4, 4, generator=generator), targets(torch.tensor([0, 1, 2, 1, 0]), 3, 0.0)
    mixed, target = mix(x, y, 0.3)
    for i in range(5):
        torch.testing.assert_close(mixed[i], 0.3 * x[i] + 0.7 * x[4 - i])
        torch.testing.assert_close(target[i], 0.3 * y[i] + 0.7 * y[4 - i])


def test_mixing_shares_have_the_moments_of_beta() -> None:
    """Mean 1/2 and variance 1 / (4 (2 α + 1))."""
    shares = torch.tensor([mixing_share(0.8, random(seed)) for seed in range(2000)])
    assert float(shares.mean()) == pytest.approx(0.5, abs=0.03)
    assert float(shares.var()) == pytest.approx(1 / (4 * 2.6), abs=0.01)
    assert mixing_share(0.8, random(3)) == mixing_share(0.8, random(3))


def test_views_go_with_their_labels(make: Make, random_pixels: Tensor) -> None:
    objective = make(label_smoothing=0.0)
    objective.labels.extend([LABELS, LABELS.flip(0)])
    for wanted in (LABELS, LABELS.flip(0)):
        x, y = objective.views(random_pixels, random())
        assert x.shape == (20, 3, 16, 16)
        assert torch.equal(y.argmax(dim=1), wanted)
    objective.eval()
    assert [view.shape for view in objective.views(random_pixels, random())] == [(20, 3, 16, 16)]


def test_the_loss_is_the_cross_entropy_of_the_logits(make: Make, random_pixels: Tensor) -> None:
    objective = make()
    objective.labels.append(LABELS)
    x, y = objective.views(random_pixels, random())
    loss, metrics = objective.loss([x, y])
    logits = objective.head(objective.encoder(x)[:, 0])
    torch.testing.assert_close(loss, -(y * logits.log_softmax(dim=1)).sum(dim=1).mean())
    assert float(metrics["batch_accuracy"]) == pytest.approx(float((logits.argmax(1) == LABELS).float().mean()))


def test_pooling_is_as_asked_for(make: Make, random_pixels: Tensor) -> None:
    x = eval_view(random_pixels)
    objective = make(pooling="mean")
    torch.testing.assert_close(objective.logits(x), objective.head(objective.encoder(x)[:, 1:].mean(dim=1)))


def test_micro_batches_do_not_change_the_gradient(
    make: Make, random_pixels: Tensor, backward: Callable[..., dict[str, Tensor]]
) -> None:
    found = []
    for micro_batch in (None, 7):
        objective = make(micro_batch=micro_batch, mixup=0.8)
        objective.labels.append(LABELS)
        backward(objective, objective.views(random_pixels, random()))
        found.append([p.grad for p in objective.parameters()])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


def test_features_are_standardized_by_the_batch_and_later_by_what_was_seen(make: Make, generator: Generator) -> None:
    objective = make(blocks=0)
    h = 5 + 3 * torch.randn(50, 16, generator=generator)
    for _ in range(100):
        out = objective.standardized(h)
    wanted = (h - h.mean(dim=0)) / h.std(dim=0, correction=0)
    torch.testing.assert_close(out, wanted, rtol=1e-3, atol=1e-3)
    objective.eval()
    torch.testing.assert_close(objective.standardized(h[:1]), wanted[:1], rtol=0.03, atol=0.03)
    objective.train()
    torch.testing.assert_close(objective.standardized(h[:1]), wanted[:1], rtol=0.03, atol=0.03)
    assert not list(objective.norm.parameters()) if objective.norm else False


def test_blocks_0_is_a_linear_head_on_features_that_are_computed_once(make: Make, random_pixels: Tensor) -> None:
    plain: dict[str, Any] = {
        "blocks": 0, "batch_norm": False, "crop_scale": (1.0, 1.0), "flip": 0.0, "lr": 0.01, "clip_grad": 0.0,
        "label_smoothing": 0.1, "weight_decay": 0.1,
    }  # fmt: skip
    objective = make(**plain)
    head = nn.Linear(16, 3)
    head.load_state_dict(objective.head.state_dict())
    with torch.no_grad():
        features = objective.encoder(eval_view(random_pixels))[:, 0]
    settings = FineTuneSettings(data=["x"], test=["x"], scratch=True, warmup_epochs=1, **plain)
    updater = Updater(objective, settings, torch.device("cpu"), torch.float32, 12, 4)
    optimizer = torch.optim.AdamW(
        [{"params": [head.weight], "weight_decay": 0.1}, {"params": [head.bias], "weight_decay": 0.0}],
        betas=(0.9, settings.beta2),
    )
    for step in range(12):
        rows = torch.randperm(20, generator=Generator().manual_seed(step))[:8]
        objective.labels.append(LABELS[rows])
        updater.update(random_pixels[rows], step)
        for group in optimizer.param_groups:
            group["lr"] = warmup_cosine(step, 12, 4, 0.01, settings.final_lr)
        optimizer.zero_grad()
        F.cross_entropy(head(features[rows]), LABELS[rows], label_smoothing=0.1).backward()
        optimizer.step()
    torch.testing.assert_close(objective.head.weight, head.weight, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(objective.head.bias, head.bias, rtol=1e-3, atol=1e-4)


def test_a_step_that_is_not_finite_moves_nothing(make: Make, random_pixels: Tensor) -> None:
    objective = make(blocks=0)
    settings = FineTuneSettings(data=["x"], test=["x"], scratch=True, blocks=0)
    updater = Updater(objective, settings, torch.device("cpu"), torch.float32, 10, 5)
    with torch.no_grad():
        objective.encoder.get_parameter("cls_token").fill_(torch.nan)
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    objective.labels.append(LABELS)
    assert updater.update(random_pixels, 0)["skipped"] == 1
    torch.testing.assert_close(objective.state_dict(), before, rtol=0, atol=0, equal_nan=True)
