"""Supervised classification by an encoder and a linear head: fine-tuning as in MAE, arXiv:2111.06377, appendix A.

Two deviations: the mean is taken of patch tokens after the final norm, not before it, since that is the embedding which
is exported; and the linear probe is trained by AdamW, not by LARS, which is for batches of thousands. Letters: B images
of all ranks, b of this one, C classes, D width of the encoder.
"""

from collections import deque

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchsight_train.distributed import gather, rank, world
from patchsight_train.encoder import Encoder, default_pooling, pool
from patchsight_train.finetune_settings import FineTuneSettings
from patchsight_train.layers import freeze, rate_scale, set_modes, tokens
from patchsight_train.objective import Metrics, Objective
from patchsight_train.randomness import Randomness
from patchsight_train.views import View, augment

PROBE_STD, HEAD_STD = 0.01, 2e-5  # of the head's first weights, as MAE's code has it


class Classification(Objective):
    """labels: those of the batches that are under way, int64 `(b,)` each, the oldest first. Who hands images to `views`
    appends theirs before; in training each call takes one."""

    encoder_name = "encoder"

    def __init__(self, encoder: Encoder, classes: int, settings: FineTuneSettings) -> None:
        super().__init__()
        D, probe = encoder.config.width, settings.blocks == 0
        self.pooling = settings.pooling or default_pooling(encoder.config)
        self.blocks, self.layer_decay = settings.blocks, settings.layer_decay
        self.label_smoothing, self.mixup = settings.label_smoothing, settings.mixup
        self.micro_batch = settings.micro_batch
        self.encoder = encoder
        self.norm = None
        if probe if settings.batch_norm is None else settings.batch_norm:
            self.norm = nn.BatchNorm1d(D, affine=False, eps=1e-6)
        self.head = nn.Linear(D, classes)
        nn.init.trunc_normal_(self.head.weight, std=PROBE_STD if probe else HEAD_STD)
        nn.init.zeros_(self.head.bias)
        s = settings.color_strength
        self.view = View(
            size=encoder.config.image_size,
            scale=settings.crop_scale,
            flip=settings.flip,
            jitter=(0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s) if s else None,
        )
        self.labels: deque[Tensor] = deque()
        freeze(encoder, settings.blocks)
        self.train()

    def train(self, mode: bool = True) -> "Classification":
        """As `nn.Module`'s, but what is frozen stays in evaluation mode."""
        super().train(mode)
        set_modes(self.encoder, mode)
        return self

    def rate_scale(self, name: str) -> float:
        kind, _, rest = name.partition(".")
        return rate_scale(rest, self.encoder.config, self.layer_decay) if kind == "encoder" else 1.0

    def views(self, images: Tensor, random: Randomness) -> list[Tensor]:
        """The view, and the target of each image, float32 `(b, C)`; in evaluation mode the view alone."""
        x = augment(images, self.view, random)
        if not self.training:
            return [x]
        y = targets(self.labels.popleft().to(x.device), self.head.out_features, self.label_smoothing)
        return list(mix(x, y, mixing_share(self.mixup, random))) if self.mixup else [x, y]

    def loss(self, views: list[Tensor]) -> tuple[Tensor, Metrics]:
        """Cross entropy with soft targets, and the share of views whose likeliest class is the target's."""
        x, y = views
        logits = self.logits(x)
        with torch.autocast(x.device.type, enabled=False):
            loss = F.cross_entropy(logits, y)
        return loss, {"batch_accuracy": (logits.argmax(dim=1) == y.argmax(dim=1)).float().mean()}

    def logits(self, x: Tensor) -> Tensor:
        """Normalized images `(b, 3, S, S)` to float32 `(b, C)`."""
        h = pool(tokens(self.encoder, x, self.blocks), self.encoder.config.prefix_tokens, self.pooling)
        with torch.autocast(x.device.type, enabled=False):
            out: Tensor = self.head(self.standardized(h.float()))
        return out

    def standardized(self, h: Tensor) -> Tensor:
        """Features `(b, D)` by the statistics of the batch of all ranks; in evaluation by the running ones."""
        if self.norm is None:
            return h
        if not self.training or len(h) * world() == 1:  # one image has no variance, as the last of a micro-batch
            return F.batch_norm(h, self.norm.running_mean, self.norm.running_var, eps=self.norm.eps)
        b = len(h)
        out: Tensor = self.norm(gather(h))[rank() * b : (rank() + 1) * b]
        return out


def targets(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """int64 `(b,)` to float32 `(b, C)` that sum to 1: the smoothing ε is spread over all C classes (arXiv:1512.00567,
    section 7), so that the right one has 1 − ε + ε / C."""
    return F.one_hot(labels, classes).float() * (1 - smoothing) + smoothing / classes


def mixing_share(alpha: float, random: Randomness) -> float:
    """λ of mixup, one for the batch, from Beta(α, α). The same on every rank."""
    seed = int(torch.randint(2**62, (1,), generator=random.generator, device=random.device))
    return float(np.random.default_rng(seed).beta(alpha, alpha))


def mix(x: Tensor, y: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """mixup, arXiv:1710.09412, Eq. 1: λ of each image and target, 1 − λ of those at the other end of the batch.

    x: `(b, 3, S, S)`. y: `(b, C)`. The partner is one of the same rank's: which one is by chance, as the batch is.
    """
    return share * x + (1 - share) * x.flip(0), share * y + (1 - share) * y.flip(0)
