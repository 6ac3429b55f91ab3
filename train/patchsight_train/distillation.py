"""Feature distillation: an encoder learns the embedding of another one, which may be of any kind and size.

Through a linear map to the teacher's width, FitNets' regressor (arXiv:1412.6550, Eq. 3), the student's embedding is to
point where the teacher's does: by the cosine, as embeddings are compared later on. Both see the same view, the
"consistent" of arXiv:2106.05237 (section 3). Letters: B images of all ranks, b of this one, D student's width, D_t
teacher's.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchsight_train.device import pick_device
from patchsight_train.distributed import mean_over_ranks
from patchsight_train.encoder import Encoder, default_pooling
from patchsight_train.objective import Metrics, Objective, When
from patchsight_train.objective_settings import DistillationSettings
from patchsight_train.randomness import Randomness
from patchsight_train.teacher import Teacher
from patchsight_train.views import View, augment


class Distillation(Objective):
    encoder_name = "encoder"

    def __init__(self, encoder: Encoder, settings: DistillationSettings) -> None:
        super().__init__()
        self.pooling = default_pooling(encoder.config)
        self.encoder = encoder
        self.teacher = Teacher(settings.teacher, pick_device(settings.device))
        self.regressor = nn.Linear(encoder.config.width, self.teacher.width)
        self.view = View(size=encoder.config.image_size, scale=settings.crop_scale)

    def views(self, images: Tensor, random: Randomness) -> list[Tensor]:
        return [augment(images, self.view, random)]

    def parts(self, views: list[Tensor], when: When) -> Iterator[tuple[Tensor, Metrics]]:
        (x,) = views
        return super().parts([x, self.targets(x)], when)

    def targets(self, x: Tensor) -> Tensor:
        """The teacher's embeddings of this rank's `(b, 3, S, S)` less their mean over all ranks, float32 `(b, D_t)`.

        Embeddings of one encoder share most of their direction: with the teacher that ships, a student that answers the
        same to every picture has a cosine of 0.94. Less the mean, it has 0.
        """
        target = self.teacher(x)
        return target - mean_over_ranks(target.mean(dim=0))

    def loss(self, views: list[Tensor]) -> tuple[Tensor, Metrics]:
        """Of a view and its targets."""
        x, target = views
        return cosine_distance(self.regressor(self.encoder.pooled(x, self.pooling)), target), {}


def cosine_distance(predicted: Tensor, target: Tensor) -> Tensor:
    """1 − cos of each row with its target, a mean over images; both `(B, D_t)`; float32, 0 to 2."""
    with torch.autocast(predicted.device.type, enabled=False):
        return 1 - F.cosine_similarity(predicted.float(), target.float(), dim=1).mean()
