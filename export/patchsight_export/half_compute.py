"""A graph that computes in half precision, fp16 or bf16, where that pays: products, convolutions, attention.

Norms, softmax, sums of two branches, pooling, whitening and whatever else is small stay in fp32, as in torch's
autocast; outputs are float32. onnxruntime.transformers.float16 is not used: it knows no bf16, cuts weights off at
10,000 without a word, and leaves nodes behind those that need them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from patchsight_serve.errors import InvalidRequest

FLOAT = TensorProto.FLOAT
BF16_OPSET = 22  # the first whose Conv takes bf16
TYPES: dict[str, tuple[int, Any]] = {
    "fp16": (TensorProto.FLOAT16, np.float16),
    "bf16": (TensorProto.BFLOAT16, ml_dtypes.bfloat16),
}
PRODUCTS = {"MatMul", "Gemm", "Conv", "Attention"}
# Stay in what they are given: no sum of theirs is long, and a cast around each would cost more than it does.
FOLLOWING = {
    "Gelu", "Relu", "Sigmoid", "Mul", "Add", "Reshape", "Transpose", "Slice", "Squeeze", "Unsqueeze", "Split", "Concat",
    "Expand", "Gather", "Identity", "MaxPool",
}  # fmt: skip


def to_half(model: onnx.ModelProto, precision: Literal["fp16", "bf16"]) -> onnx.ModelProto:
    """The same graph, in fp32 so far, with its products in `precision`.

    Raises:
        InvalidRequest: a weight is beyond the range of fp16, 65,504; or bf16 in an opset that has none.
    """
    opset = next(each.version for each in model.opset_import if each.domain == "")
    if precision == "bf16" and opset < BF16_OPSET:
        raise InvalidRequest(f"--precision bf16 needs --opset 23: in opset {opset} convolutions know no bf16")
    types = {value.name: value.type.tensor_type.elem_type for value in _values(model)}
    graph = _Graph({t.name: t for t in model.graph.initializer}, types, *TYPES[precision])
    outputs = {output.name for output in model.graph.output}
    halved = onnx.ModelProto()
    halved.CopyFrom(model)
    for node in halved.graph.node:
        graph.add(node, outputs)
    for output in sorted(outputs & graph.half):
        graph.return_float(output)
    used = {name for node in graph.nodes for name in node.input}
    for changed in ("initializer", "node", "value_info"):
        halved.graph.ClearField(changed)
    halved.graph.initializer.extend(t for t in [*graph.weights.values(), *graph.rounded.values()] if t.name in used)
    halved.graph.node.extend(graph.nodes)
    return halved


def _values(model: onnx.ModelProto) -> Iterator[onnx.ValueInfoProto]:
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    yield from [*graph.input, *graph.value_info, *graph.output]


@dataclass
class _Graph:
    """The nodes so far, and what is in half precision among the tensors that they make.

    weights: constants by name. types: the element type of each tensor that a node of the fp32 graph makes.
    """

    weights: dict[str, onnx.TensorProto]
    types: dict[str, int]
    half_type: int
    dtype: Any
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    half: set[str] = field(default_factory=set)
    rounded: dict[str, onnx.TensorProto] = field(default_factory=dict)  # weights in half precision, by their fp32 name
    casts: set[str] = field(default_factory=set)

    def add(self, node: onnx.NodeProto, outputs: set[str]) -> None:
        in_half = self._computes_in_half(node, outputs)
        for i, name in enumerate(node.input):
            if self._is_float(name) and (name in self.half) != in_half:
                node.input[i] = self._round(name) if in_half else self._cast(name, FLOAT)
        if in_half:
            self.half |= {name for name in node.output if self.types[name] == FLOAT}
            if node.op_type == "Attention":
                node.attribute.append(helper.make_attribute("softmax_precision", FLOAT))
        self.nodes.append(node)

    def return_float(self, output: str) -> None:
        """A Cast in front of an output of the graph."""
        inner = f"{output}.half"
        for node in self.nodes:
            for names in (node.input, node.output):
                names[:] = [inner if name == output else name for name in names]
        self.nodes.append(helper.make_node("Cast", [inner], [output], name=f"{output}.float", to=FLOAT))

    def _computes_in_half(self, node: onnx.NodeProto, outputs: set[str]) -> bool:
        made = [name for name in node.input if self._is_float(name) and name not in self.weights]
        if node.op_type in PRODUCTS:  # a product that leaves the graph at once is the whitening
            return bool(made) and not outputs & set(node.output)
        branches = node.op_type == "Add" and len(made) > 1
        return node.op_type in FOLLOWING and bool(made) and not branches and all(name in self.half for name in made)

    def _is_float(self, name: str) -> bool:
        return self.weights[name].data_type == FLOAT if name in self.weights else self.types.get(name) == FLOAT

    def _round(self, name: str) -> str:
        if name not in self.weights:
            return self._cast(name, self.half_type)
        if name not in self.rounded:
            value = numpy_helper.to_array(self.weights[name])
            with np.errstate(over="ignore"):
                rounded = value.astype(self.dtype)
            if not np.isfinite(rounded.astype(np.float32)).all():
                raise InvalidRequest(f"--precision fp16: {name} holds {np.abs(value).max():g}, beyond fp16's 65,504")
            self.rounded[name] = numpy_helper.from_array(rounded, f"{name}.half")
        return f"{name}.half"

    def _cast(self, name: str, to: int) -> str:
        cast = f"{name}.{'float' if to == FLOAT else 'half'}"
        if cast not in self.casts:
            self.nodes.append(helper.make_node("Cast", [name], [cast], name=f"{cast}.cast", to=to))
            self.casts.add(cast)
        return cast
