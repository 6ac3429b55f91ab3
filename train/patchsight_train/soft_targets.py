"""Distilling the knowledge in a neural network, arXiv:1503.02531: the teacher's class probabilities, softened.

In the order of its section 2: the teacher's logits · softmax at temperature T · the student's cross-entropy with it at
the same T, times T². The teacher is an encoder, whose classes are learned from a few labelled images; those that the
student learns from need no labels, and hard labels play no part. Letters: B images, K classes, v and z the logits of
teacher and student, p and q their softmax at T.
"""

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from patchsight_train.device import pick_device
from patchsight_train.distributed import rank
from patchsight_train.encoder import Encoder, default_pooling
from patchsight_train.objective import Metrics, Objective
from patchsight_train.objective_settings import SoftTargetsSettings
from patchsight_train.randomness import Randomness
from patchsight_train.teacher import Teacher
from patchsight_train.teacher_classes import learn_classes
from patchsight_train.views import View, augment


class SoftTargets(Objective):
    encoder_name = "encoder"
    teacher_weight: Tensor
    teacher_bias: Tensor

    def __init__(self, encoder: Encoder, settings: SoftTargetsSettings) -> None:
        super().__init__()
        self.pooling = default_pooling(encoder.config)
        self.encoder = encoder
        self.teacher = Teacher(settings.teacher, pick_device(settings.device))
        labelled, limit = (
            (settings.teacher_labels, None) if settings.teacher_labels else (settings.data, settings.limit)
        )
        weight, bias = learn_classes(self.teacher, labelled, limit, Console(quiet=rank() != 0))
        # Buffers, so that a resumed run has the very classes that it began with.
        self.register_buffer("teacher_weight", weight)
        self.register_buffer("teacher_bias", bias)
        self.classifier = nn.Linear(encoder.config.width, len(bias))
        self.temperature = settings.temperature
        self.view = View(size=encoder.config.image_size, scale=settings.crop_scale)

    def views(self, images: Tensor, random: Randomness) -> list[Tensor]:
        return [augment(images, self.view, random)]

    def loss(self, views: list[Tensor]) -> tuple[Tensor, Metrics]:
        """Also the share of images for which teacher and student choose the same class."""
        (x,) = views
        v = self.teacher_logits(x)
        z = self.classifier(self.encoder.pooled(x, self.pooling))
        return soft_target_loss(z, v, self.temperature), {"agreement": (z.argmax(1) == v.argmax(1)).float().mean()}

    def teacher_logits(self, x: Tensor) -> Tensor:
        """v: normalized images `(B, 3, S, S)` to float32 `(B, K)`."""
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(self.teacher(x), self.teacher_weight, self.teacher_bias)


def soft_target_loss(z: Tensor, v: Tensor, T: float) -> Tensor:
    """T² · KL(p ‖ q), a mean over images; both logits `(B, K)`; float32, 0 where the distributions are equal.

    That is the paper's cross-entropy less the entropy of p, on which the student has no influence. T² keeps the
    gradient's size as T changes.
    """
    with torch.autocast(z.device.type, enabled=False):
        log_p, log_q = (v.float() / T).log_softmax(dim=1), (z.float() / T).log_softmax(dim=1)
        return T**2 * (log_p.exp() * (log_p - log_q)).sum(dim=1).mean()
