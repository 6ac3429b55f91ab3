"""DINO: emerging properties in self-supervised vision transformers, arXiv:2104.14294.

In the order of its Algorithm 1: two global views and local ones · student and teacher · centered and sharpened targets
· cross-entropy over the pairs of different views · teacher and center as moving averages. Letters: B images, K
prototypes (the head's output), τ_s and τ_t temperatures, C center, l teacher momentum, m center momentum.
"""

import copy
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from patchsight_train.distributed import mean_over_ranks
from patchsight_train.encoder import Encoder, default_pooling
from patchsight_train.multi_crop import GLOBAL, batches, crops, cut, entropy, swapped_loss
from patchsight_train.objective import Metrics, Objective, When
from patchsight_train.objective_settings import DINOSettings
from patchsight_train.randomness import Randomness
from patchsight_train.schedule import cosine


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

    def __init__(self, encoder: Encoder, settings: DINOSettings) -> None:
        super().__init__()
        width = encoder.config.width
        self.pooling = default_pooling(encoder.config)
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
        self.teacher_mean: Tensor  # (1, K): of this step's logits, for the center
        self.settings = settings
        self.crops = crops(settings)

    def teacher_parameters(self) -> list[nn.Parameter]:
        return [*self.teacher.parameters(), *self.teacher_head.parameters()]

    def student_parameters(self) -> list[nn.Parameter]:
        return [*self.student.parameters(), *self.student_head.parameters()]

    def views(self, images: Tensor, random: Randomness) -> list[Tensor]:
        return cut(images, self.crops, random)

    def parts(self, views: list[Tensor], when: When) -> Iterator[tuple[Tensor, Metrics]]:
        """The teacher sees the global views; the student all, a batch of one size at a time."""
        targets, metrics = self.targets(views[:GLOBAL], when)
        pairs = GLOBAL * (len(views) - 1)  # of different views, Eq. 3
        tau = self.settings.student_temperature
        for x, pieces in batches(views, self.micro_batch):
            s = self.student_head(self.student.pooled(x, self.pooling))
            loss = swapped_loss(s, pieces, targets, tau) / pairs
            yield loss, {"loss": loss.detach(), **metrics}
            metrics = {}

    @torch.no_grad()
    def targets(self, views: list[Tensor], when: When) -> tuple[list[Tensor], Metrics]:
        """The teacher's centered and sharpened softmax of each global view, `(B, K)`; its and its mean's entropy.

        The mean's entropy tells a teacher that has an opinion on every image from one that has the same on all.
        """
        teach = [self.teacher_head(self.teacher.pooled(x, self.pooling)) for x, _ in batches(views, self.micro_batch)]
        logits = torch.cat(teach)
        self.teacher_mean = mean_over_ranks(logits.float().mean(dim=0, keepdim=True))
        tau = self.teacher_temperature(when.epoch)
        t = sharpen(logits, self.center, tau)
        return list(t.chunk(GLOBAL)), {
            "teacher_entropy": entropy(t).mean(),
            "teacher_mean_entropy": entropy(mean_over_ranks(t.mean(dim=0))),
            "teacher_temperature": torch.tensor(tau),
        }

    def teacher_temperature(self, epoch: float) -> float:
        """τ_t: linear from its warm-up value, then constant (App. C)."""
        s = self.settings
        start = min(s.warmup_teacher_temperature, s.teacher_temperature)
        share = min(epoch / s.warmup_teacher_epochs, 1.0) if s.warmup_teacher_epochs else 1.0
        return start + (s.teacher_temperature - start) * share

    def before_update(self, when: When) -> None:
        """The last layer stays as it is at first (App. C): it would follow the noise of an untrained backbone."""
        if when.epoch < self.settings.freeze_last_layer_epochs:
            for parameter in self.student_head.last_layer.parameters():
                parameter.grad = None

    @torch.no_grad()
    def after_update(self, when: When) -> None:
        momentum = cosine(when.progress, 1.0, self.settings.teacher_momentum, 1.0)
        move_average(self.teacher_parameters(), self.student_parameters(), momentum)
        m = self.settings.center_momentum
        self.center = m * self.center + (1 - m) * self.teacher_mean  # Eq. 4


def move_average(teacher: Sequence[Tensor], student: Sequence[Tensor], momentum: float) -> None:
    """θ_t ← l θ_t + (1 − l) θ_s, all parameters in few calls of the device."""
    torch._foreach_lerp_(list(teacher), list(student), 1 - momentum)


def sharpen(logits: Tensor, center: Tensor, tau: float) -> Tensor:
    """P_t: softmax((g_t(x) − C) / τ_t), float32 `(B, K)`."""
    with torch.autocast(logits.device.type, enabled=False):
        return ((logits.float() - center) / tau).softmax(dim=-1)
