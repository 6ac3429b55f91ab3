"""A sound bundle passes; each kind of damage is found, and named."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from patchsight_serve.bundle_check import check
from patchsight_serve.errors import BundleError
from patchsight_serve.manifest import METADATA_KEY, load_manifest, sha256_of

SHIPPED = Path(__file__).resolve().parents[3] / "model_repository" / "mae-vit-cifar10"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A copy of a shipped one."""
    return Path(shutil.copytree(SHIPPED, tmp_path / SHIPPED.name))


def change_graph(bundle: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    """And make the manifest agree, so that nothing but running it tells."""
    path = bundle / "1" / "model.onnx"
    model = onnx.load(path)
    change(model)
    manifest = load_manifest(bundle)
    helper.set_model_props(model, {METADATA_KEY: manifest.metadata()})
    path.write_bytes(model.SerializeToString())
    for name in ("encoder.json", "config.pbtxt"):
        text = (bundle / name).read_text()
        (bundle / name).write_text(text.replace(manifest.sha256, sha256_of(path)))


def scale(model: onnx.ModelProto, output: str, factor: float) -> None:
    """The output, multiplied."""
    graph = model.graph
    for node in graph.node:
        node.output[:] = [f"{output}.before" if name == output else name for name in node.output]
        node.input[:] = [f"{output}.before" if name == output else name for name in node.input]
    graph.initializer.append(numpy_helper.from_array(np.float32(factor), "factor"))
    graph.node.append(helper.make_node("Mul", [f"{output}.before", "factor"], [output]))


def whole_batch(model: onnx.ModelProto) -> None:
    """The mean embedding, less its mean over the batch: an image's numbers depend on its neighbors."""
    scale(model, "mean_embedding", 1.0)
    graph = model.graph
    graph.node[-1].output[0] = "scaled"
    graph.initializer.append(numpy_helper.from_array(np.array([0]), "batch_axis"))
    graph.node.append(helper.make_node("ReduceMean", ["scaled", "batch_axis"], ["over_the_batch"]))
    graph.node.append(helper.make_node("Sub", ["scaled", "over_the_batch"], ["mean_embedding"]))


def test_a_sound_bundle_says_what_was_compared(bundle: Path) -> None:
    lines = check(bundle)
    assert lines[0] == f"sha256 {sha256_of(bundle / '1' / 'model.onnx')}"
    assert [line.split(",")[0] for line in lines[2:]] == ["noise", "photos"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: scale(m, "mean_embedding", float("nan")), "mean_embedding holds a value that is not finite"),
        (lambda m: scale(m, "attention", -1.0), "attention is not one: values from -"),
        (lambda m: scale(m, "attention", 9.0), "attention is not one: .* sums up to"),
        (whole_batch, "on noise an image alone and in a batch differ by"),
    ],
)
def test_a_graph_that_computes_nonsense_is_found(
    bundle: Path, change: Callable[[onnx.ModelProto], None], said: str
) -> None:
    change_graph(bundle, change)
    with pytest.raises(BundleError, match=said):
        check(bundle)


def test_triton_s_file_belongs_to_it(bundle: Path) -> None:
    config = bundle / "config.pbtxt"
    text = config.read_text()
    for wrong, said in [
        (text.replace('"patch_tokens", data', '"tokens", data'), "has output 'patch_tokens' as None"),
        (text.replace('\\"license\\":\\"', '\\"license\\":\\"un'), "tells of another encoder"),
        (text.partition("parameters")[0], "tells of another encoder"),
        (text + "}", "config.pbtxt is no configuration of a model"),
    ]:
        assert wrong != text
        config.write_text(wrong)
        with pytest.raises(BundleError, match=said):
            check(bundle)
    config.unlink()
    with pytest.raises(BundleError, match=r"config.pbtxt is missing"):
        check(bundle)


def test_a_changed_byte_is_found(bundle: Path) -> None:
    path = bundle / "1" / "model.onnx"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleError, match="the file was changed"):
        check(bundle)
