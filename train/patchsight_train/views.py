"""Augmentations: a batch of pictures to a batch of views, on the device, with random parameters for each image.

Resampling, flipping and blurring are matrices: a view is `Y @ picture @ Xᵀ` with one small matrix per image and axis.
That is exact (torchvision's antialiased operators, to rounding), needs no loop over images, and runs wherever a matrix
product does. Letters: B images, S pixels along a view, n pixels along the picture.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from patchsight_train.randomness import Randomness

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


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


def augment(images: Tensor, view: View, random: Randomness) -> Tensor:
    """uint8 `(B, 3, n, n)` to one normalized float32 view of each, `(B, 3, S, S)`."""
    B, _, height, width = images.shape
    boxes = random_boxes(B, height, width, view.scale, view.ratio, random)
    flips = chance(B, view.flip, random)
    x = resized_crop(images.float() / 255, boxes, view.size, view.filter, flips).clamp(0, 1)
    if view.jitter is not None:
        factors, order = jitter_factors(B, view.jitter, random)
        chosen = chance(B, view.jitter_p, random).nonzero().squeeze(1)
        x[chosen] = color_jitter(x[chosen], [f[chosen] for f in factors], order)
    if view.gray:
        x = torch.where(chance(B, view.gray, random).view(B, 1, 1, 1), grayscale(x), x)
    if view.blur:
        low, high = view.blur_sigma
        sigma = low + (high - low) * random.rand(B)
        chosen = chance(B, view.blur, random).nonzero().squeeze(1)
        x[chosen] = gaussian_blur(x[chosen], sigma[chosen])
    if view.solarize:
        x = torch.where(chance(B, view.solarize, random).view(B, 1, 1, 1), solarize(x), x)
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


def resample_matrix(start: Tensor, length: Tensor, n: int, S: int, filter: str) -> Tensor:
    """float32 `(B, S, n)`: row i holds the weights of the n input pixels in output pixel i.

    Pillow's and torchvision's antialiased resampling of the interval [start, start + length): the filter widens when
    shrinking, and never looks outside of the interval.
    """
    length = length.float().view(-1, 1, 1)
    i = torch.arange(S, device=start.device).view(1, S, 1)
    j = torch.arange(n, device=start.device).view(1, 1, n) - start.float().view(-1, 1, 1)
    # (j + ½) − (i + ½) · length / S over the stretch max(length / S, 1), with whole numbers up to the one division.
    distance = ((2 * j + 1) * S - (2 * i + 1) * length) / (2 * length.clamp(min=S))
    weights = _triangle(distance) if filter == "bilinear" else _cubic(distance)
    weights = weights * ((j >= 0) & (j < length))
    return weights / weights.sum(dim=2, keepdim=True)


def _triangle(x: Tensor) -> Tensor:
    return (1 - x.abs()).clamp(min=0)


def _cubic(x: Tensor, a: float = -0.5) -> Tensor:
    """Keys' cubic convolution with a = −0.5, as in Pillow."""
    x = x.abs()
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def resized_crop(x: Tensor, boxes: Tensor, S: int, filter: str, flips: Tensor | None = None) -> Tensor:
    """`(B, 3, height, width)` and a box for each to `(B, 3, S, S)`; where `flips` is true, mirrored left to right."""
    top, left, h, w = boxes.unbind(1)
    Y = resample_matrix(top, h, x.shape[2], S, filter)
    X = resample_matrix(left, w, x.shape[3], S, filter)
    if flips is not None:
        X = torch.where(flips.view(-1, 1, 1), X.flip(1), X)
    return Y.unsqueeze(1) @ x @ X.transpose(1, 2).unsqueeze(1)


def gaussian_blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Blur each of `(B, 3, S, S)` by its own `sigma` `(B,)`, pixels; kernel of S / 10 as in SimCLR, edges reflected."""
    S = x.shape[-1]
    radius = max(S // 20, 1)
    offsets = torch.arange(-radius, radius + 1, device=x.device)
    kernel = torch.exp(-0.5 * (offsets / sigma.view(-1, 1)) ** 2)
    kernel = kernel / kernel.sum(dim=1, keepdim=True)
    source = torch.arange(S, device=x.device).view(S, 1) + offsets
    source = (S - 1) - ((S - 1) - source.abs()).abs()  # reflect without repeating the edge
    M = torch.zeros(len(x), S, S, device=x.device)
    M.scatter_add_(2, source.expand(len(x), -1, -1), kernel.unsqueeze(1).expand(-1, S, -1))
    return M.unsqueeze(1) @ x @ M.transpose(1, 2).unsqueeze(1)


def jitter_factors(
    B: int, strength: tuple[float, float, float, float], random: Randomness
) -> tuple[list[Tensor], list[int]]:
    """A factor per image for brightness, contrast, saturation and hue, `(B, 1, 1, 1)` each, and their order.

    As torchvision: uniform in [1 − s, 1 + s], not below 0; for the hue in [−s, s]. The order of the four is drawn once
    per batch (torchvision draws it per image: 24 groups would cost more than they change).
    """
    u = random.rand(B, 4).view(B, 4, 1, 1, 1).unbind(1)
    factors = [(1 - s + 2 * s * u[i]).clamp(min=0) if i < 3 else s * (2 * u[i] - 1) for i, s in enumerate(strength)]
    return factors, [i for i in random.permutation(4) if strength[i]]


def color_jitter(x: Tensor, factors: list[Tensor], order: list[int]) -> Tensor:
    """Brightness, contrast, saturation and hue by `factors`, in `order`."""
    operators = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
    for i in order:
        x = operators[i](x, factors[i])
    return x


def grayscale(x: Tensor) -> Tensor:
    """ITU-R 601-2 luma on all three channels."""
    r, g, b = x.unbind(1)
    return (0.2989 * r + 0.587 * g + 0.114 * b).unsqueeze(1).expand_as(x)


def adjust_brightness(x: Tensor, factor: Tensor) -> Tensor:
    return (x * factor).clamp(0, 1)


def adjust_contrast(x: Tensor, factor: Tensor) -> Tensor:
    mean = grayscale(x)[:, :1].mean(dim=(1, 2, 3), keepdim=True)
    return (x * factor + mean * (1 - factor)).clamp(0, 1)


def adjust_saturation(x: Tensor, factor: Tensor) -> Tensor:
    return (x * factor + grayscale(x) * (1 - factor)).clamp(0, 1)


def adjust_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue by `shift` `(B, 1, 1, 1)`, in turns: −0.5 to 0.5."""
    value, peak = x.max(dim=1)
    low = x.min(dim=1).values
    chroma = value - low
    r, g, b = x.unbind(1)
    safe = torch.where(chroma == 0, 1.0, chroma)
    sector = torch.stack([(g - b) / safe, (b - r) / safe + 2, (r - g) / safe + 4], dim=1)
    hue = sector.gather(1, peak.unsqueeze(1)).squeeze(1) / 6
    hue = hue + shift.squeeze(1)
    # Each channel of a hue is a clipped triangle wave: f(n) = V − C · clamp(min(k, 4 − k), 0, 1), k = (n + 6h) mod 6.
    k = (torch.tensor([5.0, 3.0, 1.0], device=x.device).view(1, 3, 1, 1) + 6 * hue.unsqueeze(1)) % 6
    return value.unsqueeze(1) - chroma.unsqueeze(1) * torch.minimum(k, 4 - k).clamp(0, 1)


def solarize(x: Tensor, threshold: float = 0.5) -> Tensor:
    return torch.where(x >= threshold, 1 - x, x)
