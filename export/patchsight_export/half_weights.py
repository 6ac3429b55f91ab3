"""Weights stored as fp16 and computed with in fp32: half the file, the same graph.

The encoder is rounded first, and then its whitening; what is compared with the graph is what was rounded, so that the
file itself adds nothing to the error. ONNX Runtime turns the weights back when it loads the graph: a request pays
nothing for it.
"""

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from patchsight_serve.errors import BundleError, InvalidRequest
from patchsight_train.encoder import Encoder, pool
from patchsight_train.views import eval_view

COSINE = 0.999  # of a rounded encoder's embeddings to the original's, at least
LEAST = 1024  # numbers in a tensor: a Cast of its own is not worth it for fewer


@torch.no_grad()
def round_to_half(module: nn.Module) -> None:
    """Every parameter and buffer of floating point to the nearest fp16 value, kept as float32.

    Raises:
        InvalidRequest: a value is beyond the range of fp16, 65,504.
    """
    for name, value in module.state_dict().items():  # tensors that share the module's memory
        if value.is_floating_point():
            rounded = value.half().float()
            if not rounded.isfinite().all():
                raise InvalidRequest(f"--weights fp16: {name} holds {value.abs().max():g}, beyond fp16's 65,504")
            value.copy_(rounded)


@torch.no_grad()
def halve(encoder: Encoder, images: NDArray[np.uint8]) -> float:
    """`round_to_half`, and the least cosine of an embedding, CLS or mean, to what it was, over images `(N, S, S, 3)`.

    Raises:
        InvalidRequest: as `round_to_half`.
        BundleError: it is below `COSINE`.
    """
    x, P = eval_view(torch.from_numpy(images).permute(0, 3, 1, 2)), encoder.config.prefix_tokens
    kinds = ("cls", "mean") if P else ("mean",)
    before = encoder(x)
    round_to_half(encoder)
    after = encoder(x)
    pairs = [(pool(before, P, kind), pool(after, P, kind)) for kind in kinds]
    least = min(float(F.cosine_similarity(a, b).min()) for a, b in pairs)
    if not least >= COSINE:
        raise BundleError(f"not published: with weights rounded to fp16 the cosine to the original is {least:.5f}, the "
                          f"limit {COSINE}; export it with --weights fp32")  # fmt: skip
    return least


def store_half(model: onnx.ModelProto) -> None:
    """Store each large float32 constant of the graph as float16 where that loses nothing, and a Cast behind it."""
    graph = model.graph
    casts = []
    for tensor in graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or np.prod(tensor.dims) < LEAST:
            continue
        value = numpy_helper.to_array(tensor)
        with np.errstate(over="ignore"):
            half = value.astype(np.float16)
        if np.array_equal(half.astype(np.float32), value):
            casts.append(helper.make_node("Cast", [f"{tensor.name}.half"], [tensor.name], to=TensorProto.FLOAT))
            tensor.CopyFrom(numpy_helper.from_array(half, f"{tensor.name}.half"))
    nodes = [*casts, *graph.node]  # a node comes after those that make its inputs
    del graph.node[:]
    graph.node.extend(nodes)
