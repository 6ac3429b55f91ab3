"""Graphs for pictures of any size: which axes are free, and positions that are interpolated inside the graph.

torch interpolates positions by antialiased bicubic, which is linear and separable: R(h) P R(w)ᵀ, where R depends on the
two sizes alone. The graph computes both R by plain arithmetic, in place of ONNX's Resize: its antialiasing is each
runtime's own, and would not give torch's numbers everywhere. At the native size R is the identity.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from onnxscript import opset18
from torch import Tensor, nn

from patchsight_serve.encoder import Pixels
from patchsight_serve.manifest import Manifest
from patchsight_serve.trial_pictures import noise, unseen_sizes

A = -0.5  # Keys' cubic convolution, as torch and Pillow take it where they antialias
op: Any = opset18  # its annotations do not allow for what the exporter passes
MOST_PATCHES = 1024  # along one side, and for a ResNet pixels of 32
FLOAT = 1  # TensorProto.FLOAT


def dimensions(patch_size: int | None) -> tuple[Any, Any]:
    """Height and width for torch.export: multiples of the patch size; any of a ResNet's from 32 on."""
    if patch_size is None:
        height, width = (torch.export.Dim(name, min=32, max=32 * MOST_PATCHES) for name in ("height", "width"))
        return height, width
    rows, columns = (torch.export.Dim(name, min=1, max=MOST_PATCHES) for name in ("rows", "columns"))
    return patch_size * rows, patch_size * columns


def example_size(patch_size: int | None) -> tuple[int, int]:
    """A size to trace with: no two numbers of it are alike, lest one be taken for the other."""
    return (5 * patch_size, 7 * patch_size) if patch_size else (96, 160)


def other_sizes(manifest: Manifest) -> dict[str, tuple[dict[str, tuple[int, ...]], Pixels]]:
    """What a graph of any size is verified on beside its native one: noise of each of `unseen_sizes`, and the shapes of
    the outputs there, by name. Empty for a graph of one size."""
    if not manifest.dynamic_size:
        return {}
    step = manifest.size_step
    found = {}
    for height, width in unseen_sizes(manifest):
        shapes = manifest.outputs_on(height // step, width // step)
        found[f"torch, noise, {height} × {width}"] = (shapes, noise(height, 2, width))
    return found


@contextmanager
def traceable_rotary(module: nn.Module) -> Iterator[None]:
    """While it lasts, DINOv3's rotary positions are computed so that they can be traced for any grid: timm turns the
    grid's sides into Python's floats, which then are constants of the graph."""
    from timm.layers.pos_embed_sincos import RotaryEmbeddingDinoV3

    found: list[Any] = [each for each in module.modules() if isinstance(each, RotaryEmbeddingDinoV3)]
    for rope in found:
        rope.get_embed = partial(_rotary, rope)
    try:
        yield
    finally:
        for rope in found:
            del rope.get_embed


def _rotary(rope: Any, shape: Sequence[Any]) -> Tensor:
    """Sines and cosines `(h·w, 2·dim)` of positions from -1 to 1."""
    over = {"separate": shape, "min": [torch.sym_min(*shape)] * 2, "max": [torch.sym_max(*shape)] * 2}
    y, x = (
        2 * (torch.arange(side, dtype=torch.float32) + 0.5 + rope.grid_offset) / torch.sym_float(length) - 1
        for side, length in zip(shape, over[rope.normalize_coords], strict=True)
    )
    grid = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).reshape(-1, 2)
    if rope.grid_indexing == "xy":
        grid = grid.flip(-1)
    angles = (2 * math.pi * grid[:, :, None] / rope.periods).flatten(1)
    angles = torch.cat([angles, angles], dim=-1) if rope.rotate_half else angles.repeat_interleave(2, -1)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def resize(x: Any, output_size: Any, align_corners: bool, scales_h: Any = None, scales_w: Any = None) -> Any:
    """`aten::_upsample_bicubic2d_aa` as ONNX: `(N, C, h, w)` to `(N, C, *output_size)`."""
    assert not align_corners
    assert scales_h is None
    assert scales_w is None
    height, width = output_size
    shape = op.Shape(x)
    rows, columns = (op.Gather(shape, op.Constant(value_int=axis)) for axis in (2, 3))
    return op.MatMul(op.MatMul(_matrix(rows, height), x), op.Transpose(_matrix(columns, width), perm=[1, 0]))


def _matrix(inside: Any, outside: Any) -> Any:
    """`(outside, inside)`: by how much each input pixel counts in each output pixel. Rows sum to 1."""
    scale = op.Div(op.Cast(inside, to=FLOAT), op.Cast(outside, to=FLOAT))
    spread = op.Max(scale, _number(1.0))  # antialiasing: a kernel as wide as what an output pixel stands for
    centers, places = op.Mul(_half_integers(outside), scale), _half_integers(inside)
    x = op.Abs(op.Div(op.Sub(places, op.Unsqueeze(centers, op.Constant(value_ints=[1]))), spread))
    near, far = _polynomial(x, A + 2, -A - 3, 0.0, 1.0), _polynomial(x, A, -5 * A, 8 * A, -4 * A)
    outer = op.Where(op.Less(x, _number(2.0)), far, _number(0.0))
    weights = op.Where(op.Less(x, _number(1.0)), near, outer)
    return op.Div(weights, op.ReduceSum(weights, op.Constant(value_ints=[1]), keepdims=1))


def _half_integers(count: Any) -> Any:
    """0.5, 1.5, …, `count` of them: the centers of pixels."""
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    return op.Add(op.Cast(op.Range(zero, count, one), to=FLOAT), _number(0.5))


def _polynomial(x: Any, *coefficients: float) -> Any:
    """By Horner's rule, the highest power first."""
    value = _number(coefficients[0])
    for coefficient in coefficients[1:]:
        value = op.Add(op.Mul(value, x), _number(coefficient))
    return value


def _number(value: float) -> Any:
    return op.Constant(value_float=value)


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.aten._upsample_bicubic2d_aa.default: resize,
}
