"""The linear probe: multinomial logistic regression on frozen features. Deterministic: nothing in it is drawn.

Full-batch L-BFGS needs no learning rate and no epochs to tune, so the figure belongs to the features alone. Letters:
N images, D channels, C classes.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

ITERATIONS = 100  # 10 classes need about 40, 200 classes are close enough by then


def linear_probe(gallery: Tensor, labels: Tensor, queries: Tensor, query_labels: Tensor) -> float:
    """Share of the queries, 0..1, that a linear classifier trained on the gallery classifies rightly.

    Features are standardized by the gallery's mean and deviation; the penalty is ‖W‖² / 2N on the mean cross entropy,
    scikit-learn's default (its C = 1).

    Args:
        gallery: float `(N, D)`. queries: float `(Q, D)` on the same device. NaN is returned where one is not finite.
        labels: int64 `(N,)`. query_labels: int64 `(Q,)`; a class that the gallery lacks is never found.
    """
    if not (torch.isfinite(gallery).all() and torch.isfinite(queries).all()):
        return math.nan
    device = gallery.device
    present, y = torch.unique(labels.to(device), return_inverse=True)
    mean, deviation = gallery.mean(dim=0), gallery.std(dim=0, correction=0)
    # A channel that is constant but for rounding says nothing: it becomes 0, instead of being blown up.
    deviation = deviation.where(deviation > 1e-6 * gallery.abs().max(), math.inf)
    W, b = logistic_regression((gallery - mean) / deviation, y, len(present), 1 / len(gallery))
    found = present[((queries - mean) / deviation @ W.T + b).argmax(dim=1)]
    return float((found == query_labels.to(device)).double().mean())


def logistic_regression(
    x: Tensor, y: Tensor, classes: int, penalty: float, tolerance: float = 1e-4
) -> tuple[Tensor, Tensor]:
    """W `(C, D)` and b `(C,)` that minimize mean cross entropy + penalty / 2 · ‖W‖², in the dtype of x.

    Channels of embeddings depend on each other, which L-BFGS pays for with hundreds of steps. So it works on V, where
    W = V Pᵀ and P Pᵀ is the inverse of xᵀx / 2N + penalty, Böhning's bound on the Hessian: the same minimum, in a third
    of the steps.

    Args:
        x: float `(N, D)`, near zero mean. y: int64 `(N,)`, 0..C − 1.
        penalty: > 0.
        tolerance: the largest entry of the gradient in V and b that still counts as zero.
    """
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    scale = (values.clamp(min=0) / 2 + penalty).rsqrt()
    P = vectors * scale  # (D, D)
    projected = x @ P
    V = torch.zeros(classes, x.shape[1], dtype=x.dtype, device=x.device, requires_grad=True)
    b = torch.zeros(classes, dtype=x.dtype, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [V, b], max_iter=ITERATIONS, history_size=10, tolerance_grad=tolerance, tolerance_change=0,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def objective() -> Tensor:
        optimizer.zero_grad()
        # ‖V · scale‖ is ‖W‖: the vectors are orthogonal.
        loss: Tensor = F.cross_entropy(projected @ V.T + b, y) + penalty / 2 * (V * scale).square().sum()
        torch.autograd.backward(loss)
        return loss

    optimizer.step(objective)  # type: ignore[no-untyped-call]
    return V.detach() @ P.T, b.detach()
