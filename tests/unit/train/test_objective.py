"""What every objective promises the loop."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Generator, Tensor, nn

from patchsight_train.objective import Metrics, Objective, When

NAMES = ["autoencoder", "skip_autoencoder", "mae", "simclr", "dino", "swav"]
Make = Callable[..., Objective]
Views = Callable[..., list[Tensor]]
Backward = Callable[..., dict[str, Tensor]]


def stirred(objective: Objective) -> Objective:
    """At the start all CLS tokens are nearly one, and batch norm would blow their rounding up."""
    generator = Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in objective.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return objective


def gradients(objective: Objective) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("micro_batch", [1, 3, 20, 50])
def test_micro_batches_change_neither_loss_nor_gradients(
    name: str, micro_batch: int, objective: Make, views: Views, backward: Backward
) -> None:
    model = stirred(objective(name))
    seen = views(model)
    whole = backward(model, seen)
    expected = gradients(model)
    model.zero_grad()
    model.micro_batch = micro_batch
    found = backward(model, seen)
    assert found.keys() == whole.keys()
    for metric, value in whole.items():
        torch.testing.assert_close(found[metric], value, atol=1e-5, rtol=1e-5, msg=lambda m, n=metric: f"{n}: {m}")
    assert gradients(model).keys() == expected.keys()
    for parameter, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[parameter], atol=5e-6, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_all_randomness_is_in_the_views(name: str, objective: Make, views: Views, backward: Backward) -> None:
    model = objective(name)
    first, again, other = views(model, 1), views(model, 1), views(model, 2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert {len(view) for view in first} == {20}
    before = torch.get_rng_state()
    losses = [backward(model, first)["loss"] for _ in range(2)]
    assert torch.equal(*losses)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_is_a_finite_float32_also_in_half_precision(
    name: str, objective: Make, views: Views, backward: Backward
) -> None:
    model = objective(name)
    seen = views(model)
    exact = backward(model, seen)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = backward(model, seen)
    for found in (exact, half):
        assert found["loss"].dtype == torch.float32
        assert all(value.ndim == 0 and not value.requires_grad for value in found.values())
    torch.testing.assert_close(half["loss"], exact["loss"], atol=0, rtol=0.05)
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("micro_batch", [None, 3])
def test_gradients_of_half_precision_are_those_of_full(
    name: str, micro_batch: int | None, objective: Make, views: Views, backward: Backward
) -> None:
    """Of every parameter, nearly: what runs without a graph first must not take the graph from what follows."""
    model = stirred(objective(name))
    model.micro_batch = micro_batch
    seen = views(model)
    backward(model, seen)
    exact = gradients(model)
    model.zero_grad()
    for part, _ in in_half_precision(model.parts(seen, When(1.0, 0.5))):
        part.backward()  # type: ignore[no-untyped-call]
    half = gradients(model)
    assert half.keys() == exact.keys()
    largest = max(gradient.norm().item() for gradient in exact.values())
    for parameter, gradient in exact.items():
        if gradient.norm() > 1e-2 * largest:
            assert torch.cosine_similarity(half[parameter].flatten(), gradient.flatten(), dim=0) > 0.95, parameter


def in_half_precision(parts: Iterator[tuple[Tensor, Metrics]]) -> Iterator[tuple[Tensor, Metrics]]:
    """As the loop does: each part is computed under autocast, and what runs between them is not."""
    while True:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            part = next(parts, None)
        if part is None:
            return
        yield part


@pytest.mark.parametrize("name", NAMES)
def test_everything_that_is_trained_has_a_gradient(
    name: str, objective: Make, views: Views, backward: Backward
) -> None:
    """A parameter without one on some ranks would stop all of them; one that never has any is a mistake."""
    model = objective(name)
    backward(model, views(model))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = gradients(model)
    assert found.keys() == trained
    assert {name for name, gradient in found.items() if not (gradient != 0).any()} == set()


@pytest.mark.parametrize("name", NAMES)
def test_the_kept_encoder_is_of_the_settings_and_pools(name: str, objective: Make) -> None:
    model = objective(name)
    assert model.kept is model.get_submodule(type(model).encoder_name)
    assert model.kept.config.image_size == 16
    x = torch.randn(2, 3, 16, 16)
    assert model.kept.pooled(x, model.pooling).shape == (2, 16)


@pytest.mark.parametrize("name", ["mae", "autoencoder", "skip_autoencoder"])
def test_decoders_show_what_they_see(name: str, objective: Make, views: Views) -> None:
    model = objective(name)
    seen = views(model)
    pictures = model.reconstruct(seen)
    assert pictures is not None
    assert pictures.shape == seen[0].shape
    assert pictures.min() >= 0
    assert pictures.max() <= 1


@pytest.mark.parametrize("name", ["simclr", "dino", "swav"])
def test_others_have_nothing_to_show(name: str, objective: Make, views: Views) -> None:
    model = objective(name)
    assert model.reconstruct(views(model)) is None


class Mean(Objective):
    """The smallest objective: the mean of its views, times a parameter."""

    encoder_name = "encoder"

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def loss(self, views: list[Tensor]) -> tuple[Tensor, Metrics]:
        return self.scale * views[0].mean(), {"largest": views[0].mean() + views[1].mean()}


@pytest.mark.parametrize("micro_batch", [None, 1, 4, 7])
def test_parts_are_weighted_by_their_images(micro_batch: int | None) -> None:
    model = Mean()
    model.micro_batch = micro_batch
    views = [torch.arange(7.0), 10 * torch.arange(7.0)]
    parts = list(model.parts(views, When(0.0, 0.0)))
    assert len(parts) == -(-7 // (micro_batch or 7))
    assert sum(part.item() for part, _ in parts) == pytest.approx(6.0)
    assert sum(values["loss"].item() for _, values in parts) == pytest.approx(6.0)
    assert sum(values["largest"].item() for _, values in parts) == pytest.approx(33.0)
