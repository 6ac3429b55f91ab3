"""DINO: emerging properties in self-supervised vision transformers, arXiv:2104.14294.

In the order of its Algorithm 1: two global views · student and teacher · centered and sharpened targets · cross-entropy
over the pairs of different views · teacher and center as moving averages. Letters: B images, K prototypes (the head's
output), τ_s and τ_t temperatures, C center, l teacher momentum, m center momentum.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from patchsight_train.objective import Metrics, Objective
from patchsight_train.schedule import cosine
from patchsight_train.settings import DINOSettings
from patchsight_train.views import View, augment
from patchsight_train.vit import ViT


class DINOHead(nn.Module):
    """Three-layer MLP, L2 normalization, and a weight-normalized linear map to K prototypes, section 3.1 and App. C."""

    def __init__(self, width: int, hidden: int, bottleneck: int, K: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.last_layer = weight_norm(nn.Linear(bottleneck, K, bias=False))
        length = self.last_layer.parametrizations.weight.original0
        length.data.fill_(1)
        length.requires_grad_(False)  # all prototypes keep length 1: the paper's stable choice

    def forward(self, x: Tensor) -> Tensor:
        z = self.mlp(x)
        with torch.autocast(x.device.type, enabled=False):  # bf16 logits would be off by 0.1 once divided by 0.04
            out: Tensor = self.last_layer(F.normalize(z.float(), dim=-1))
        return out


class DINO(Objective):
    encoder_name = "teacher"  # better than the student throughout training, section 5.1
    pooling = "cls"

    def __init__(self, encoder: ViT, settings: DINOSettings) -> None:
        super().__init__()
        width = encoder.config.width
        self.student = encoder
        self.student_head = DINOHead(width, settings.head_hidden, settings.bottleneck, settings.prototypes)
        # Both start from the same parameters. weight_norm cannot be deep-copied, so the head is built and loaded.
        self.teacher = copy.deepcopy(encoder)
        self.teacher_head = DINOHead(width, settings.head_hidden, settings.bottleneck, settings.prototypes)
        self.teacher_head.load_state_dict(self.student_head.state_dict())
        for parameter in self.teacher_parameters():
            parameter.requires_grad_(False)
        self.center: Tensor
        self.register_buffer("center", torch.zeros(1, settings.prototypes))
        self.teacher_logits: Tensor  # of this step, for the center
        self.settings = settings
        size = encoder.config.image_size
        jitter = (0.4, 0.4, 0.2, 0.1)
        # BYOL's pair of views (App. B there): the blur is left out at sizes where it would erase the picture.
        blur = (1.0, 0.1) if size >= 64 else (0.0, 0.0)
        self.first = View(size, settings.crop_scale, jitter=jitter, gray=0.2, blur=blur[0])
        self.second = View(size, settings.crop_scale, jitter=jitter, gray=0.2, blur=blur[1], solarize=0.2)

    def teacher_parameters(self) -> list[nn.Parameter]:
        return [*self.teacher.parameters(), *self.teacher_head.parameters()]

    def student_parameters(self) -> list[nn.Parameter]:
        return [*self.student.parameters(), *self.student_head.parameters()]

    def views(self, images: Tensor, generator: Generator) -> list[Tensor]:
        return [augment(images, self.first, generator), augment(images, self.second, generator)]

    def loss(self, views: list[Tensor], generator: Generator) -> tuple[Tensor, Metrics]:  # noqa: ARG002
        x = torch.cat(views)
        s = self.student_head(self.student(x)[:, 0])
        with torch.no_grad():
            t = self.teacher_head(self.teacher(x)[:, 0])
        settings = self.settings
        loss, entropy = dino_loss(
            s.chunk(2), t.chunk(2), self.center, settings.student_temperature, settings.teacher_temperature
        )
        self.teacher_logits = t
        return loss, {"teacher_entropy": entropy}

    def before_update(self, epoch: float) -> None:
        """The last layer stays as it is at first (App. B): it would follow the noise of an untrained backbone."""
        if epoch < self.settings.freeze_last_layer_epochs:
            for parameter in self.student_head.last_layer.parameters():
                parameter.grad = None

    @torch.no_grad()
    def after_update(self, progress: float) -> None:
        momentum = cosine_to_one(self.settings.teacher_momentum, progress)
        for teacher, student in zip(self.teacher_parameters(), self.student_parameters(), strict=True):
            teacher.lerp_(student, 1 - momentum)  # θ_t ← l θ_t + (1 − l) θ_s
        self.center = update_center(self.center, self.teacher_logits, self.settings.center_momentum)


def cosine_to_one(start: float, progress: float) -> float:
    """The teacher's momentum l: from `start` to 1 along half a cosine, `progress` in 0..1."""
    return cosine(progress, 1.0, start, 1.0)


def dino_loss(
    student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], center: Tensor, tau_s: float, tau_t: float
) -> tuple[Tensor, Tensor]:
    """H(t, s) of Algorithm 1, averaged over all pairs of different views.

    Args:
        student, teacher: one `(B, K)` tensor of logits a view; no gradient flows into the teacher's.
        center: C, `(1, K)`.

    Returns:
        The scalar float32 loss, ln K when the teacher is uniform and the student too; and the teacher's mean entropy.
    """
    with torch.autocast(center.device.type, enabled=False):
        targets = [((t.detach().float() - center) / tau_t).softmax(dim=-1) for t in teacher]
        logs = [(s.float() / tau_s).log_softmax(dim=-1) for s in student]
        terms = [-(t * s).sum(dim=-1).mean() for i, t in enumerate(targets) for j, s in enumerate(logs) if i != j]
        entropy = torch.stack([-torch.special.xlogy(t, t).sum(dim=-1).mean() for t in targets]).mean()
        return torch.stack(terms).mean(), entropy


def update_center(center: Tensor, teacher: Tensor, momentum: float) -> Tensor:
    """C ← m C + (1 − m) mean of the teacher's logits `(n·B, K)` over views and images, Eq. 4."""
    return momentum * center + (1 - momentum) * teacher.detach().float().mean(dim=0, keepdim=True)
