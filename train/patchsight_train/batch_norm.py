"""Batch normalization, arXiv:1502.03167, over the whole batch, however many ranks it is spread over.

torch's SyncBatchNorm needs GPUs; this runs wherever `torch.distributed` does, gloo on CPUs included. Letters: N images,
C channels, μ and σ² the moments of a channel over the images and pixels of all ranks, m how many values those are.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from patchsight_train.distributed import world

OVER = (0, 2, 3)  # images and pixels


class BatchNorm(nn.BatchNorm2d):
    """`nn.BatchNorm2d` on `(N, C, H, W)`, which in training uses the statistics of all ranks.

    Every rank must come by here equally often, forward and backward. Ranks may hold different numbers of images.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-5, momentum=0.1)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or world() == 1:
            return super().forward(x)
        mean, var, m = moments(x)
        self.remember(mean, var, m)
        out: Tensor = _Normalize.apply(x, self.weight, self.bias, mean, var, m, self.eps)
        return out

    @torch.no_grad()
    def remember(self, mean: Tensor, var: Tensor, m: Tensor) -> None:
        """Move the running statistics, which evaluation uses, towards those of this batch."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_((var * m / (m - 1)).to(self.running_var.dtype), self.momentum)  # unbiased, as in torch


@torch.no_grad()
def moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of `(N, C, H, W)` on every rank: μ `(C,)`, σ² `(C,)`, biased, and m, a scalar; at least float32."""
    C = x.shape[1]
    var, mean = torch.var_mean(exact(x), OVER, correction=0)
    own = torch.cat([mean, var, mean.new_tensor([x.numel() / C])])
    parts = [torch.empty_like(own) for _ in range(world())]
    dist.all_gather(parts, own)
    stacked = torch.stack(parts)
    means, variances, counts = stacked[:, :C], stacked[:, C:-1], stacked[:, -1:]  # (ranks, C), (ranks, C), (ranks, 1)
    m = counts.sum()
    mean = (counts * means).sum(0) / m
    # Σx² − mμ² would lose all digits where μ is large against σ; sums around each rank's own mean do not.
    var = (counts * (variances + (means - mean) ** 2)).sum(0) / m
    return mean, var, m


class _Normalize(torch.autograd.Function):
    """y = γ x̂ + β with x̂ = (x − μ) / σ, where the gradient also flows through μ and σ, to the images of all ranks.

    Of one operation's memory: what autograd would keep of the single steps is three times the activations.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, var: Tensor, m: Tensor, eps: float
    ) -> Tensor:
        ctx.save_for_backward(x, gamma, mean, (var + eps).rsqrt(), m)
        return F.batch_norm(x, mean, var, gamma, beta, training=False, eps=eps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Section 3's equations, with its sums over the batch taken over all ranks."""
        x, gamma, mean, inverse_std, m = ctx.saved_tensors
        g = exact(gradients[0])
        normalized = (exact(x) - channel(mean)) * channel(inverse_std)
        d_beta, d_gamma = g.sum(OVER), (g * normalized).sum(OVER)
        totals = torch.stack([d_beta, d_gamma]) / m
        dist.all_reduce(totals)
        d_x = (g - channel(totals[0]) - normalized * channel(totals[1])) * channel(gamma * inverse_std)
        return d_x.to(x.dtype), d_gamma.to(gamma.dtype), d_beta.to(gamma.dtype), None, None, None, None


def exact(x: Tensor) -> Tensor:
    """Sums over a batch need float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def channel(values: Tensor) -> Tensor:
    """`(C,)` to `(C, 1, 1)`."""
    return values.view(-1, 1, 1)
