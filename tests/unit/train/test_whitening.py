"""Whitening against scikit-learn's PCA and its own definition."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA
from torch import Generator, Tensor

from patchsight_serve.errors import InvalidRequest
from patchsight_train.whitening import Whitening


def embeddings(N: int = 400, D: int = 6) -> Tensor:
    """Of which a few directions hold most, far from the origin."""
    rng = Generator().manual_seed(0)
    return torch.randn(N, D, generator=rng) @ torch.randn(D, D, generator=rng) * torch.logspace(0, -2, D) + 3


def test_without_shrinkage_all_directions_are_equally_long() -> None:
    x = embeddings()
    y = Whitening.learned(x, 0.0)(x)
    torch.testing.assert_close(y.mean(dim=0), torch.zeros(6), atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.cov(y.T), torch.eye(6), atol=1e-3, rtol=0)


def test_it_is_pca_s_whitening_turned_back() -> None:
    x = embeddings()
    unit = F.normalize(x, dim=1).double().numpy()
    pca = PCA(whiten=True).fit(unit)
    expected = pca.transform(unit) @ pca.components_
    np.testing.assert_allclose(Whitening.learned(x, 0.0)(x), expected, atol=2e-3)


def test_shrinkage_leaves_short_what_holds_next_to_nothing() -> None:
    x = embeddings()
    wide, shrunk = (torch.linalg.eigvalsh(torch.cov(Whitening.learned(x, s)(x).T)) for s in (0.0, 0.1))
    assert wide[0] > 0.99
    assert shrunk[0] < 0.5 < 0.8 < shrunk[-1] < 1


def test_cosines_of_what_all_share_are_high_and_of_the_whitened_are_not() -> None:
    x = embeddings()

    def cosines(rows: Tensor) -> Tensor:
        unit = F.normalize(rows, dim=1)
        return (unit @ unit.T)[~torch.eye(len(rows), dtype=torch.bool)]

    assert cosines(x).mean() > 0.5
    assert cosines(Whitening.learned(x)(x)).mean().abs() < 0.05


def test_too_few_or_broken_embeddings_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="takes 12 images or more, got 11"):
        Whitening.learned(embeddings(11))
    broken = embeddings()
    broken[3, 2] = torch.nan
    with pytest.raises(InvalidRequest, match="not finite"):
        Whitening.learned(broken)
