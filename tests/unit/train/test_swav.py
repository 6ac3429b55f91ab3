import math
from collections.abc import Callable
from typing import cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightly.loss import swav_loss
from lightly.models.modules import SwaVPrototypes
from torch import Generator, Tensor, nn

from patchsight_train import swav as swav_module
from patchsight_train.data import Images
from patchsight_train.objective import Objective, When
from patchsight_train.swav import SwAV, sinkhorn

Learn = Callable[..., tuple[Objective, list[dict[str, float]]]]
Backward = Callable[..., dict[str, Tensor]]
Views = Callable[..., list[Tensor]]


def cosines(B: int, K: int, generator: Generator) -> Tensor:
    z, C = (F.normalize(torch.randn(n, 8, generator=generator), dim=1) for n in (B, K))
    return z @ C.T


def plain_sinkhorn(scores: np.ndarray, eps: float, niters: int) -> np.ndarray:
    """The pseudocode of the paper's App. A, line by line, in float64."""
    Q = np.exp(scores.astype(np.float64) / eps).T
    Q /= Q.sum()
    K, B = Q.shape
    r, c = np.ones(K) / K, np.ones(B) / B
    for _ in range(niters):
        u = Q.sum(axis=1)
        Q *= (r / u)[:, None]
        Q *= (c / Q.sum(axis=0))[None, :]
    return (Q / Q.sum(axis=0, keepdims=True)).T  # type: ignore[no-any-return]


@pytest.mark.parametrize(("B", "K"), [(1, 5), (12, 5), (5, 12), (64, 32)])
@pytest.mark.parametrize("epsilon", [0.05, 0.2, 1.0])
@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_codes_are_those_of_the_paper_and_of_lightly(
    B: int, K: int, epsilon: float, iterations: int, generator: Generator
) -> None:
    scores = cosines(B, K, generator)
    found = sinkhorn(scores, epsilon, iterations)
    expected = plain_sinkhorn(scores.numpy(), epsilon, iterations)
    torch.testing.assert_close(found.double(), torch.from_numpy(expected), atol=1e-5, rtol=1e-4)
    theirs = swav_loss.sinkhorn(scores, iterations, epsilon)
    torch.testing.assert_close(found, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("B", "K"), [(40, 8), (24, 24), (8, 40)])
def test_once_converged_images_and_prototypes_have_equal_shares(B: int, K: int, generator: Generator) -> None:
    """The transportation polytope of Eq. 4: after 3 iterations the images' part is exact, the other nearly so."""
    scores = cosines(B, K, generator)

    def unevenness(q: Tensor) -> float:
        torch.testing.assert_close(q.sum(dim=1), torch.ones(B), atol=1e-5, rtol=0)
        return (q.sum(dim=0) * K / B - 1).abs().max().item()

    softmax = unevenness((scores / 0.05).softmax(dim=1))
    three, converged = (unevenness(sinkhorn(scores, 0.05, iterations)) for iterations in (3, 300))
    assert converged < 1e-4 < three < softmax / 2
    assert softmax > 0.7


def test_converged_codes_are_the_optimum_of_eq_3(generator: Generator) -> None:
    """No other assignment with equal shares gives more of Tr(Qᵀ CᵀZ) + ε H(Q)."""
    B, K, epsilon = 6, 4, 0.3
    scores = cosines(B, K, generator).double()
    Q = sinkhorn(scores, epsilon, 500) / B  # of mass 1, as the paper's

    def value(Q: Tensor) -> float:
        return float((Q * scores).sum() - epsilon * torch.special.xlogy(Q, Q).sum())

    for _ in range(50):
        step = torch.randn(B, K, generator=generator, dtype=torch.float64)
        step = step - step.mean(dim=0) - step.mean(dim=1, keepdim=True) + step.mean()  # keeps all sums
        step *= 0.1 * Q.min() / step.abs().max()
        assert (Q + step).min() > 0
        assert value(Q + step) < value(Q)


def test_codes_of_the_smallest_epsilon_do_not_overflow(generator: Generator) -> None:
    scores = cosines(16, 8, generator)
    found = sinkhorn(scores, 0.002, 3)  # exp(1 / 0.002) is no float
    assert found.isfinite().all()
    expected = plain_sinkhorn(scores.numpy() - scores.max().item(), 0.002, 3)
    torch.testing.assert_close(found.double(), torch.from_numpy(expected), atol=1e-3, rtol=0)


def test_equal_scores_have_flat_codes() -> None:
    assert torch.allclose(sinkhorn(torch.full((6, 10), 0.7), 0.05, 3), torch.full((6, 10), 0.1))


def scores_of(swav: SwAV, views: list[Tensor]) -> list[Tensor]:
    """Cosines of each view's projections and the prototypes; less the mean of the global views' CLS tokens."""
    tokens = [swav.encoder(x)[:, 0] for x in views]
    center = torch.cat(tokens[:2]).detach().mean(dim=0)
    return [F.normalize(swav.head(h - center), dim=1) @ swav.prototypes.T for h in tokens]


@pytest.fixture
def swav(objective: Callable[..., Objective]) -> SwAV:
    return cast(SwAV, objective("swav", local_crops=3))


def test_loss_and_gradient_are_those_of_lightly(swav: SwAV, views: Views, backward: Backward) -> None:
    seen = views(swav)
    scores = scores_of(swav, seen)
    expected = swav_loss.SwaVLoss()(scores[:2], scores[2:]).squeeze()
    expected.backward()
    theirs = {name: p.grad.clone() for name, p in swav.named_parameters() if p.grad is not None}
    swav.zero_grad()
    found = backward(swav, seen)
    torch.testing.assert_close(found["loss"], expected.detach(), atol=1e-5, rtol=1e-5)
    assert theirs.keys() == {name for name, _ in swav.named_parameters()}
    for name, p in swav.named_parameters():
        torch.testing.assert_close(p.grad, theirs[name], atol=1e-6, rtol=1e-4)


def test_a_step_is_that_of_the_papers_pseudocode(swav: SwAV, views: Views, backward: Backward) -> None:
    """App. A: two views, codes by plain Sinkhorn, swapped prediction, SGD, prototypes back on the sphere."""
    x_t, x_s = seen = views(swav)[:2]
    C = swav.prototypes.detach().clone().requires_grad_()
    h = swav.encoder(torch.cat([x_t, x_s]))[:, 0]
    z = F.normalize(swav.head(h - h.detach().mean(dim=0)), dim=1)
    scores_t, scores_s = (z @ C.T).chunk(2)
    q_t, q_s = (
        torch.from_numpy(plain_sinkhorn(s.detach().numpy(), 0.05, 3)).float() for s in (scores_t, scores_s)
    )  # fmt: skip
    p_t, p_s = (torch.softmax(s / 0.1, dim=1) for s in (scores_t, scores_s))
    loss = -0.5 * torch.mean((q_t * torch.log(p_s) + q_s * torch.log(p_t)).sum(dim=1))
    (slope,) = torch.autograd.grad(loss, C)
    expected = F.normalize(C.detach() - 0.1 * slope, dim=1)

    found = backward(swav, seen)
    torch.optim.SGD(swav.parameters(), lr=0.1).step()
    swav.after_update(When(1.0, 0.5))
    torch.testing.assert_close(found["loss"], loss.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(swav.prototypes.detach(), expected, atol=1e-6, rtol=0)


def test_prototypes_have_length_one(learn: Learn, random_pixels: Tensor, swav: SwAV) -> None:
    torch.testing.assert_close(swav.prototypes.norm(dim=1), torch.ones(32), atol=1e-6, rtol=0)
    trained = cast(SwAV, learn("swav", random_pixels, 3, lr=0.05, warmup_epochs=0, freeze_prototypes_epochs=0)[0])
    assert not torch.equal(trained.prototypes, swav.prototypes)
    torch.testing.assert_close(trained.prototypes.norm(dim=1), torch.ones(32), atol=1e-6, rtol=0)


def test_prototypes_are_normalized_as_in_lightly(swav: SwAV) -> None:
    theirs = SwaVPrototypes(16, 32)
    with torch.no_grad():
        swav.prototypes.mul_(torch.rand(32, 1) + 0.5)
        theirs.heads[0].weight.copy_(swav.prototypes)
    swav.normalize_prototypes()
    theirs.normalize()
    torch.testing.assert_close(swav.prototypes, theirs.heads[0].weight, atol=1e-6, rtol=0)


@pytest.mark.parametrize("epochs", [0, 1, 2])
def test_prototypes_are_frozen_at_first(epochs: int, learn: Learn, random_pixels: Tensor) -> None:
    per_epoch = 2  # 20 images, 8 a step

    def after(steps: int) -> SwAV:
        found, _ = learn("swav", random_pixels, steps, warmup_epochs=0, freeze_prototypes_epochs=epochs)
        return cast(SwAV, found)

    start, frozen, free = after(0), after(epochs * per_epoch), after(epochs * per_epoch + 1)
    torch.testing.assert_close(frozen.prototypes, start.prototypes, atol=1e-6, rtol=0)
    assert (free.prototypes - start.prototypes).abs().max() > 1e-4
    assert not torch.equal(free.head[0].weight, start.head[0].weight)


def test_no_gradient_flows_through_the_codes(swav: SwAV, generator: Generator) -> None:
    h = torch.randn(40, 16, generator=generator, requires_grad=True)
    codes, _ = swav.codes(h, h.mean(dim=0))
    assert [q.shape for q in codes] == [(20, 32)] * 2
    for q in codes:
        assert not q.requires_grad
        torch.testing.assert_close(q.sum(dim=1), torch.ones(20), atol=1e-5, rtol=0)


def test_scores_are_cosines_in_float32(swav: SwAV, generator: Generator) -> None:
    h = torch.randn(40, 16, generator=generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = swav.scores(h.bfloat16(), h.mean(dim=0))
    assert scores.dtype == torch.float32
    assert (scores.abs() <= 1 + 1e-5).all()
    assert len(scores.unique()) > 0.9 * scores.numel()  # bf16 has but 256 values an octave


def test_what_all_pictures_have_in_common_plays_no_part(swav: SwAV, generator: Generator) -> None:
    h, common = torch.randn(40, 16, generator=generator), 3 * torch.randn(16, generator=generator)
    torch.testing.assert_close(
        swav.scores(h + common, (h + common).mean(dim=0)), swav.scores(h, h.mean(dim=0)), atol=1e-5, rtol=0
    )


def test_one_forward_for_codes_and_prediction_unless_micro_batches_ask_for_two(
    swav: SwAV, views: Views, backward: Backward
) -> None:
    seen = views(swav)
    pictures: list[int] = []
    swav.encoder.register_forward_pre_hook(lambda _, inputs: pictures.append(len(inputs[0])))
    for micro_batch, seen_in_all in ((None, 40 + 60), (20, 40 + 60), (8, 40 + 40 + 60)):
        swav.micro_batch = micro_batch
        pictures.clear()
        backward(swav, seen)
        assert sum(pictures) == seen_in_all


def test_when_all_is_one_point_the_loss_is_the_logarithm_of_k(swav: SwAV, views: Views, backward: Backward) -> None:
    """The sign of collapse: every picture scores alike, so the codes are flat and so is the best prediction."""
    with torch.no_grad():
        last = swav.head[-1]
        assert isinstance(last, nn.Linear)
        last.weight.zero_()
        last.bias.zero_()
        last.bias[0] = 1.0
        swav.prototypes.zero_()  # as far from this point as from any
    found = backward(swav, views(swav))
    for name in ("loss", "code_entropy", "code_mean_entropy"):
        assert found[name].item() == pytest.approx(math.log(32), abs=1e-4)


def test_entropies_are_those_of_the_codes(swav: SwAV, generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = cosines(30, 10, generator)
    monkeypatch.setattr(swav, "scores", lambda *_: scores)
    _, metrics = swav.codes(torch.zeros(30, 16), torch.zeros(16))
    q = np.concatenate([plain_sinkhorn(s.numpy(), 0.05, 3) for s in scores.chunk(2)])
    mean = q.mean(axis=0)
    assert metrics["code_entropy"].item() == pytest.approx(-(q * np.log(q)).sum(axis=1).mean(), abs=1e-4)
    assert metrics["code_mean_entropy"].item() == pytest.approx(-(mean * np.log(mean)).sum(), abs=1e-4)


@pytest.mark.parametrize("equal_shares", [True, False])
def test_equal_shares_keep_real_photos_apart(
    equal_shares: bool,
    learn: Learn,
    photos: Images,
    views: Views,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A prediction that is the same for all pictures costs ln K at least, as codes have equal shares: so less than that
    is information about the picture. With codes that are a mere softmax it does collapse, so this can fail."""
    if not equal_shares:
        monkeypatch.setattr(swav_module, "sinkhorn", lambda scores, epsilon, _: (scores / epsilon).softmax(dim=1))
    found, _ = learn(
        "swav", photos.pixels, 30, patch_size=8, width=48, heads=3, depth=2, prototypes=32, projection_hidden=128,
        projection_width=32, batch_size=100, epochs=15, lr=2e-3,
    )  # fmt: skip
    swav = cast(SwAV, found)
    monkeypatch.undo()
    seen = views(swav, 9, photos.pixels)
    with torch.no_grad():
        loss = sum(values["loss"].item() for _, values in swav.parts(seen, When(1.0, 0.5)))
        used = len(scores_of(swav, seen)[0].argmax(dim=1).unique())
    if equal_shares:
        assert loss < math.log(32) - 0.05
        assert used > 10
    else:
        assert loss > math.log(32)
        assert used < 5
