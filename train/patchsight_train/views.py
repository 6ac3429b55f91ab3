"""Augmentations: a batch of pictures to a batch of views, on the device, with random parameters for each image."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from patchsight_train.color import color_jitter, grayscale, jitter_factors, solarize
from patchsight_train.encoder import chunks
from patchsight_train.randomness import Randomness
from patchsight_train.resample import cut, gaussian_blur

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
CACHED = 1 << 19  # numbers that a CPU works on at once: they stay in its cache, and their memory is used again


@dataclass(frozen=True)
class View:
    """One kind of view. Probabilities are per image."""

    size: int  # S, pixels
    scale: tuple[float, float] = (0.08, 1.0)  # share of the picture's area
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width over height
    filter: Literal["bilinear", "bicubic"] = "bicubic"
    flip: float = 0.5
    jitter: tuple[float, float, float, float] | None = None  # brightness, contrast, saturation, hue
    jitter_p: float = 0.8
    gray: float = 0.0
    blur: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize: float = 0.0


@dataclass(frozen=True)
class Drawn:
    """The random parameters of one view of each of B images."""

    boxes: Tensor  # int64 (B, 4): top, left, height, width
    flips: Tensor  # bool (B,), as are jittered, gray, blurred and solarized
    jittered: Tensor
    factors: list[Tensor]  # brightness, contrast, saturation, hue, float32 (B, 1, 1, 1) each
    order: list[int]  # of these four
    gray: Tensor
    blurred: Tensor
    sigma: Tensor  # pixels, float32 (B,)
    solarized: Tensor

    def __getitem__(self, rows: slice) -> "Drawn":
        return Drawn(
            self.boxes[rows], self.flips[rows], self.jittered[rows], [f[rows] for f in self.factors], self.order,
            self.gray[rows], self.blurred[rows], self.sigma[rows], self.solarized[rows],
        )  # fmt: skip


def draw(B: int, height: int, width: int, view: View, random: Randomness) -> Drawn:
    """Parameters for B pictures of `height` × `width` pixels."""
    factors, order = jitter_factors(B, view.jitter or (0.0, 0.0, 0.0, 0.0), random)
    low, high = view.blur_sigma
    return Drawn(
        boxes=random_boxes(B, height, width, view.scale, view.ratio, random),
        flips=chance(B, view.flip, random),
        jittered=chance(B, view.jitter_p if view.jitter else 0.0, random),
        factors=factors,
        order=order,
        gray=chance(B, view.gray, random),
        blurred=chance(B, view.blur, random),
        sigma=low + (high - low) * random.rand(B),
        solarized=chance(B, view.solarize, random),
    )


def augment(images: Tensor, view: View, random: Randomness) -> Tensor:
    """uint8 `(B, 3, n, n)` to one normalized float32 view of each, `(B, 3, S, S)`."""
    B, _, height, width = images.shape
    drawn = draw(B, height, width, view, random)
    pieces = chunks(B, max(1, CACHED // (3 * view.size**2)) if images.device.type == "cpu" else None)
    return torch.cat([apply(images[rows], view, drawn[rows]) for rows in pieces])


def apply(images: Tensor, view: View, drawn: Drawn) -> Tensor:
    """The view that `drawn` describes: uint8 `(B, 3, n, n)` to normalized float32 `(B, 3, S, S)`."""
    x = cut(images, drawn.boxes, view.size, view.filter, drawn.flips)
    if view.jitter is not None:
        chosen = drawn.jittered.nonzero().squeeze(1)
        x[chosen] = color_jitter(x[chosen], [f[chosen] for f in drawn.factors], drawn.order)
    if view.gray:
        chosen = drawn.gray.nonzero().squeeze(1)
        x[chosen] = grayscale(x[chosen])
    if view.blur:
        chosen = drawn.blurred.nonzero().squeeze(1)
        x[chosen] = gaussian_blur(x[chosen], drawn.sigma[chosen])
    if view.solarize:
        x = torch.where(drawn.solarized.view(-1, 1, 1, 1), solarize(x), x)
    return normalize(x)


def normalize(x: Tensor) -> Tensor:
    """`(B, 3, S, S)` in 0..1 to zero mean and unit variance, by ImageNet's statistics."""
    mean, std = (torch.tensor(v, device=x.device).view(3, 1, 1) for v in (MEAN, STD))
    return (x - mean) / std


def denormalize(x: Tensor) -> Tensor:
    """The inverse of `normalize`, cut to 0..1: for people to look at."""
    mean, std = (torch.tensor(v, device=x.device).view(3, 1, 1) for v in (MEAN, STD))
    return (x * std + mean).clamp(0, 1)


def eval_view(images: Tensor) -> Tensor:
    """uint8 `(B, 3, S, S)`, already resized and cut by the decoder, to the normalized float32 the encoder takes."""
    return normalize(images.float() / 255)


def chance(B: int, p: float, random: Randomness) -> Tensor:
    """bool `(B,)`, each true with probability p."""
    return random.rand(B) < p


def random_boxes(
    B: int, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], random: Randomness
) -> Tensor:
    """Inception's random crops: int64 `(B, 4)`: top, left, height, width.

    As torchvision: area uniform in `scale`, aspect log-uniform in `ratio`, ten tries, then the whole picture cut to the
    nearest allowed aspect.
    """
    tries = 10
    u = random.rand(B, 4, tries).unbind(1)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * u[0])
    aspect = torch.exp(math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * u[1])
    w, h = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    valid = (w >= 1) & (w <= width) & (h >= 1) & (h <= height)
    first = valid.int().argmax(dim=1, keepdim=True)  # the first valid try
    w, h = w.gather(1, first).squeeze(1), h.gather(1, first).squeeze(1)
    whole = min(max(width / height, ratio[0]), ratio[1])
    none = ~valid.any(dim=1)
    w = torch.where(none, round(min(width, height * whole)), w)
    h = torch.where(none, round(min(height, width / whole)), h)
    top, left = (u[2][:, 0] * (height - h + 1)).floor(), (u[3][:, 0] * (width - w + 1)).floor()
    return torch.stack([top, left, h, w], dim=1).long()
