"""Linear maps in int8: what they compute, by hand; which they are; and that nothing depends on the batch or the day."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from patchsight_export.bundle_source import read_bundle
from patchsight_export.quantization import linear_maps, to_int8
from patchsight_export.source import read_run
from patchsight_export.to_onnx import served, to_onnx
from patchsight_serve.errors import InvalidRequest
from patchsight_serve.trial_pictures import BATCHES, noise


@pytest.fixture(scope="module")
def graph(bundle: Path) -> onnx.ModelProto:
    return read_bundle(bundle)[1]


@pytest.fixture(scope="module")
def quantized(graph: onnx.ModelProto) -> onnx.ModelProto:
    return to_int8(graph, noise(16, 32))


def linear(weight: np.ndarray) -> onnx.ModelProto:
    """uint8 images `(n, 2, 2, 3)` to their 12 numbers / 255 @ weight, twice over."""
    nodes = [
        helper.make_node("Cast", ["image"], ["float"], name="cast", to=TensorProto.FLOAT),
        helper.make_node("Div", ["float", "scale"], ["x"], name="div"),
        helper.make_node("Reshape", ["x", "shape"], ["rows"], name="rows"),
        helper.make_node("MatMul", ["rows", "w"], ["y"], name="product"),
        helper.make_node("Add", ["y", "bias"], ["z"], name="add"),
    ]
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["n", 2, 2, 3])],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, ["n", weight.shape[1]])],
        [
            numpy_helper.from_array(np.float32(255), "scale"),
            numpy_helper.from_array(np.array([-1, 12]), "shape"),
            numpy_helper.from_array(weight, "w"),
            numpy_helper.from_array(np.zeros(weight.shape[1], np.float32), "bias"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def test_a_linear_map_by_hand() -> None:
    """Weights to seven bits by the largest of their column, activations to 255 steps between 0 and the largest seen."""
    random = np.random.default_rng(0)
    weight = random.normal(size=(12, 5)).astype(np.float32) * np.array([1, 10, 0.1, 3, 1], np.float32)
    images = random.integers(0, 256, (64, 2, 2, 3), dtype=np.uint8)
    images[0, 0, 0, 0] = 255
    model = to_int8(linear(weight), images)
    found = ort.InferenceSession(model.SerializeToString()).run(None, {"image": images})[0]
    scale = np.abs(weight).max(axis=0) / 64
    rounded = np.clip(np.round(weight / scale), -64, 64) * scale
    wanted = images.reshape(64, 12) / 255 @ rounded
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    exact = images.reshape(64, 12) / 255 @ weight
    assert np.abs(found - exact).max() > 1e-4 * np.abs(exact).max()  # it was rounded


@pytest.mark.parametrize("opset", [18, 23])
def test_all_linear_maps_of_the_blocks_and_no_other_node(run: Path, opset: int) -> None:
    graph = to_onnx(served(read_run(run).encoder), 16, opset=opset)
    assert len(linear_maps(graph)) == 4 * 3
    model = to_int8(graph, noise(16, 8))
    onnx.checker.check_model(model, full_check=True)
    maker = {name: node for node in model.graph.node for name in node.output}
    in_int8 = {
        node.name
        for node in model.graph.node
        if any(name in maker and maker[name].op_type == "DequantizeLinear" for name in node.input)
        and node.op_type != "QuantizeLinear"
    }
    assert in_int8 == set(linear_maps(graph))
    weights = [t for t in model.graph.initializer if t.data_type == TensorProto.INT8 and len(t.dims) == 2]
    assert len(weights) == 12
    assert max(np.abs(numpy_helper.to_array(t).astype(int)).max() for t in weights) == 64


def test_an_embedding_does_not_depend_on_its_batch(quantized: onnx.ModelProto) -> None:
    session = ort.InferenceSession(quantized.SerializeToString())
    images = noise(16)
    images[3:] //= 4  # dynamic quantization would take its ranges from these
    names = ["cls_embedding", "mean_embedding"]
    alone = [session.run(names, {"image": images[i : i + 1]}) for i in range(max(BATCHES))]
    together = session.run(names, {"image": images})
    for i, whole in enumerate(together):
        single = np.concatenate([values[i] for values in alone])
        np.testing.assert_allclose(single, whole, rtol=0, atol=1e-6 * np.abs(whole).max())


def test_the_same_bytes_in_another_process(bundle: Path, quantized: onnx.ModelProto) -> None:
    """With another seed of Python's hashes, in another folder for temporary files."""
    script = (
        "import hashlib, sys; from pathlib import Path\n"
        "from patchsight_export.bundle_source import read_bundle\n"
        "from patchsight_export.quantization import to_int8\n"
        "from patchsight_serve.trial_pictures import noise\n"
        "model = to_int8(read_bundle(Path(sys.argv[1]))[1], noise(16, 32))\n"
        "sys.stdout.buffer.write(model.SerializeToString(deterministic=True))"
    )
    folder = bundle.parent
    found = subprocess.run(
        [sys.executable, "-c", script, str(bundle)],
        capture_output=True,
        check=True,
        env=os.environ | {"PYTHONHASHSEED": "7", "TMPDIR": str(folder)},
    ).stdout
    assert found == quantized.SerializeToString(deterministic=True)
    assert str(folder).encode() not in found


def test_a_resnet_has_none(resnet_bundle: Path) -> None:
    with pytest.raises(InvalidRequest, match="int8 is for Vision Transformers"):
        to_int8(read_bundle(resnet_bundle)[1], noise(16, 8))
