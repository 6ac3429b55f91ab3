"""Products in half precision, the rest in fp32: by what stands in the graph, and by what it computes."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator

from patchsight_export.agreement import cosine
from patchsight_export.bundle_source import read_bundle
from patchsight_export.half_compute import to_half
from patchsight_export.source import read_run
from patchsight_export.to_onnx import served, to_onnx
from patchsight_serve.errors import InvalidRequest
from patchsight_serve.trial_pictures import noise
from patchsight_train.whitening import Whitening

EMBEDDINGS = ["cls_embedding", "mean_embedding"]
FLOAT32 = {"LayerNormalization", "Softmax", "ReduceMean", "ReduceL2", "Sub"}


@pytest.fixture(scope="module", params=[18, 23])
def graph(request: pytest.FixtureRequest, run: Path) -> onnx.ModelProto:
    return to_onnx(served(read_run(run).encoder), 16, opset=request.param)


def types_of(model: onnx.ModelProto) -> dict[str, int]:
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    types = {value.name: value.type.tensor_type.elem_type for value in [*inferred.value_info, *inferred.output]}
    return types | {tensor.name: tensor.data_type for tensor in model.graph.initializer}


def test_products_are_half_and_what_sums_many_numbers_is_not(graph: onnx.ModelProto) -> None:
    half = to_half(graph, "fp16")
    onnx.checker.check_model(half, full_check=True)
    types, kinds = types_of(half), Counter[tuple[str, int]]()
    for node in half.graph.node:
        if node.op_type in {"MatMul", "Conv", "Attention"} | FLOAT32:
            kinds[node.op_type, types[node.output[0]]] += 1
    assert {kind for kind, _ in kinds} >= {"MatMul", "Conv", "LayerNormalization", "Softmax", "ReduceMean"}
    for kind, found in kinds:
        assert found == (TensorProto.FLOAT if kind in FLOAT32 else TensorProto.FLOAT16), kind
    # Sums of two branches: the residual stream.
    made = {name for node in half.graph.node for name in node.output}
    branches = [n for n in half.graph.node if n.op_type == "Add" and all(name in made for name in n.input)]
    assert len(branches) == 6
    assert all(types[node.output[0]] == TensorProto.FLOAT for node in branches)
    assert all(output.type.tensor_type.elem_type == TensorProto.FLOAT for output in half.graph.output)
    assert half.graph.input[0].type.tensor_type.elem_type == TensorProto.UINT8


def test_softmax_inside_attention_is_fp32(graph: onnx.ModelProto) -> None:
    for node in to_half(graph, "fp16").graph.node:
        if node.op_type == "Attention":
            assert {a.name: a.i for a in node.attribute}["softmax_precision"] == TensorProto.FLOAT


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_by_the_reference_evaluator_it_is_the_same_encoder(run: Path, precision: str) -> None:
    """The specification's own evaluator rounds at every node; fp16 has 11 bits, bf16 8."""
    graph = to_onnx(served(read_run(run).encoder), 16)
    images = noise(16, 4)
    wanted = ort.InferenceSession(graph.SerializeToString()).run(EMBEDDINGS, {"image": images})
    half = to_half(graph, precision)  # type: ignore[arg-type]
    onnx.checker.check_model(half, full_check=True)
    found = ReferenceEvaluator(half).run(EMBEDDINGS, {"image": images})
    bits = {"fp16": 11, "bf16": 8}[precision]
    for a, b in zip(wanted, found, strict=True):
        assert b.dtype == np.float32
        error = np.abs(a - b).max() / np.abs(a).max()
        assert 2.0 ** (-bits - 4) < error < 2.0 ** (-bits + 4)


def test_onnx_runtime_computes_what_the_reference_does(graph: onnx.ModelProto) -> None:
    images, half = noise(16, 4), to_half(graph, "fp16")
    found = ort.InferenceSession(half.SerializeToString()).run(None, {"image": images})
    for a, b in zip(found, ReferenceEvaluator(half).run(None, {"image": images}), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=4e-3 * np.abs(b).max())


def test_whitening_stays_in_fp32(run: Path) -> None:
    encoder = read_run(run).encoder
    random = np.random.default_rng(0)
    whiten = {
        kind: Whitening(torch.zeros(24), torch.from_numpy(random.normal(size=(24, 24)).astype(np.float32)))
        for kind in ("cls", "mean")
    }
    half = to_half(to_onnx(served(encoder, whiten), 16), "fp16")
    maker = {name: node for node in half.graph.node for name in node.output}
    constants = {tensor.name: tensor for tensor in half.graph.initializer}
    for name in EMBEDDINGS:
        assert maker[name].op_type == "MatMul"
        assert constants[maker[name].input[1]].data_type == TensorProto.FLOAT


def test_a_resnet_too(resnet_bundle: Path) -> None:
    _, graph = read_bundle(resnet_bundle)
    half = to_half(graph, "fp16")
    onnx.checker.check_model(half, full_check=True)
    images = noise(16, 4)
    a, b = (ort.InferenceSession(m.SerializeToString()).run(None, {"image": images})[0] for m in (graph, half))
    assert 0.9999 < cosine(a, b).min() < 1
    assert half.ByteSize() < 0.51 * graph.ByteSize()


def test_a_weight_that_fp16_cannot_hold(graph: onnx.ModelProto) -> None:
    spoiled = onnx.ModelProto()
    spoiled.CopyFrom(graph)
    products = {node.input[1] for node in spoiled.graph.node if node.op_type == "MatMul"}
    tensor = next(t for t in spoiled.graph.initializer if t.name in products)
    value = numpy_helper.to_array(tensor).copy()
    value[1, 2] = -70_000
    tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    with pytest.raises(InvalidRequest, match=f"{tensor.name} holds 70000, beyond fp16's 65,504"):
        to_half(spoiled, "fp16")


def test_bf16_is_not_in_opset_18(run: Path) -> None:
    with pytest.raises(InvalidRequest, match="bf16 needs --opset 23: in opset 18"):
        to_half(to_onnx(served(read_run(run).encoder), 16, opset=18), "bf16")
