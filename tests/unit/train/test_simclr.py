import math
from collections.abc import Callable

import pytest
import torch
from lightly.loss import NTXentLoss
from torch import Generator, Tensor, nn

from patchsight_train.data import Images
from patchsight_train.objective import Objective, When
from patchsight_train.simclr import SimCLR, nt_xent, projection_head


def algorithm_1(z: Tensor, temperature: float) -> Tensor:
    """NT-Xent by the loops of the paper's Algorithm 1, whose views of image k are 2k − 1 and 2k."""
    N = len(z) // 2
    z = torch.stack([z[i + view * N] for i in range(N) for view in range(2)])
    s = [[z[i] @ z[j] / (z[i].norm() * z[j].norm()) for j in range(2 * N)] for i in range(2 * N)]

    def ell(i: int, j: int) -> Tensor:
        others = [torch.exp(s[i][k] / temperature) for k in range(2 * N) if k != i]
        return -torch.log(torch.exp(s[i][j] / temperature) / torch.stack(others).sum())

    total = torch.zeros((), dtype=z.dtype)
    for k in range(N):
        total = total + ell(2 * k, 2 * k + 1) + ell(2 * k + 1, 2 * k)
    return total / (2 * N)


@pytest.mark.parametrize("B", [1, 2, 5, 9])
@pytest.mark.parametrize("Z", [2, 16])
@pytest.mark.parametrize("temperature", [0.07, 0.2, 1.0])
def test_loss_and_gradient_are_those_of_algorithm_1(B: int, Z: int, temperature: float, generator: Generator) -> None:
    z = 3 * torch.randn(2 * B, Z, generator=generator)
    ours, slow = z.clone().requires_grad_(), z.double().requires_grad_()
    loss, expected = nt_xent(ours, temperature)[0], algorithm_1(slow, temperature)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.grad, slow.grad.float(), atol=1e-5, rtol=1e-4)  # type: ignore[union-attr]


@pytest.mark.parametrize("B", [2, 9, 64])
@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_loss_and_gradient_are_those_of_lightly(B: int, temperature: float, generator: Generator) -> None:
    z = torch.randn(2 * B, 16, generator=generator)
    ours, theirs = z.clone().requires_grad_(), z.clone().requires_grad_()
    loss, expected = nt_xent(ours, temperature)[0], NTXentLoss(temperature)(*theirs.chunk(2))
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("B", [2, 8, 100])
def test_equal_vectors_cost_the_logarithm_of_the_others(B: int) -> None:
    loss, _ = nt_xent(torch.ones(2 * B, 4), 0.2)
    assert loss.item() == pytest.approx(math.log(2 * B - 1), abs=1e-5)


def test_order_of_the_images_and_of_the_views_plays_no_part(generator: Generator) -> None:
    z = torch.randn(16, 8, generator=generator)
    order = torch.randperm(8, generator=generator)
    loss, accuracy = nt_xent(z, 0.2)
    for other in (torch.cat([z[:8][order], z[8:][order]]), torch.cat([z[8:], z[:8]])):
        torch.testing.assert_close(nt_xent(other, 0.2)[0], loss)
        assert nt_xent(other, 0.2)[1] == accuracy
    assert not torch.isclose(nt_xent(torch.cat([z[:8][order], z[8:]]), 0.2)[0], loss)  # pairs torn apart


def test_accuracy_is_the_share_of_rows_nearest_to_their_pair(generator: Generator) -> None:
    z = torch.randn(40, 3, generator=generator)
    z[20:] = z[:20] + 0.3 * torch.randn(20, 3, generator=generator)
    hits = 0
    for i in range(40):
        cosine = [float(z[i] @ z[j] / (z[i].norm() * z[j].norm())) if j != i else -2.0 for j in range(40)]
        hits += cosine.index(max(cosine)) == (i + 20) % 40
    assert 0 < hits < 40
    assert nt_xent(z, 0.2)[1].item() == pytest.approx(hits / 40)


def test_half_precision_is_computed_in_float32(generator: Generator) -> None:
    z = (200 * torch.randn(12, 8, generator=generator)).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = nt_xent(z, 0.1)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, nt_xent(z.float(), 0.1)[0], atol=0, rtol=0)


def test_both_views_of_a_picture_are_a_pair(
    objective: Callable[..., Objective], random_pixels: Tensor, views: Callable[..., list[Tensor]]
) -> None:
    simclr = objective("simclr")
    first, second = views(simclr)
    assert first.shape == second.shape == random_pixels.shape
    assert (first - second).abs().flatten(1).amax(dim=1).min() > 0.1
    assert simclr.loss([first, first])[0] < simclr.loss([first, second.flip(0)])[0]


def test_the_head_of_each_depth() -> None:
    """Linear maps without bias, batch norm after each (the last without scale and shift), ReLU between."""
    assert [type(layer) for layer in projection_head(8, 16, 4, 2)] == [
        nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear, nn.BatchNorm1d,
    ]  # fmt: skip
    three = projection_head(8, 16, 4, 3)
    assert [layer.weight.shape for layer in three if isinstance(layer, nn.Linear)] == [(16, 8), (16, 16), (4, 16)]
    z = three(torch.randn(64, 8))
    torch.testing.assert_close(z.mean(dim=0), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(z.var(dim=0, correction=0), torch.ones(4), atol=1e-2, rtol=0)


def test_a_step_is_algorithm_1(objective: Callable[..., Objective], views: Callable[..., list[Tensor]]) -> None:
    """From the views through encoder and head to the loss, and what the parts give of it."""
    simclr = objective("simclr", temperature=0.5)
    assert isinstance(simclr, SimCLR)
    seen = views(simclr)
    h = simclr.encoder(torch.cat(seen))[:, 0]
    expected = algorithm_1(simclr.head(h), 0.5)
    ((loss, metrics),) = simclr.parts(seen, When(0.0, 0.0))
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    assert metrics.keys() == {"loss", "contrastive_accuracy"}


def test_gradient_caching_keeps_the_graph_of_one_micro_batch(
    objective: Callable[..., Objective], views: Callable[..., list[Tensor]], backward: Callable[..., dict[str, Tensor]]
) -> None:
    simclr = objective("simclr")
    simclr.micro_batch = 8
    seen: list[tuple[int, bool]] = []
    simclr.get_submodule("encoder").register_forward_hook(
        lambda _, inputs, tokens: seen.append((len(inputs[0]), tokens.requires_grad))
    )
    backward(simclr, views(simclr))
    assert seen == [(8, False)] * 5 + [(8, True)] * 5


def test_learns_from_real_photos(
    learn: Callable[..., tuple[Objective, list[dict[str, float]]]], photos: Images,
    views: Callable[..., list[Tensor]],
) -> None:  # fmt: skip
    def judge(steps: int) -> tuple[float, float]:
        simclr, _ = learn(
            "simclr", photos.pixels, steps, patch_size=8, width=48, depth=2, epochs=15, batch_size=100, lr=2e-3,
            projection_hidden=256, projection_width=64, crop_scale=(0.3, 1.0), color_strength=0.3,
        )  # fmt: skip
        with torch.no_grad():
            loss, extra = simclr.loss(views(simclr, 9, photos.pixels))
        return loss.item(), extra["contrastive_accuracy"].item()

    (loss, accuracy), (trained_loss, trained_accuracy) = judge(0), judge(30)
    assert trained_loss < loss - 0.5
    assert trained_accuracy > accuracy + 0.03
    assert trained_accuracy > 20 / 399  # twenty times chance
