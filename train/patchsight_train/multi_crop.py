"""Multi-crop, arXiv:2006.09882 section 3.2: two global views and n local ones of each image, as DINO and SwAV see them.

BYOL's pair of color distortions (arXiv:2006.07733 App. B) is on the global views, and the first one's on the local.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from patchsight_train.encoder import chunks
from patchsight_train.randomness import Randomness
from patchsight_train.settings import MultiCrop
from patchsight_train.views import View, augment

GLOBAL = 2  # views with most of the picture


def crops(settings: MultiCrop) -> list[View]:
    """The views of one image: two global, then the local ones."""
    size, jitter = settings.image_size, (0.4, 0.4, 0.2, 0.1)
    # Blur is left out at sizes where it would erase the picture.
    blur = (1.0, 0.1, 0.5) if size >= 64 else (0.0, 0.0, 0.0)
    first = View(size, settings.crop_scale, jitter=jitter, gray=0.2, blur=blur[0])
    second = View(size, settings.crop_scale, jitter=jitter, gray=0.2, blur=blur[1], solarize=0.2)
    local = View(settings.local_pixels, settings.local_scale, jitter=jitter, gray=0.2, blur=blur[2])
    return [first, second] + [local] * settings.local_crops


def cut(images: Tensor, views: list[View], random: Randomness) -> list[Tensor]:
    """uint8 `(B, 3, n, n)` to one float32 `(B, 3, S, S)` for each of `views`."""
    return [augment(images, view, random) for view in views]


def batches(views: list[Tensor], micro_batch: int | None) -> Iterator[tuple[Tensor, list[tuple[int, slice]]]]:
    """The views in batches of one size, none with more pixels than the two global ones together.

    So the memory of a step does not grow with the number of local crops.

    Yields:
        pictures `(n, 3, S, S)`, and for each stretch of them (number of the view, its images).
    """
    B = len(views[0])
    images = micro_batch or B
    most = GLOBAL * images * views[0].shape[-1] ** 2  # pixels
    for size in dict.fromkeys(v.shape[-1] for v in views):
        pieces = [(j, rows) for j, v in enumerate(views) if v.shape[-1] == size for rows in chunks(B, images)]
        for group in chunks(len(pieces), max(most // (images * size**2), 1)):
            chosen = pieces[group]
            yield torch.cat([views[j][rows] for j, rows in chosen]), chosen


def swapped_loss(scores: Tensor, pieces: list[tuple[int, slice]], targets: list[Tensor], tau: float) -> Tensor:
    """Sum of H(t, softmax(scores / τ)) over the pairs of a target and another view in `pieces`; a mean over all images.

    Args:
        scores: `(n, K)`, of one of `batches`, whose stretches `pieces` names.
        targets: distributions of each global view, `(B, K)`.
        tau: τ > 0.
    """
    B = len(targets[0])
    with torch.autocast(scores.device.type, enabled=False):
        logs = torch.split((scores.float() / tau).log_softmax(dim=-1), [rows.stop - rows.start for _, rows in pieces])
        terms = [
            cross_entropy(t[rows], log) / B
            for (j, rows), log in zip(pieces, logs, strict=True)
            for i, t in enumerate(targets)
            if i != j
        ]
        return torch.stack(terms).sum()


def cross_entropy(t: Tensor, log_s: Tensor) -> Tensor:
    """H(t, s) = −Σ t log s, summed over images; both `(B, K)`."""
    return -(t * log_s).sum()


def entropy(t: Tensor) -> Tensor:
    """−Σ t log t along the last axis, nats."""
    out: Tensor = -torch.special.xlogy(t, t).sum(dim=-1)
    return out
