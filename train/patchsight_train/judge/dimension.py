"""On how many numbers do embeddings depend? The dimension of the surface they lie on, from two neighbors of each.

RankMe (`quality`) counts the directions of space that are used; a curved surface uses more of them than it has
dimensions. Knows nothing of classes.
"""

import math

import torch
from torch import Tensor

from patchsight_train.data import draw
from patchsight_train.encoder import chunks

DROPPED = 0.1  # share of the largest ratios that the fit leaves out, the paper's choice
FEWEST = 10  # distinct points below which nothing is said
MOST = 20_000  # points that are looked at: work grows with their square, the estimate's error falls with their root
ROWS = 512  # of the matrix of distances at a time: 80 MB


def intrinsic_dimension(z: Tensor) -> float:
    """TwoNN, arXiv:1803.06992: the dimension d of which the ratio μ = r₂ / r₁ tells, r₁ and r₂ a point's distances to
    its nearest two others.

    Where the density hardly changes between the two, μ has the distribution F(μ) = 1 − μ⁻ᵈ whatever the density. So
    −log(1 − F) against log μ is a line through the origin with the slope d, which is fitted by least squares as in the
    paper: F is a ratio's rank over N, and the 10 % largest ratios are left out, which are the least like the theory.
    (The maximum likelihood estimate N / Σ log μ has less variance, but a few outliers move it.) High dimensions are
    underestimated, the more so the fewer points there are: 20 reads 15 to 17 at N = 2000, so compare at equal N.

    Args:
        z: `(N, D)` of any float dtype, computed in float64 on its device. Of points that are equal one is kept. Of more
            than 20,000 a random subset is taken, always the same rows. Peak memory about 0.5 GB.

    Returns:
        > 0; NaN where embeddings are not finite, fewer than 10 distinct points are there, or
        they lie on a lattice.
    """
    if not torch.isfinite(z).all():
        return math.nan
    z = z[draw(torch.arange(len(z)), MOST).to(z.device)].double()
    z = torch.unique(z, dim=0)
    if len(z) < FEWEST:
        return math.nan
    r = nearest_two(z)
    N = len(r)
    log_mu = (r[:, 1] / r[:, 0]).log().sort().values
    kept = math.floor(N * (1 - DROPPED))
    F = torch.arange(1, kept + 1, dtype=log_mu.dtype, device=log_mu.device) / N
    x, y = log_mu[:kept], -torch.log1p(-F)
    return float((x @ y) / (x @ x))  # NaN on a lattice, where all ratios are 1


def nearest_two(z: Tensor) -> Tensor:
    """Distances from each point to its nearest two others, ascending: float64 `(N, D)`, all different, to `(N, 2)`."""
    z = z - z.mean(dim=0)  # the expanded square below loses fewer digits
    norm = z.square().sum(dim=1)
    out = z.new_empty(len(z), 2)
    for rows in chunks(len(z), ROWS):
        square = norm - 2 * z[rows] @ z.T  # less the row's own norm, which changes no order
        square.diagonal(rows.start).fill_(math.inf)
        # A few candidates, measured again by their differences: near points would drown in rounding otherwise.
        near = square.topk(min(4, len(z) - 1), largest=False).indices
        out[rows] = (z[near] - z[rows, None]).norm(dim=2).sort(dim=1).values[:, :2]
    return out
