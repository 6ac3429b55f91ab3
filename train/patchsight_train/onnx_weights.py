"""The weights of a Vision Transformer, read back from the ONNX graph that `patchsight-export` made of it.

Names do not suffice for that: the exporter stores linear maps transposed under names of its own, joins CLS and
registers into one constant, and keeps equal tensors once. So the graph is read in the order in which it computes.
Letters as in `vit.py`.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor

from patchsight_serve.errors import InvalidRequest
from patchsight_serve.manifest import Manifest
from patchsight_train.architecture import ViTConfig
from patchsight_train.whitening import Whitening

Array = NDArray[np.float32]
LINEAR = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")  # of a block, in order


def read_vit(model: Path, manifest: Manifest) -> tuple[ViTConfig, dict[str, Tensor]]:
    """The architecture, and every parameter of `ViT` by its name, float32 whatever the file stores.

    Raises:
        InvalidRequest: the graph is not that of a ViT of ours, or its weights are integers.
    """
    if manifest.precision == "int8":
        raise InvalidRequest(f"{model}: its weights are rounded to int8; give the bundle in fp32 that it was made of")
    graph = Graph(onnx.load(model).graph)
    try:
        return _read(graph, manifest)
    except LookupError as error:
        raise InvalidRequest(f"{model}: not the graph of a ViT as patchsight-export writes it: {error}") from None


def read_whitening(model: Path) -> dict[str, Whitening]:
    """What the graph's embeddings go through before they leave, by pooling: "cls", "mean", "both". Empty where
    patchsight-export was not told to whiten."""
    graph = Graph(onnx.load(model).graph)
    found = {pooling: graph.whitening(f"{pooling}_embedding") for pooling in ("cls", "mean", "both")}
    return {
        pooling: Whitening(torch.from_numpy(pair[0].copy()), torch.from_numpy(pair[1].copy()))
        for pooling, pair in found.items()
        if pair is not None
    }


def _read(graph: "Graph", manifest: Manifest) -> tuple[ViTConfig, dict[str, Tensor]]:
    convolutions, norms, linears = list(graph.convolutions()), list(graph.norms()), list(graph.linears())
    prefix, positions = graph.prefix(), graph.positions()
    depth, rest = divmod(len(linears), len(LINEAR))
    if rest or len(norms) != 2 * depth + 1 or not convolutions:
        raise LookupError(f"{len(convolutions)} convolutions, {len(norms)} norms and {len(linears)} linear maps")
    if manifest.patch_size is None or manifest.num_heads is None:
        raise LookupError("it has no CLS token")
    config = ViTConfig(
        image_size=manifest.image_size, patch_size=manifest.patch_size, width=manifest.embedding_dim, depth=depth,
        heads=manifest.num_heads, mlp_ratio=linears[2][0].shape[0] / manifest.embedding_dim,
        registers=prefix.shape[1] - 1, stem="conv" if len(convolutions) > 1 else "patch",
        no_embed_class=positions.shape[1] == (manifest.image_size // manifest.patch_size) ** 2,
    )  # fmt: skip
    # In the conv stem a GELU stands between one convolution and the next.
    stem = [
        f"patch_embed.proj.{2 * i}" if config.stem == "conv" else "patch_embed.proj" for i in range(len(convolutions))
    ]
    names = [f"blocks.{i}.{norm}" for i in range(depth) for norm in ("norm1", "norm2")] + ["norm"]
    maps = [f"blocks.{i}.{linear}" for i in range(depth) for linear in LINEAR]
    weights = {"cls_token": prefix[:, :1], "pos_embed": positions}
    if config.registers:
        weights["reg_token"] = prefix[:, 1:]
    for name, (weight, bias) in zip(stem + names + maps, convolutions + norms + linears, strict=True):
        weights |= {f"{name}.weight": weight, f"{name}.bias": bias}
    return config, {name: torch.from_numpy(value.copy()) for name, value in weights.items()}


class Graph:
    """What stands in an ONNX graph, by the order of its nodes, which is that of the computation.

    Methods raise LookupError where something is not there.
    """

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.nodes = list(graph.node)
        self.stored = {tensor.name: tensor for tensor in graph.initializer}
        self.makers = {name: node for node in self.nodes for name in node.output}

    def constant(self, name: str) -> Array | None:
        """float32, or None for what depends on the input."""
        if name in self.stored:
            return numpy_helper.to_array(self.stored[name]).astype(np.float32)
        node = self.makers.get(name)
        if node is None or node.op_type not in ("Cast", "Identity", "Concat"):
            return None
        parts = [self.constant(part) for part in node.input]
        known = [part for part in parts if part is not None]
        if len(known) < len(parts):
            return None
        return np.concatenate(known, axis=node.attribute[0].i) if node.op_type == "Concat" else known[0]

    def convolutions(self) -> Iterator[tuple[Array, Array]]:
        """Weight `(D, 3, p, p)` and bias `(D,)` of each."""
        return (self._parameters(node) for node in self.nodes if node.op_type == "Conv")

    def norms(self) -> Iterator[tuple[Array, Array]]:
        """Weight and bias `(D,)` of each."""
        return (self._parameters(node) for node in self.nodes if node.op_type == "LayerNormalization")

    def linears(self) -> Iterator[tuple[Array, Array]]:
        """Weight `(out, in)`, as torch has it, and bias `(out,)`: each product with a constant, and one added to it."""
        for node in self.nodes:
            for product, bias in ((0, 1), (1, 0)) if node.op_type == "Add" else ():
                maker = self.makers.get(node.input[product])
                if maker is None or maker.op_type != "MatMul":
                    continue
                weight, added = self.constant(maker.input[1]), self.constant(node.input[bias])
                if weight is not None and added is not None:
                    yield weight.T, added

    def prefix(self) -> Array:
        """CLS and registers `(1, P, D)`: the constant that is repeated for each image."""
        return self._first("Expand")

    def positions(self) -> Array:
        """`(1, P + L, D)` or `(1, L, D)`. In a graph for any size those of the patches are a grid `(1, D, g, g)`, which
        a matrix from the left interpolates, and those of the prefix are put in front."""
        constants = (self.constant(node.input[1]) for node in self.nodes if node.op_type == "MatMul")
        grid = next((value for value in constants if value is not None and value.ndim == 4), None)
        if grid is None:
            return self._first("Add")
        patches = grid.reshape(1, grid.shape[1], -1).transpose(0, 2, 1)
        try:
            return np.concatenate([self._first("Concat"), patches], axis=1)
        except LookupError:
            return patches

    def whitening(self, output: str) -> tuple[Array, Array] | None:
        """Mean `(D,)` and W `(D, D)` of an output that ends in (x − mean) W."""
        product = self.makers.get(output)
        if product is None or product.op_type != "MatMul":
            return None
        difference, W = self.makers.get(product.input[0]), self.constant(product.input[1])
        if difference is None or difference.op_type != "Sub" or W is None:
            return None
        mean = self.constant(difference.input[1])
        return None if mean is None else (mean, W)

    def _first(self, operator: str) -> Array:
        """The first constant of three axes that an operator of this kind takes."""
        for node in self.nodes:
            for name in node.input if node.op_type == operator else ():
                value = self.constant(name)
                if value is not None and value.ndim == 3 and value.shape[0] == 1:
                    return value
        raise LookupError(f"no {operator} with tokens or positions")

    def _parameters(self, node: onnx.NodeProto) -> tuple[Array, Array]:
        values = [self.constant(name) for name in node.input[1:3]]
        if len(values) < 2 or values[0] is None or values[1] is None:
            raise LookupError(f"{node.op_type} without constant weight and bias")
        return values[0], values[1]
