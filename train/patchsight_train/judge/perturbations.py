"""What happens to pictures on their way: recompressed, resized, cropped, noisy, blurred, recolored, mirrored, turned.

Pixels are uint8 `(N, 3, S, S)` on the CPU, before and after, for S of 8 or more. Each picture gets the same treatment
whatever batch it is in, but for noise, which is drawn.
"""

import io
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor

from patchsight_train.color import adjust_brightness, adjust_contrast, adjust_hue, adjust_saturation, grayscale
from patchsight_train.resample import cut, shifted_sums

Harm = Callable[[Tensor, Generator], Tensor]


@dataclass(frozen=True)
class Perturbation:
    """apply: pixels and a generator, of which only noise draws, to pixels of the same shape."""

    name: str
    strength: float
    apply: Harm


def jpeg(quality: int) -> Harm:
    """Written by Pillow, 1 to 95, chroma at half resolution, and read again."""

    def apply(pixels: Tensor, _: Generator) -> Tensor:
        return torch.stack([_through_jpeg(picture, quality) for picture in pixels])

    return apply


def _through_jpeg(picture: Tensor, quality: int) -> Tensor:
    file = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=quality)
    with Image.open(file) as image:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def scale(share: float) -> Harm:
    """To that share of the side and back, bicubic both times: detail is lost."""

    def apply(pixels: Tensor, _: Generator) -> Tensor:
        S = pixels.shape[-1]
        return _resized(_resized(pixels, 0, S, max(round(share * S), 1)), 0, max(round(share * S), 1), S)

    return apply


def crop(share: float) -> Harm:
    """The central square of that share of the side, enlarged to the whole."""

    def apply(pixels: Tensor, _: Generator) -> Tensor:
        S = pixels.shape[-1]
        side = max(round(share * S), 1)
        return _resized(pixels, (S - side) // 2, side, S)

    return apply


def _resized(pixels: Tensor, start: int, side: int, S: int) -> Tensor:
    box = torch.tensor([start, start, side, side]).expand(len(pixels), 4)
    return to_uint8(cut(pixels, box, S, "bicubic", torch.zeros(len(pixels), dtype=torch.bool)))


def noise(sigma: float) -> Harm:
    """Gaussian, in levels of 255, for every pixel and channel."""

    def apply(pixels: Tensor, generator: Generator) -> Tensor:
        return to_uint8((pixels + sigma * torch.randn(pixels.shape, generator=generator)) / 255)

    return apply


def blur(sigma: float) -> Harm:
    """Gaussian, sigma in pixels of a picture of 32, to 3 sigma; edges reflected. (SimCLR's kernel ends much sooner.)"""

    def apply(pixels: Tensor, _: Generator) -> Tensor:
        S = pixels.shape[-1]
        own = max(sigma * S / 32, 1e-6)
        radius = min(math.ceil(3 * own), S - 1)
        kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / own) ** 2)
        return to_uint8(shifted_sums(pixels / 255, (kernel / kernel.sum()).expand(len(pixels), -1)))

    return apply


def color(operator: Callable[[Tensor, Tensor], Tensor], factor: float) -> Harm:
    def apply(pixels: Tensor, _: Generator) -> Tensor:
        return to_uint8(operator(pixels / 255, torch.tensor(factor).view(1, 1, 1, 1)))

    return apply


def to_uint8(x: Tensor) -> Tensor:
    """0..1, cut to it, to 0..255."""
    return (255 * x).round_().clamp_(0, 255).byte()


# From mild to strong, of each name. Brightness, contrast and saturation lose that share (SimCLR's jitter at its two
# usual strengths, at the dark and flat end), the hue turns by that share of the circle.
PERTURBATIONS: tuple[Perturbation, ...] = (
    *(Perturbation("jpeg", q, jpeg(q)) for q in (90, 50, 20, 10)),
    *(Perturbation("scale", s, scale(s)) for s in (0.75, 0.5, 0.25)),
    *(Perturbation("crop", s, crop(s)) for s in (0.9, 0.75, 0.5)),
    *(Perturbation("noise", s, noise(s)) for s in (5, 15, 30)),
    *(Perturbation("blur", s, blur(s)) for s in (0.5, 1, 2)),
    *(Perturbation("brightness", s, color(adjust_brightness, 1 - s)) for s in (0.4, 0.8)),
    *(Perturbation("contrast", s, color(adjust_contrast, 1 - s)) for s in (0.4, 0.8)),
    *(Perturbation("saturation", s, color(adjust_saturation, 1 - s)) for s in (0.4, 0.8)),
    *(Perturbation("hue", s, color(adjust_hue, s)) for s in (0.1, 0.2)),
    Perturbation("gray", 1, lambda pixels, _: to_uint8(grayscale(pixels / 255))),
    Perturbation("flip", 1, lambda pixels, _: pixels.flip(-1)),
    Perturbation("rotation", 90, lambda pixels, _: pixels.rot90(1, (-2, -1))),
)
