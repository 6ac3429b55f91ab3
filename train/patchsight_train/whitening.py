"""Whitening of embeddings: learned from unlabelled images, part of an exported graph from then on (arXiv:2408.07519).

A trained encoder spends most of an embedding's length on a few directions that all pictures share, and cosine sees
little else. ZCA makes all directions equally long and turns none: W = V (Λ + s·λ̄)^(−½) Vᵀ, with the covariance's
eigenvalues Λ, eigenvectors V and mean eigenvalue λ̄. What that is worth: docs/encoders.md. Letters: N images, D numbers.
"""

from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchsight_serve.errors import InvalidRequest

SHRINKAGE = 0.01  # s: directions that hold next to nothing are rounding and noise, and stay short


class Whitening(nn.Module):
    """Embeddings `(N, D)` to `(x / ‖x‖ − μ) W`, float32 `(N, D)`, not normalized."""

    mean: Tensor
    W: Tensor

    def __init__(self, mean: Tensor, W: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("W", W)

    def forward(self, x: Tensor) -> Tensor:
        return (F.normalize(x, dim=1) - self.mean) @ self.W

    @classmethod
    def learned(cls, x: Tensor, shrinkage: float = SHRINKAGE) -> Self:
        """From embeddings `(N, D)` of pictures like those to come; `shrinkage` is s, > 0 or N must be larger than D.

        Raises:
            InvalidRequest: fewer than 2 D embeddings, which say little of D directions; or one is not finite.
        """
        N, D = x.shape
        if N < 2 * D:
            raise InvalidRequest(f"whitening {D} numbers takes {2 * D} images or more, got {N}")
        x = F.normalize(x.double(), dim=1)
        if not x.isfinite().all():
            raise InvalidRequest("whitening: an embedding is not finite")
        values, V = torch.linalg.eigh(torch.cov(x.T))
        W = (V * (values.clamp(min=0) + shrinkage * values.mean()).rsqrt()) @ V.T
        return cls(x.mean(dim=0).float(), W.float())
