"""Distilling the knowledge in a neural network, arXiv:1503.02531: the teacher's class probabilities, at a temperature.

In the order of its section 2: class logits of the teacher · softmax at temperature T · cross-entropy of the student's
softmax at the same T, times T². The teacher is an encoder without classes: its logits are those of a logistic regression
on its embeddings of some labelled images. The images that the student learns from need no labels. Letters: B images, K
classes, D student's width, D_t teacher's, v and z the logits of teacher and student.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchsight_serve.decode import decode
from patchsight_serve.errors import InvalidRequest
from patchsight_train.data import EncodedImages, draw
from patchsight_train.encoder import Encoder, chunks, default_pooling
from patchsight_train.objective import Metrics, Objective
from patchsight_train.objective_settings import SoftTargetsSettings
from patchsight_train.randomness import Randomness
from patchsight_train.teacher import Teacher, device_of
from patchsight_train.views import View, augment

MOST_LABELLED = 10_000  # few suffice for a linear classifier


class SoftTargets(Objective):
    encoder_name = "encoder"

    def __init__(self, encoder: Encoder, settings: SoftTargetsSettings) -> None:
        super().__init__()
        self.pooling = default_pooling(encoder.config)
        self.encoder = encoder
        self.teacher = Teacher(settings.teacher, device_of(settings))
        embeddings, labels = labelled_embeddings(self.teacher, settings)
        weight, bias = logistic_regression(embeddings, labels)
        # Buffers: a checkpoint holds the classes that the run began with.
        self.teacher_weight: Tensor
        self.teacher_bias: Tensor
        self.register_buffer("teacher_weight", weight)
        self.register_buffer("teacher_bias", bias)
        self.classifier = nn.Linear(encoder.config.width, len(bias))
        self.temperature = settings.temperature
        self.view = View(size=encoder.config.image_size, scale=settings.crop_scale)

    def views(self, images: Tensor, random: Randomness) -> list[Tensor]:
        """The view, and the teacher's logits of it `(B, K)`."""
        x = augment(images, self.view, random)
        return [x, F.linear(self.teacher(x), self.teacher_weight, self.teacher_bias)]

    def loss(self, views: list[Tensor]) -> tuple[Tensor, Metrics]:
        x, v = views
        z = self.classifier(self.encoder.pooled(x, self.pooling))
        agreement = (z.argmax(dim=1) == v.argmax(dim=1)).float().mean()
        return soft_cross_entropy(z, v, self.temperature), {"agreement": agreement}


def soft_cross_entropy(z: Tensor, v: Tensor, T: float) -> Tensor:
    """T² · KL(p ‖ q), a mean over images, with p and q the softmax of v / T and z / T; both `(B, K)`; float32.

    The paper's cross-entropy less the entropy of p, which the student cannot change: so 0 is full agreement.
    """
    with torch.autocast(z.device.type, enabled=False):
        log_q, log_p = (z.float() / T).log_softmax(dim=1), (v.float() / T).log_softmax(dim=1)
        return T**2 * (log_p.exp() * (log_p - log_q)).sum(dim=1).mean()


def labelled_embeddings(teacher: Teacher, settings: SoftTargetsSettings) -> tuple[Tensor, Tensor]:
    """The teacher's embeddings `(n, D_t)` of labelled images, in its own transform, and their labels `(n,)`.

    Raises:
        InvalidRequest: there are no labels, or of one class only.
    """
    sources = settings.teacher_labels or settings.data
    encoded = EncodedImages(sources, None if settings.teacher_labels else settings.limit)
    if encoded.labels is None:
        raise InvalidRequest(
            f"{settings.objective} needs labelled images for the teacher's classes, {', '.join(sources)} has no labels; "
            f"name some with --teacher-labels, or use distillation, which needs none"
        )
    rows = draw((encoded.labels >= 0).nonzero().squeeze(1), MOST_LABELLED)
    places = [(dataset, i) for dataset in encoded.datasets for i in range(len(dataset))]
    parts = []
    for part in chunks(len(rows), 256):
        pixels = [decode(d.read(i), teacher.manifest.transform) for d, i in (places[r] for r in rows[part].tolist())]
        parts.append(teacher.embed(torch.stack([torch.from_numpy(p.copy()) for p in pixels])))
    return torch.cat(parts), encoded.labels[rows]


def logistic_regression(x: Tensor, labels: Tensor, decay: float = 1e-4) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression, to convergence: weight `(K, D)` and bias `(K,)`, float32.

    x: `(n, D)`. labels: int64 `(n,)`, 0..K−1. Features are scaled to unit variance, so that one decay fits all encoders.
    """
    x = x.double()
    mean, std = x.mean(dim=0), x.std(dim=0).clamp(min=1e-6)
    x = (x - mean) / std
    K = int(labels.max()) + 1
    weight = torch.zeros(K, x.shape[1], dtype=x.dtype, requires_grad=True)
    bias = torch.zeros(K, dtype=x.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(x, weight, bias), labels) + decay * (weight**2).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    weight, bias = weight.detach() / std, bias.detach()
    return weight.float(), (bias - weight @ mean).float()
