"""TwoNN against its paper, step by step, and on shapes whose dimension is known."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from patchsight_train.judge import dimension
from patchsight_train.judge.dimension import intrinsic_dimension


def embedded(x: Tensor, D: int, generator: Generator) -> Tensor:
    """Points `(N, d)` turned into D dimensions, and moved away from 0."""
    turn = torch.linalg.qr(torch.randn(D, D, generator=generator, dtype=torch.float64)).Q
    return F.pad(x.double(), (0, D - x.shape[1])) @ turn + 3


def cube(N: int, d: int, generator: Generator) -> Tensor:
    return torch.rand(N, d, generator=generator)


def sphere(N: int, d: int, generator: Generator) -> Tensor:
    """The surface, of dimension d, of a ball in d + 1 dimensions."""
    return F.normalize(torch.randn(N, d + 1, generator=generator), dim=1)


def slow_two_nn(points: np.ndarray) -> float:
    """Section "Methods" of arXiv:1803.06992, literally."""
    N = len(points)
    mu = []
    for i in range(N):
        distances = sorted(math.dist(points[i], points[j]) for j in range(N) if j != i)
        mu.append(distances[1] / distances[0])
    pairs = [(math.log(m), -math.log(1 - (i + 1) / N)) for i, m in enumerate(sorted(mu)) if i < math.floor(0.9 * N)]
    slope, *_ = np.linalg.lstsq(np.array([[x] for x, _ in pairs]), np.array([y for _, y in pairs]), rcond=None)
    return float(slope[0])


@pytest.mark.parametrize(("N", "D"), [(10, 2), (57, 3), (120, 40)])
def test_it_is_the_papers(N: int, D: int, generator: Generator) -> None:
    z = torch.randn(N, D, generator=generator)
    assert intrinsic_dimension(z) == pytest.approx(slow_two_nn(z.double().numpy()), rel=1e-9)


@pytest.mark.parametrize("shape", [cube, sphere])
@pytest.mark.parametrize(("d", "tolerance"), [(1, 0.05), (2, 0.05), (4, 0.07), (8, 0.15)])
def test_known_shapes_in_more_dimensions(shape, d: int, tolerance: float, generator: Generator) -> None:  # type: ignore[no-untyped-def]
    z = embedded(shape(4000, d, generator), 24, generator)
    assert intrinsic_dimension(z) == pytest.approx(d, rel=tolerance)


def test_a_curved_line_has_one_dimension() -> None:
    t = torch.rand(1000, generator=Generator().manual_seed(1), dtype=torch.float64)[:, None]
    z = torch.cat([(k * t).sin() for k in range(1, 13)], dim=1)
    assert intrinsic_dimension(z) == pytest.approx(1, rel=0.1)


def test_duplicates_are_left_out(generator: Generator) -> None:
    z = torch.randn(300, 5, generator=generator)
    twice = torch.cat([z, z[:200], z[:50]])
    assert intrinsic_dimension(twice) == intrinsic_dimension(z)


def test_neither_order_nor_place_nor_size_counts(generator: Generator) -> None:
    z = torch.randn(700, 6, generator=generator, dtype=torch.float64)  # more than one chunk of rows
    found = intrinsic_dimension(z)
    assert intrinsic_dimension(z[torch.randperm(700, generator=generator)]) == pytest.approx(found, rel=1e-9)
    assert intrinsic_dimension(1e-7 * z + 5) == pytest.approx(found, rel=1e-5)  # a mean far larger than the distances


def test_of_many_a_fixed_sample_is_taken(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dimension, "MOST", 500)
    z = torch.rand(2000, 2, generator=generator)
    assert intrinsic_dimension(z) == intrinsic_dimension(z) == pytest.approx(2, rel=0.2)


def test_too_few_and_not_finite_points_have_none(generator: Generator) -> None:
    z = torch.randn(10, 4, generator=generator)
    assert math.isfinite(intrinsic_dimension(z))
    bad = z.clone()
    bad[3, 1] = math.inf
    grid = torch.cartesian_prod(torch.arange(6.0), torch.arange(6.0))
    for points in (z[:9], z[:9].repeat(4, 1), torch.zeros(50, 3), torch.zeros(0, 3), bad, grid):
        assert math.isnan(intrinsic_dimension(points))
