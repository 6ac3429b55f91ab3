"""Feature distillation: an encoder learns the embedding of another one, which may be of any kind and any size.

The student's embedding, through a linear map to the teacher's width as FitNets' regressor (arXiv:1412.6550, Eq. 3), is
to point where the teacher's points: cosine, by which embeddings are compared later. Both see the same view of the
picture, which "a good teacher is patient and consistent" (arXiv:2106.05237, section 3) found to matter. Letters: B
images, D student's width, D_t teacher's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchsight_train.encoder import Encoder, default_pooling
from patchsight_train.objective import Metrics, Objective
from patchsight_train.objective_settings import DistillationSettings
from patchsight_train.randomness import Randomness
from patchsight_train.teacher import Teacher, device_of
from patchsight_train.views import View, augment


class Distillation(Objective):
    encoder_name = "encoder"

    def __init__(self, encoder: Encoder, settings: DistillationSettings) -> None:
        super().__init__()
        self.pooling = default_pooling(encoder.config)
        self.encoder = encoder
        self.teacher = Teacher(settings.teacher, device_of(settings))
        self.predictor = nn.Linear(encoder.config.width, self.teacher.width)
        self.view = View(size=encoder.config.image_size, scale=settings.crop_scale)

    def views(self, images: Tensor, random: Randomness) -> list[Tensor]:
        """The view, and the teacher's embedding of it `(B, D_t)`."""
        x = augment(images, self.view, random)
        return [x, self.teacher(x)]

    def loss(self, views: list[Tensor]) -> tuple[Tensor, Metrics]:
        x, target = views
        similarity = cosine_similarity(self.predictor(self.encoder.pooled(x, self.pooling)), target)
        return 1 - similarity, {"teacher_cosine": similarity}


def cosine_similarity(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean over images of the cosine between the rows of two `(B, D_t)`; float32."""
    with torch.autocast(predicted.device.type, enabled=False):
        return F.cosine_similarity(predicted.float(), target.float(), dim=1).mean()
