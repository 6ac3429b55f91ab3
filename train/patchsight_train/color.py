"""Color distortions: pictures `(B, 3, S, S)` in 0..1, each with its own factor `(B, 1, 1, 1)`, to pictures in 0..1."""

import torch
from torch import Tensor

from patchsight_train.randomness import Randomness


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
    r, g, b = x.unbind(1)  # three planes: a maximum along an axis of 3 would be slow on a CPU
    value, low = torch.maximum(torch.maximum(r, g), b), torch.minimum(torch.minimum(r, g), b)
    chroma = value - low
    per_chroma = chroma.clamp(min=1e-12).reciprocal_()  # where it is 0 the differences are, too
    sector = torch.where(
        value == r,
        (g - b).mul_(per_chroma),
        torch.where(value == g, (b - r).mul_(per_chroma).add_(2), (r - g).mul_(per_chroma).add_(4)),
    )
    hue = sector.div_(6).add_(shift.squeeze(1))  # in turns
    turned = torch.empty_like(x)
    # Each channel of a hue is a clipped triangle wave: f(n) = V − C · clamp(2 − |k − 2|, 0, 1), k = (n + 6h) mod 6.
    for i, n in enumerate((5, 3, 1)):
        k = hue + n / 6
        k.sub_(k.floor()).mul_(6)  # twice as fast as a remainder, and all in place: memory is what takes time here
        wave = k.sub_(2).abs_().neg_().add_(2).clamp_(0, 1)
        torch.addcmul(value, chroma, wave, value=-1, out=turned[:, i])
    return turned


def solarize(x: Tensor, threshold: float = 0.5) -> Tensor:
    return torch.where(x >= threshold, 1 - x, x)
