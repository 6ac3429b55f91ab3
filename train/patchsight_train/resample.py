"""Cutting, resizing and blurring: a batch of pictures to a batch of views, with a box and a blur for each picture.

On a device they are matrices: a view is `Y @ picture @ Xᵀ` with one small matrix per image and axis. That is exact
(torchvision's antialiased operators, to rounding), needs no loop over images, and runs wherever a matrix product does.
On a CPU torch's own operator, picture by picture, cuts ten times as fast, and weights one at a time blur twice as fast
(docs/decisions.md). Letters: B images, S pixels along a view, n pixels along the picture.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def cut(images: Tensor, boxes: Tensor, S: int, filter: str, flips: Tensor) -> Tensor:
    """uint8 `(B, 3, height, width)` and a box for each to float32 `(B, 3, S, S)` in 0..1, mirrored where `flips`."""
    if images.device.type == "cpu":
        return cut_one_by_one(images, boxes, S, filter, flips)
    return resized_crop(images.float() / 255, boxes, S, filter, flips).clamp(0, 1)


def cut_one_by_one(images: Tensor, boxes: Tensor, S: int, filter: str, flips: Tensor) -> Tensor:
    """The same by torch's operator on uint8, which rounds to it between the axes and at the end, as Pillow does."""
    out = torch.empty(len(images), 3, S, S, dtype=torch.uint8)
    for i, (top, left, h, w) in enumerate(boxes.tolist()):
        box = images[i : i + 1, :, top : top + h, left : left + w]
        out[i] = F.interpolate(box, size=(S, S), mode=filter, antialias=True, align_corners=False)[0]
    return torch.where(flips.view(-1, 1, 1, 1), out.flip(-1), out).float().div_(255)


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
    radius = max(x.shape[-1] // 20, 1)
    offsets = torch.arange(-radius, radius + 1, device=x.device)
    kernel = torch.exp(-0.5 * (offsets / sigma.view(-1, 1)) ** 2)
    kernel = kernel / kernel.sum(dim=1, keepdim=True)  # (B, 2 radius + 1)
    return shifted_sums(x, kernel) if x.device.type == "cpu" else convolved(x, kernel, offsets)


def shifted_sums(x: Tensor, kernel: Tensor) -> Tensor:
    """Both axes convolved with each image's kernel, a weight at a time."""
    S, radius = x.shape[-1], kernel.shape[1] // 2
    weights = kernel[..., None, None, None].unbind(1)
    for axis, padding in ((2, (0, 0, radius, radius)), (3, (radius, radius, 0, 0))):
        padded = F.pad(x, padding, mode="reflect")
        x = padded.narrow(axis, 0, S) * weights[0]
        for i, weight in enumerate(weights[1:], start=1):
            x.addcmul_(padded.narrow(axis, i, S), weight)
    return x


def convolved(x: Tensor, kernel: Tensor, offsets: Tensor) -> Tensor:
    """The same with one matrix per image."""
    S = x.shape[-1]
    source = torch.arange(S, device=x.device).view(S, 1) + offsets
    source = (S - 1) - ((S - 1) - source.abs()).abs()  # reflect without repeating the edge
    M = torch.zeros(len(x), S, S, device=x.device)
    M.scatter_add_(2, source.expand(len(x), -1, -1), kernel.unsqueeze(1).expand(-1, S, -1))
    return M.unsqueeze(1) @ x @ M.transpose(1, 2).unsqueeze(1)
