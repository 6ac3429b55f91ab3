"""The linear probe of the field: many linear classifiers on frozen features, trained side by side, the best one kept.

A head for each learning rate and each kind of feature, behind a batch norm without affine parameters (as MAE's linear
probing, arXiv:2111.06377, App. A.1); the one that is best on a held-out part of the training images is reported on the
test images. `linear.py` is the probe while training: one convex problem, nothing to choose. Letters: N images, D
channels, C classes, H heads, one for each learning rate.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)  # peak learning rates at `BATCH`; cosine to 0
EPOCHS, BATCH, MOMENTUM = 40, 512, 0.9
HELD_OUT = 10  # every so many-th training image chooses, the others train
MOST_STEPS = 6000  # a large training set is seen fewer times


@dataclass(frozen=True)
class Tried:
    """What one head reached: shares of 0..1. test: of the test images."""

    kind: str
    rate: float
    held_out: float
    test: float


@dataclass(frozen=True)
class Probed:
    """heads: all that were tried, by kind and rate. best: the best by `held_out`. classifier: that one with its batch
    norm folded in, `(N, D)` to `(N, C)`. folding_error: the largest difference of its test logits by the folding,
    relative to the largest logit. predicted: its classes for the test images, int64 `(Q,)`."""

    heads: list[Tried]
    best: Tried
    classifier: nn.Linear
    folding_error: float
    predicted: Tensor


class Heads(nn.Module):
    """H linear classifiers of one kind of feature behind one batch norm. weight: `(H, C, D)`; bias: `(H, C)`."""

    def __init__(self, D: int, classes: int, rates: tuple[float, ...]) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(D, affine=False)
        H = len(rates)
        self.register_buffer("rates", torch.tensor(rates)[:, None, None])
        self.register_buffer("weight", torch.zeros(H, classes, D + 1))  # the last column is the bias
        self.register_buffer("velocity", torch.zeros(H, classes, D + 1))

    rates: Tensor
    weight: Tensor
    velocity: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """`(N, D)` to logits `(H, N, C)`."""
        return _with_one(self.norm(x)) @ self.weight.transpose(1, 2)

    @torch.no_grad()
    def step(self, x: Tensor, y: Tensor, schedule: float) -> None:
        """One step of SGD with momentum on each head's own mean cross entropy. y: int64 `(N,)`; schedule: 0..1, times
        each rate. The gradient of softmax regression is (p − onehot)ᵀ x / N, so autograd is not needed."""
        x = _with_one(self.norm(x))
        p = (x @ self.weight.transpose(1, 2)).softmax(dim=2)  # (H, N, C)
        p[:, torch.arange(len(y), device=y.device), y] -= 1
        self.velocity.mul_(MOMENTUM).add_(p.transpose(1, 2) @ x / len(x))
        self.weight.sub_(schedule * self.rates * self.velocity)

    def folded(self, head: int) -> nn.Linear:
        """One head with the batch norm inside: Wx̂ + b = (W/σ) x + (b − (W/σ) μ). Computed in float64."""
        assert self.norm.running_mean is not None
        assert self.norm.running_var is not None
        W, b = self.weight[head, :, :-1].double(), self.weight[head, :, -1].double()
        W = W * (self.norm.running_var.double() + self.norm.eps).rsqrt()
        linear = nn.Linear(W.shape[1], W.shape[0])
        with torch.no_grad():
            linear.weight.copy_(W)
            linear.bias.copy_(b - W @ self.norm.running_mean.double())
        return linear


def _with_one(x: Tensor) -> Tensor:
    return F.pad(x, (0, 1), value=1.0)


def probe_heads(
    train: Mapping[str, Tensor], labels: Tensor, test: Mapping[str, Tensor], test_labels: Tensor,
    rates: tuple[float, ...] = RATES, seed: int = 0, done: Callable[[int], None] = lambda _: None,
) -> Probed:  # fmt: skip
    """Train every head on nine tenths of the training images, choose on the tenth, report on the test images.

    Args:
        train, test: by kind, float32 `(N, D)` and `(Q, D)`, finite. labels, test_labels: int64, 0 or more; a class that
            train lacks is never found. With fewer than 20 training images all of them train and choose.
        done: told how many steps of `steps_for(N, len(train))` are done.
    """
    classes = int(max(labels.max(), test_labels.max())) + 1
    fit, held = split(len(labels), seed)
    found: list[Tried] = []
    trained: dict[str, Heads] = {}
    for kind, x in train.items():
        heads = trained[kind] = _trained(x[fit], labels[fit], classes, rates, seed, done)
        held_out, tested = _accuracy(heads, x[held], labels[held]), _accuracy(heads, test[kind], test_labels)
        found += [Tried(kind, *values) for values in zip(rates, held_out.tolist(), tested.tolist(), strict=True)]
    best = max(found, key=lambda tried: tried.held_out)
    heads, head = trained[best.kind], rates.index(best.rate)
    queries = test[best.kind]
    classifier = heads.folded(head)
    with torch.no_grad():
        logits, folded = heads(queries)[head], classifier(queries)
        error = float((logits - folded).abs().max() / logits.abs().max().clamp(min=1e-12))
    return Probed(found, best, classifier, error, folded.argmax(dim=1))


def split(N: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows that train and rows that choose, int64."""
    order = torch.randperm(N, generator=Generator().manual_seed(seed))
    if N < 2 * HELD_OUT:
        return order, order
    return order[N // HELD_OUT :], order[: N // HELD_OUT]


def steps_for(N: int, kinds: int) -> int:
    """How many steps all heads take together, for a progress bar."""
    return kinds * _steps(len(split(N, 0)[0]))


def _steps(N: int) -> int:
    return min(EPOCHS * max(N // BATCH, 1), MOST_STEPS)


def _trained(
    x: Tensor, y: Tensor, classes: int, rates: tuple[float, ...], seed: int, done: Callable[[int], None]
) -> Heads:
    heads, N = Heads(x.shape[1], classes, rates), len(x)
    total, per_epoch = _steps(N), max(N // BATCH, 1)
    generator = Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    for step in range(total):
        if step % per_epoch == 0:
            order = torch.randperm(N, generator=generator)
        rows = order[step % per_epoch * BATCH :][:BATCH]
        heads.norm.momentum = max(0.1, 1 / (step + 1))  # as good as a mean from the first step on
        heads.step(x[rows], y[rows], (1 + torch.cos(torch.tensor(torch.pi * step / total)).item()) / 2)
        done(1)
    heads.norm.reset_running_stats()
    heads.norm.momentum = None  # cumulative: exactly the training images' own moments
    heads.norm(x)
    return heads.eval()


def _accuracy(heads: Heads, x: Tensor, y: Tensor) -> Tensor:
    """Of each head: `(H,)`."""
    parts = zip(torch.split(x, 4096), torch.split(y, 4096), strict=True)
    right = torch.stack([(heads(part).argmax(dim=2) == of).sum(dim=1) for part, of in parts])
    return right.sum(dim=0).double() / len(y)
