import math

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Generator, Tensor

from patchsight_train.linear import linear_probe, logistic_regression


def clustered(N: int, generator: Generator, D: int = 12, classes: int = 5) -> tuple[Tensor, Tensor]:
    """Overlapping classes in channels that differ in scale by 100 and depend on each other."""
    labels = torch.randint(0, classes, (N,), generator=generator)
    centers = 4 * torch.randn(classes, D, generator=Generator().manual_seed(1)) / D**0.5
    mixing = torch.randn(D, D, generator=Generator().manual_seed(2)) * torch.logspace(-1, 1, D)
    return (centers[labels] + torch.randn(N, D, generator=generator)) @ mixing + 3, labels


def sklearn_fit(x: Tensor, y: Tensor, penalty: float) -> LogisticRegression:
    """Its C weighs the sum of the losses against ‖W‖² / 2."""
    return LogisticRegression(C=1 / (penalty * len(x)), tol=1e-10, max_iter=10_000).fit(x.numpy(), y.numpy())


@pytest.mark.parametrize("penalty", [1e-1, 1e-3, 1e-4])
def test_weights_are_those_of_scikit_learn(penalty: float, generator: Generator) -> None:
    x, y = clustered(600, generator)
    x = x.double()
    x = (x - x.mean(dim=0)) / x.std(dim=0)
    W, b = logistic_regression(x, y, 5, penalty, tolerance=1e-8)
    expected = sklearn_fit(x, y, penalty)
    size = abs(expected.coef_).max()
    torch.testing.assert_close(W, torch.from_numpy(expected.coef_), rtol=0, atol=1e-4 * size)
    intercept = torch.from_numpy(expected.intercept_)  # free but for a constant, which changes no probability
    torch.testing.assert_close(b - b.mean(), intercept - intercept.mean(), rtol=0, atol=1e-4 * size)


def test_the_weights_are_the_minimum(generator: Generator) -> None:
    """The gradient of the penalized loss is zero there, by hand: (softmax − one-hot)ᵀ x / N + penalty · W."""
    x, y = clustered(300, generator, D=7, classes=3)
    x = (x.double() - x.double().mean(dim=0)) / x.double().std(dim=0)
    W, b = logistic_regression(x, y, 3, 1e-3, tolerance=1e-8)
    residual = (x @ W.T + b).softmax(dim=1) - torch.eye(3, dtype=torch.float64)[y]
    assert (residual.T @ x / 300 + 1e-3 * W).abs().max() < 1e-6
    assert residual.mean(dim=0).abs().max() < 1e-6


@pytest.mark.parametrize(("N", "D"), [(400, 12), (40, 64)], ids=["many images", "many channels"])
def test_accuracy_is_that_of_scikit_learn(N: int, D: int, generator: Generator) -> None:
    gallery, labels = clustered(N, generator, D=D)
    queries, truth = clustered(500, generator, D=D)
    scaler = StandardScaler().fit(gallery.double().numpy())
    scaled = [torch.from_numpy(scaler.transform(x.double().numpy())) for x in (gallery, queries)]
    predicted = sklearn_fit(scaled[0], labels, 1 / N).predict(scaled[1].numpy())
    expected = (torch.from_numpy(predicted) == truth).double().mean().item()
    assert linear_probe(gallery, labels, queries, truth) == pytest.approx(expected, abs=0.004)  # two of 500
    assert 0.3 < expected < 0.95


def test_shift_and_scale_of_channels_change_nothing(generator: Generator) -> None:
    (gallery, labels), (queries, truth) = clustered(200, generator), clustered(300, generator)
    gallery, queries = gallery.double(), queries.double()
    scale, shift = torch.logspace(-1, 1, 12, dtype=torch.float64), torch.linspace(-9, 9, 12, dtype=torch.float64)
    moved = linear_probe(gallery * scale + shift, labels, queries * scale + shift, truth)
    assert moved == linear_probe(gallery, labels, queries, truth)


def test_numbers_of_classes_may_have_gaps(generator: Generator) -> None:
    (gallery, labels), (queries, truth) = clustered(200, generator), clustered(300, generator)
    expected = linear_probe(gallery, labels, queries, truth)
    assert linear_probe(gallery, 7 * labels + 2, queries, 7 * truth + 2) == expected
    unknown = torch.where(torch.arange(300) < 150, 99, truth)  # a class that the gallery does not have
    later = linear_probe(gallery, labels, queries[150:], truth[150:])
    assert linear_probe(gallery, labels, queries, unknown) == pytest.approx(later / 2)


def test_separable_classes_are_separated(generator: Generator) -> None:
    labels = torch.arange(90) % 3
    x = 10 * torch.eye(3)[labels] + torch.randn(90, 3, generator=generator)
    assert linear_probe(x[:60], labels[:60], x[60:], labels[60:]) == 1


def test_collapsed_features_find_the_largest_class(generator: Generator) -> None:
    labels = (torch.arange(100) % 10 < 4).long()  # 40 % are of class 1
    constant = 0.3 + 3e-8 * torch.randn(100, 32, generator=generator)  # the last bit
    assert constant.unique().numel() > 1
    for features in (constant, torch.zeros(100, 32)):
        assert linear_probe(features, labels, features, labels) == pytest.approx(0.6)
    one_class = torch.full((100,), 4)
    assert linear_probe(constant, one_class, constant, one_class) == 1


@pytest.mark.parametrize("which", ["gallery", "queries"])
def test_features_that_are_not_finite_give_nan(which: str, generator: Generator) -> None:
    (gallery, labels), (queries, truth) = clustered(20, generator), clustered(20, generator)
    {"gallery": gallery, "queries": queries}[which][4, 2] = math.inf
    assert math.isnan(linear_probe(gallery, labels, queries, truth))


def test_it_is_deterministic_and_leaves_the_random_state_alone(generator: Generator) -> None:
    x, y = clustered(300, generator)
    before = torch.get_rng_state()
    with torch.no_grad():  # as evaluation calls it
        first, second = (logistic_regression(x.double() - 3, y, 5, 1e-3)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert not first.requires_grad
    assert torch.equal(torch.get_rng_state(), before)
