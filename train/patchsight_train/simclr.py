"""SimCLR: a simple framework for contrastive learning of visual representations, arXiv:2002.05709.

In the order of its Algorithm 1: two views t(x), t'(x) · encoder f · projection head g · NT-Xent. Where the encoder is a
ViT, h is its CLS token and the head's last layer carries batch norm too, as in MoCo v3 (arXiv:2104.02057). Letters:
B images of all ranks, b of this rank, D width of h, Z width of the projection z, τ temperature.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchsight_train.distributed import gather
from patchsight_train.encoder import Encoder, chunks, default_pooling
from patchsight_train.objective import Metrics, Objective, When
from patchsight_train.objective_settings import SimCLRSettings
from patchsight_train.randomness import Randomness
from patchsight_train.views import View, augment


class SimCLR(Objective):
    encoder_name = "encoder"

    def __init__(self, encoder: Encoder, settings: SimCLRSettings) -> None:
        super().__init__()
        self.encoder = encoder
        self.pooling = default_pooling(encoder.config)
        self.head = projection_head(
            encoder.config.width, settings.projection_hidden, settings.projection_width, settings.projection_layers
        )
        self.temperature = settings.temperature
        s = settings.color_strength
        self.view = View(
            size=encoder.config.image_size,
            scale=settings.crop_scale,
            jitter=(0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s),
            gray=settings.gray,
            blur=settings.blur,
        )

    def views(self, images: Tensor, random: Randomness) -> list[Tensor]:
        return [augment(images, self.view, random), augment(images, self.view, random)]

    def loss(self, views: list[Tensor]) -> tuple[Tensor, Metrics]:
        return self.contrast(self.encoder.pooled(torch.cat(views), self.pooling))  # both views in one batch

    def contrast(self, h: Tensor) -> tuple[Tensor, Metrics]:
        """NT-Xent of this rank's `(2b, D)` among those of all ranks: the same value on each.

        The head runs on the whole batch everywhere: its batch norm needs that, and it is small beside the encoder.
        """
        first, second = h.chunk(2)
        z = self.head(torch.cat([gather(first), gather(second)]))  # (2B, Z)
        loss, accuracy = nt_xent(z, self.temperature)
        return loss, {"contrastive_accuracy": accuracy}

    def parts(self, views: list[Tensor], when: When) -> Iterator[tuple[Tensor, Metrics]]:  # noqa: ARG002
        """One part; with micro-batches as many as needed, by gradient caching, arXiv:2101.06983.

        All representations h are computed without a graph first; the loss of the whole batch gives dL/dh; then each
        micro-batch is encoded again, and h · dL/dh has the gradient that the loss has. An encoder with batch norm sees
        the statistics of its micro-batch.
        """
        if self.micro_batch is None:
            loss, metrics = self.loss(views)
            yield loss, {"loss": loss.detach(), **{name: value.detach() for name, value in metrics.items()}}
            return
        x = torch.cat(views)
        pieces = chunks(len(x), self.micro_batch)
        with torch.no_grad():
            h = torch.cat([self.encoder.pooled(x[rows], self.pooling) for rows in pieces])
        h.requires_grad_()
        loss, metrics = self.contrast(h)
        yield loss, {"loss": loss.detach(), **{name: value.detach() for name, value in metrics.items()}}
        assert h.grad is not None
        for rows in pieces:
            yield (self.encoder.pooled(x[rows], self.pooling) * h.grad[rows]).sum(), {}


def projection_head(width: int, hidden: int, Z: int, layers: int) -> nn.Sequential:
    """`layers` linear maps, batch norm after each and ReLU between: `(N, D)` to `(N, Z)`."""
    inner: list[nn.Module] = []
    for i in range(layers - 1):
        inner += [nn.Linear(width if i == 0 else hidden, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU()]
    return nn.Sequential(*inner, nn.Linear(hidden, Z, bias=False), nn.BatchNorm1d(Z, affine=False))


def nt_xent(z: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Normalized temperature-scaled cross entropy, Eq. 1, averaged over all 2B positives as in Algorithm 1.

    Args:
        z: `(2B, Z)`, any float dtype; rows i and i + B are the two views of image i.
        temperature: τ > 0.

    Returns:
        The scalar float32 loss, ln(2B − 1) when all similarities are equal; and the share of rows whose most similar
        other row is their positive.
    """
    with torch.autocast(z.device.type, enabled=False):
        z = F.normalize(z.float(), dim=1)
        N = len(z)
        s = z @ z.T / temperature  # s[i, j] = sim(z_i, z_j) / τ
        s.fill_diagonal_(float("-inf"))  # 1[k ≠ i]
        positive = torch.arange(N, device=z.device).roll(N // 2)
        return F.cross_entropy(s, positive), (s.argmax(dim=1) == positive).float().mean()
