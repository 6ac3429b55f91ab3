"""SimCLR: a simple framework for contrastive learning of visual representations, arXiv:2002.05709.

In the order of its Algorithm 1: two views t(x), t'(x) · encoder f · projection head g · NT-Xent. The encoder is a ViT
and h its CLS token, so the head's hidden layers carry batch norm as in the ViT recipes of MoCo v3 (arXiv:2104.02057).
Letters: B images, Z width of the projection z, τ temperature.
"""

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from patchsight_train.objective import Metrics, Objective
from patchsight_train.settings import SimCLRSettings
from patchsight_train.views import View, augment
from patchsight_train.vit import ViT


class SimCLR(Objective):
    encoder_name = "encoder"
    pooling = "cls"

    def __init__(self, encoder: ViT, settings: SimCLRSettings) -> None:
        super().__init__()
        self.encoder = encoder
        D, hidden, Z = encoder.config.width, settings.projection_hidden, settings.projection_width
        self.head = nn.Sequential(
            nn.Linear(D, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, Z, bias=False),
            nn.BatchNorm1d(Z, affine=False),
        )
        self.temperature = settings.temperature
        s = settings.color_strength
        self.view = View(
            size=encoder.config.image_size,
            scale=settings.crop_scale,
            jitter=(0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s),
            gray=0.2,
            blur=settings.blur,
        )

    def views(self, images: Tensor, generator: Generator) -> list[Tensor]:
        return [augment(images, self.view, generator), augment(images, self.view, generator)]

    def loss(self, views: list[Tensor], generator: Generator) -> tuple[Tensor, Metrics]:  # noqa: ARG002
        h = self.encoder(torch.cat(views))[:, 0]  # (2B, D): both views in one batch
        z = self.head(h)  # (2B, Z)
        loss, accuracy = nt_xent(z, self.temperature)
        return loss, {"contrastive_accuracy": accuracy}


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
