"""How good are embeddings, without labels? Numbers that move before a loss curve tells of a collapse.

Pure functions of embeddings `(N, D)` of any float dtype on any device, computed in float64: the figures are for
comparing runs, so rounding has no say in them. Embeddings that are not finite give NaN.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from patchsight_train.encoder import chunks

EPSILON = 1e-7  # RankMe's, for embeddings that were computed in float32


def rankme(z: Tensor, epsilon: float = EPSILON) -> float:
    """RankMe, arXiv:2210.02885, Eq. 1: how many dimensions the embeddings really use, from 1 to min(N, D).

    exp of the entropy of p, where p_k = σ_k / ‖σ‖₁ + ε and σ are the singular values of z as it is, neither centered
    nor normalized: a direction that all share, such as a large mean, lowers it too. N bounds it, so compare at equal N,
    best at several times D. Embeddings that are all zero have rank 0.
    """
    z = z.double()
    if not torch.isfinite(z).all():
        return math.nan
    sigma = torch.linalg.svdvals(z)
    total = sigma.sum()
    if total == 0:
        return 0.0
    p = sigma / total + epsilon
    return float(torch.exp(-(p * p.log()).sum()))


def alignment(x: Tensor, y: Tensor) -> float:
    """Alignment, arXiv:2005.10242, section 4.1, α = 2: how far two views of an image lie apart, from 0 (best) to 4.

    x, y: `(N, D)`; row i of each is a view of image i. Mean of ‖x − y‖² on the unit sphere.
    """
    x, y = (F.normalize(z.double(), dim=1) for z in (x, y))
    return float((x - y).square().sum(dim=1).mean())


def uniformity(z: Tensor, t: float = 2.0) -> float:
    """Uniformity, arXiv:2005.10242, section 4.1: how evenly embeddings cover the unit sphere; less is better.

    log of the mean of exp(−t ‖x − y‖²) over all pairs of different images; N ≥ 2. 0 is all in one point, and random
    directions come near −2t.
    """
    z = F.normalize(z.double(), dim=1)
    norm = z.square().sum(dim=1)  # 1, but for the zero vector, which lies on no sphere
    total = torch.zeros((), dtype=z.dtype, device=z.device)
    for rows in chunks(len(z), 1024):
        potential = torch.exp(-t * (norm[rows, None] + norm - 2 * z[rows] @ z.T))
        potential.diagonal(rows.start).zero_()  # an image and itself are no pair
        total += potential.sum()
    return float(torch.log(total / (len(z) * (len(z) - 1))))


def feature_std(z: Tensor) -> float:
    """SimSiam's sign of collapse, arXiv:2011.10566, section 4.1, times √D: about 1 is healthy, 0 is collapsed.

    The standard deviation of each channel of the L2-normalized embeddings, averaged over channels. On the unit sphere
    that is 1/√D at most (by the biased estimate, taken here), which the factor turns into 1 whatever the width.
    """
    z = F.normalize(z.double(), dim=1)
    return float(z.std(dim=0, correction=0).mean() * math.sqrt(z.shape[1]))
