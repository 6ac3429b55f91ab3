"""The graphs of one encoder that `gpu_serving.py` compares: in fp32, tf32, fp16 and bf16, as a whole or its blocks."""

import copy
from collections.abc import Callable, Iterator

import onnx
import torch
from onnxruntime.transformers.float16 import convert_float_to_float16
from outputs import Plain
from torch import Tensor, nn

from patchsight_export.to_onnx import OUTPUTS, served, to_onnx
from patchsight_train.vit import ViT

EMBEDDINGS = OUTPUTS[:2]
KEPT = ("LayerNormalization", "Softmax")  # in fp32, in graphs that are converted to fp16


def lowered(encoder: ViT, dtype: torch.dtype) -> ViT:
    """A copy whose blocks compute in another precision as a whole; what is before and after them is float32, as ONNX
    Runtime has no Conv of bf16."""
    copied = copy.deepcopy(encoder)
    copied.blocks.to(dtype)
    copied.blocks[0].register_forward_pre_hook(lambda _, inputs: (inputs[0].to(dtype),))
    copied.norm.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
    return copied


class Float32(nn.Module):
    """All outputs as float32: the attention of a lowered block is not."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return tuple(output.float() for output in self.module(image))


def to_half(model: onnx.ModelProto) -> onnx.ModelProto:
    half: onnx.ModelProto = convert_float_to_float16(copy.deepcopy(model), keep_io_types=True, op_block_list=list(KEPT))
    return half


def graphs(encoder: ViT) -> Iterator[tuple[str, Callable[[], onnx.ModelProto], dict[str, str]]]:
    """Name, graph, and the options of the provider beside those that `OrtEncoder` gives it."""
    size = encoder.config.image_size
    full, full18 = to_onnx(served(encoder), size), to_onnx(served(encoder), size, opset=18)

    def blocks_in(dtype: torch.dtype) -> onnx.ModelProto:
        return to_onnx(Float32(served(lowered(encoder, dtype))), size)

    yield "fp32", lambda: full, {"use_tf32": "0"}
    yield "tf32", lambda: full, {"use_tf32": "1"}
    yield "tf32, opset 18", lambda: full18, {"use_tf32": "1"}
    yield "fp16", lambda: to_half(full), {}
    yield "fp16, opset 18", lambda: to_half(full18), {}
    yield "fp16 blocks", lambda: blocks_in(torch.float16), {}
    yield "bf16 blocks", lambda: blocks_in(torch.bfloat16), {}
    yield "fp16, embeddings alone", lambda: to_half(to_onnx(Plain(encoder), size, EMBEDDINGS)), {}
