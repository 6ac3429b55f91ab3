import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from patchsight_train.judge.heads import HELD_OUT, RATES, Heads, probe_heads, split, steps_for
from patchsight_train.linear import linear_probe


def blobs(N: int, classes: int, D: int, seed: int, spread: float = 1.5) -> tuple[Tensor, Tensor]:
    """Classes around centers that are the same for every seed; channels of very different scale and offset."""
    centers = torch.randn(classes, D, generator=Generator().manual_seed(0))
    random = Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (N,), generator=random)
    x = centers[labels] + spread * torch.randn(N, D, generator=random)
    return (x + torch.linspace(-5, 5, D)) * torch.logspace(-2, 2, D), labels


def test_a_step_is_that_of_autograd_and_of_torchs_sgd() -> None:
    x, y = blobs(64, 5, 7, seed=1)
    rates = (0.1, 1.0)
    heads = Heads(7, 5, rates)
    oracle = [nn.Linear(7, 5) for _ in rates]
    norm = nn.BatchNorm1d(7, affine=False)
    for linear in oracle:
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    optimizers = [
        torch.optim.SGD(linear.parameters(), lr=r, momentum=0.9) for linear, r in zip(oracle, rates, strict=True)
    ]
    for schedule in (1.0, 0.7, 0.2):
        heads.step(x, y, schedule)
        normalized = norm(x)
        for linear, optimizer, rate in zip(oracle, optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = schedule * rate
            optimizer.zero_grad()
            F.cross_entropy(linear(normalized), y).backward()
            optimizer.step()
    for h, linear in enumerate(oracle):
        torch.testing.assert_close(heads.weight[h, :, :-1], linear.weight.detach(), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(heads.weight[h, :, -1], linear.bias.detach(), atol=1e-6, rtol=1e-5)


def test_the_best_head_is_as_good_as_the_convex_optimum() -> None:
    (x, y), (q, truth) = blobs(3000, 6, 12, seed=1), blobs(1000, 6, 12, seed=2)
    probed = probe_heads({"a": x}, y, {"a": q}, truth)
    assert abs(probed.best.test - linear_probe(x, y, q, truth)) < 0.02
    assert probed.best.test > 0.6


def test_the_kind_that_tells_the_classes_is_chosen_on_held_out_images_alone() -> None:
    (x, y), (q, truth) = blobs(1000, 4, 8, seed=1, spread=0.5), blobs(200, 4, 8, seed=2, spread=0.5)
    noise = torch.randn(1000, 8, generator=Generator().manual_seed(3))
    probed = probe_heads({"noise": noise, "good": x}, y, {"noise": noise[:200], "good": q}, truth)
    assert probed.best.kind == "good"
    assert len(probed.heads) == 2 * len(RATES)
    assert probed.best.held_out == max(tried.held_out for tried in probed.heads)
    # Worthless test labels change no choice.
    again = probe_heads({"noise": noise, "good": x}, y, {"noise": noise[:200], "good": q}, truth.flip(0))
    assert (again.best.kind, again.best.rate) == (probed.best.kind, probed.best.rate)


def test_folding_the_batch_norm_changes_nothing() -> None:
    (x, y), (q, truth) = blobs(500, 3, 9, seed=1), blobs(100, 3, 9, seed=2)
    probed = probe_heads({"a": x}, y, {"a": q}, truth)
    assert probed.folding_error < 1e-5
    assert isinstance(probed.classifier, nn.Linear)
    right = (probed.classifier(q).argmax(dim=1) == truth).double().mean().item()
    assert right == pytest.approx(probed.best.test, abs=1 / 100)
    torch.testing.assert_close(probed.classifier(q).argmax(dim=1), probed.predicted)


def test_held_out_images_train_nothing() -> None:
    fit, held = split(1000, seed=0)
    assert len(held) == 1000 // HELD_OUT
    assert sorted([*fit.tolist(), *held.tolist()]) == list(range(1000))
    assert split(5, seed=0)[0].tolist() == split(5, seed=0)[1].tolist()  # too few to keep any back


def test_few_images_constant_channels_and_a_class_that_train_lacks() -> None:
    x, y = blobs(12, 2, 4, seed=1)
    x[:, 0] = 7.0
    probed = probe_heads({"a": x}, y, {"a": x[:3]}, torch.tensor([0, 1, 9]))
    assert 0 <= probed.best.test <= 2 / 3 + 1e-9
    assert torch.isfinite(probed.classifier.weight).all()


def test_progress_reaches_what_was_announced() -> None:
    x, y = blobs(700, 2, 3, seed=1)
    done: list[int] = []
    probe_heads({"a": x, "b": x}, y, {"a": x, "b": x}, y, done=done.append)
    assert sum(done) == steps_for(700, 2)
