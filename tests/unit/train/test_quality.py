import math

import numpy as np
import pytest
import torch
from torch import Generator, Tensor

from patchsight_train.quality import alignment, feature_std, rankme, uniformity


def unit(z: Tensor) -> np.ndarray:
    """Rows of length 1, in float64, by numpy."""
    rows = z.double().numpy()
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture(params=[(50, 8), (8, 50), (33, 33)], ids=str)
def z(request: pytest.FixtureRequest, generator: Generator) -> Tensor:
    """Anisotropic, off center: nothing about it is a special case."""
    N, D = request.param
    return torch.randn(N, D, generator=generator) * torch.linspace(0.1, 2, D) + torch.linspace(-1, 1, D)


def rotation(D: int, generator: Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(D, D, generator=generator, dtype=torch.float64)).Q


def test_rankme_is_equation_1(z: Tensor) -> None:
    sigma = np.linalg.svd(z.double().numpy(), compute_uv=False)
    p = [value / sum(abs(sigma)) + 1e-7 for value in sigma]
    assert len(p) == min(z.shape)
    assert rankme(z) == pytest.approx(math.exp(-sum(value * math.log(value) for value in p)), rel=1e-9)


def test_alignment_is_its_formula(z: Tensor, generator: Generator) -> None:
    other = z + torch.randn(z.shape, generator=generator)
    pairs = zip(unit(z), unit(other), strict=True)
    expected = np.mean([np.linalg.norm(x - y) ** 2 for x, y in pairs])
    assert alignment(z, other) == pytest.approx(expected, rel=1e-9)


def brute_force_uniformity(z: Tensor, t: float) -> float:
    rows = unit(z)
    pairs = [(rows[i], rows[j]) for i in range(len(rows)) for j in range(i)]
    return math.log(np.mean([math.exp(-t * np.linalg.norm(x - y) ** 2) for x, y in pairs]))


@pytest.mark.parametrize("t", [2.0, 0.5])
def test_uniformity_is_its_formula(z: Tensor, t: float) -> None:
    assert uniformity(z, t) == pytest.approx(brute_force_uniformity(z, t), rel=1e-9)


def test_uniformity_of_more_than_a_chunk(generator: Generator) -> None:
    z = torch.randn(1_500, 3, generator=generator, dtype=torch.float64)
    distances = torch.nn.functional.pdist(torch.nn.functional.normalize(z, dim=1))
    assert uniformity(z) == pytest.approx(float((-2 * distances**2).exp().mean().log()), rel=1e-9)


def test_feature_std_is_its_formula(z: Tensor) -> None:
    columns = unit(z).T
    deviations = [math.sqrt(np.mean((c - np.mean(c)) ** 2)) for c in columns]
    assert feature_std(z) == pytest.approx(math.sqrt(len(columns)) * np.mean(deviations), rel=1e-9)


def test_rotations_change_nothing_but_feature_std(z: Tensor, generator: Generator) -> None:
    Q = rotation(z.shape[1], generator)
    turned = z.double() @ Q
    assert rankme(turned) == pytest.approx(rankme(z), rel=1e-9)
    assert uniformity(turned) == pytest.approx(uniformity(z), rel=1e-9)
    assert alignment(turned, turned.flip(0)) == pytest.approx(alignment(z, z.flip(0)), rel=1e-9)


def test_scale_changes_nothing(z: Tensor) -> None:
    for measure in (rankme, uniformity, feature_std):
        assert measure(100 * z) == pytest.approx(measure(z), rel=1e-5)
    assert alignment(100 * z, z.flip(0)) == pytest.approx(alignment(z, z.flip(0)), rel=1e-5)


def test_orthogonal_directions_use_every_dimension() -> None:
    z = torch.eye(16).repeat(4, 1)
    assert rankme(z) == pytest.approx(16, rel=1e-4)
    assert rankme(z[:, :10]) == pytest.approx(10, rel=1e-4)
    others, same = 64 - 4, 4 - 1  # ‖x − y‖² is 2 to the others, 0 to an image's own copies
    assert uniformity(z) == pytest.approx(math.log((others * math.exp(-4) + same) / 63))
    assert feature_std(z) == pytest.approx(math.sqrt(1 - 1 / 16))


def test_gaussian_embeddings_are_healthy(generator: Generator) -> None:
    z = torch.randn(4_000, 64, generator=generator)
    assert feature_std(z) == pytest.approx(1, abs=0.01)
    assert rankme(z) > 63
    # E exp(−t ‖x − y‖²) with x·y near N(0, 1/D): exp(−2t + 8/D) at t = 2.
    assert uniformity(z) == pytest.approx(-4 + 8 / 64, abs=0.01)


def test_one_point_is_collapse() -> None:
    z = torch.linspace(0.5, 2, 24).expand(100, -1)
    assert rankme(z) == pytest.approx(1, abs=1e-3)
    assert uniformity(z) == pytest.approx(0, abs=1e-12)
    assert feature_std(z) == pytest.approx(0, abs=1e-7)
    assert alignment(z, 3 * z) == pytest.approx(0, abs=1e-12)
    assert alignment(z, -z) == pytest.approx(4)


def test_a_shared_direction_lowers_the_rank(generator: Generator) -> None:
    z = torch.randn(400, 32, generator=generator)
    assert 1 < rankme(z + 30) < 0.5 * rankme(z)


def test_zero_and_non_finite_embeddings_end_nothing(generator: Generator) -> None:
    zero = torch.zeros(10, 4)
    assert (rankme(zero), uniformity(zero), feature_std(zero), alignment(zero, zero)) == (0, 0, 0, 0)
    bad = torch.randn(10, 4, generator=generator)
    bad[3, 2] = math.inf
    found = (rankme(bad), uniformity(bad), feature_std(bad), alignment(bad, zero))
    assert all(math.isnan(value) for value in found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_half_precision_is_widened_first(dtype: torch.dtype, generator: Generator) -> None:
    z = torch.randn(60, 8, generator=generator).to(dtype)
    for measure in (rankme, uniformity, feature_std):
        assert measure(z) == measure(z.double())
