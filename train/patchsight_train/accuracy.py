"""How well a classifier does on labelled images: top-1 with its interval, in all and of each class."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from patchsight_train.classification import Classification
from patchsight_train.data import Images
from patchsight_train.encoder import chunks
from patchsight_train.evaluation import BATCH, encoder_view, undisturbed


@dataclass(frozen=True)
class Accuracy:
    """right, total: images, int64 `(C,)` each, by class."""

    right: Tensor
    total: Tensor

    @property
    def top1(self) -> float:
        """Share of the images that are classified rightly, 0..1."""
        return int(self.right.sum()) / int(self.total.sum())

    @property
    def interval(self) -> tuple[float, float]:
        """95 %, of top-1."""
        return wilson(int(self.right.sum()), int(self.total.sum()))

    def per_class(self, names: list[str] | None) -> dict[str, dict[str, float]]:
        """By name, or by number where there are no names, of each class that has images."""
        found = zip(self.right.tolist(), self.total.tolist(), strict=True)
        return {
            names[c] if names else str(c): {"accuracy": right / total, "images": total}
            for c, (right, total) in enumerate(found)
            if total
        }


def measure(objective: Classification, images: Images, device: torch.device) -> Accuracy:
    """Of labelled images, one or more. An image of a class beyond the head's is never right."""
    assert images.labels is not None
    predicted = classify(objective, images.pixels, device)
    right = images.labels[predicted == images.labels]
    classes = int(images.labels.max()) + 1
    return Accuracy(*(torch.bincount(labels, minlength=classes) for labels in (right, images.labels)))


def classify(objective: Classification, pixels: Tensor, device: torch.device) -> Tensor:
    """uint8 `(N, 3, n, n)` at the eval transform to the likeliest class of each, int64 `(N,)` on the CPU; float32."""
    size, parts = objective.kept.config.image_size, []
    with undisturbed(objective):
        for rows in chunks(len(pixels), BATCH):
            parts.append(objective.logits(encoder_view(pixels[rows].to(device), size)).argmax(dim=1).cpu())
    return torch.cat(parts)


def wilson(right: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a share; 95 % with this z. As in `patchsight_serve.protocol`; a test holds the two
    equal."""
    p = right / total
    center = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    # At the ends the formula is exact, its rounding is not.
    return (0.0 if right == 0 else center - half), (1.0 if right == total else center + half)
