"""Every way in which a graph can be wrong is seen."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from torch import nn

from patchsight_export.source import read_run
from patchsight_export.to_onnx import served
from patchsight_export.verify import LIMIT, verify
from patchsight_serve.errors import BundleError
from patchsight_serve.manifest import Transform, load_manifest
from patchsight_serve.trial_pictures import BATCHES, noise, photos

PICTURES = {"noise": noise(16)}


@pytest.fixture(scope="module")
def module(run: Path) -> nn.Module:
    return served(read_run(run).encoder)


@pytest.fixture(scope="module")
def outputs(bundle: Path) -> dict[str, tuple[int, ...]]:
    return load_manifest(bundle).outputs


@pytest.fixture
def model(bundle: Path) -> onnx.ModelProto:
    return onnx.load(bundle / "1" / "model.onnx")


def scale(model: onnx.ModelProto, name: str, factor: float) -> None:
    """Multiply one weight."""
    (tensor,) = [t for t in model.graph.initializer if t.name == name]
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(factor), name))


def rewire(model: onnx.ModelProto, output: str, *, through: Callable[[str, str], list[onnx.NodeProto]]) -> None:
    """Put nodes between an output and what makes it."""
    for node in model.graph.node:
        node.output[:] = ["inner" if o == output else o for o in node.output]
        node.input[:] = ["inner" if i == output else i for i in node.input]
    model.graph.node.extend(through("inner", output))


def test_a_good_graph_passes(model: onnx.ModelProto, module: nn.Module, outputs: dict[str, tuple[int, ...]]) -> None:
    pictures = {"noise": noise(16), "photos": photos(Transform(resize=16, crop=16))}
    checks = verify(model.SerializeToString(), module, outputs, pictures)
    assert len(checks) == len(pictures) * (len(BATCHES) + 1) * len(outputs)
    assert {c.output for c in checks} == set(outputs)
    assert max(c.error for c in checks) < LIMIT / 10
    assert max(c.error for c in checks) > 0  # two engines that agree to the last bit were not two


@pytest.mark.parametrize(
    ("weight", "named"),
    [("encoder.norm.weight", r"(cls|mean)_embedding|patch_tokens"), ("encoder.blocks.2.attn.qkv.bias", "attention")],
)
def test_a_wrong_weight_is_seen(
    model: onnx.ModelProto, module: nn.Module, outputs: dict[str, tuple[int, ...]], weight: str, named: str
) -> None:
    scale(model, weight, 1.01)
    with pytest.raises(BundleError, match=rf"not published: ({named}) differs by .*the limit is 0\.0001"):
        verify(model.SerializeToString(), module, outputs, PICTURES)


def test_a_wrong_weight_of_a_resnet_is_seen(resnet_run: Path, resnet_bundle: Path) -> None:
    module, outputs = served(read_run(resnet_run).encoder), load_manifest(resnet_bundle).outputs
    model = onnx.load(resnet_bundle / "1" / "model.onnx")
    assert {c.output for c in verify(model.SerializeToString(), module, outputs, PICTURES)} == {"mean_embedding"}
    scale(model, "encoder.layer4.1.conv2.weight", 1.01)
    with pytest.raises(BundleError, match=r"not published: mean_embedding differs by .*the limit is 0\.0001"):
        verify(model.SerializeToString(), module, outputs, PICTURES)


def test_a_weight_wrong_by_less_than_the_limit_passes(
    model: onnx.ModelProto, module: nn.Module, outputs: dict[str, tuple[int, ...]]
) -> None:
    scale(model, "encoder.norm.weight", 1 + LIMIT / 5)
    verify(model.SerializeToString(), module, outputs, PICTURES)
    scale(model, "encoder.norm.weight", 1 + LIMIT * 5)
    with pytest.raises(BundleError, match="differs by"):
        verify(model.SerializeToString(), module, outputs, PICTURES)


def test_not_a_number_is_seen(model: onnx.ModelProto, module: nn.Module, outputs: dict[str, tuple[int, ...]]) -> None:
    scale(model, "encoder.norm.bias", float("nan"))
    with pytest.raises(BundleError, match="differs by nan"):
        verify(model.SerializeToString(), module, outputs, PICTURES)


def test_an_image_that_feels_its_neighbors_is_seen(
    model: onnx.ModelProto, module: nn.Module, outputs: dict[str, tuple[int, ...]]
) -> None:
    """The largest value of the whole batch leaks into every row: right alone, wrong in company."""
    model.graph.initializer.append(numpy_helper.from_array(np.array([1], np.int64), "last_axis"))

    def leak(inner: str, output: str) -> list[onnx.NodeProto]:
        return [
            helper.make_node("ReduceMax", [inner], ["peak"], keepdims=0),
            helper.make_node("ReduceMax", [inner, "last_axis"], ["own_peak"], keepdims=1),
            helper.make_node("Sub", ["peak", "own_peak"], ["others"]),
            helper.make_node("Add", [inner, "others"], [output]),
        ]

    rewire(model, "cls_embedding", through=leak)
    with pytest.raises(BundleError, match="cls_embedding differs by"):
        verify(model.SerializeToString(), module, outputs, PICTURES)


def test_the_same_graph_must_give_the_same_alone(
    bundle: Path, module: nn.Module, outputs: dict[str, tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With torch out of the way, the comparison of one by one with a batch stands alone."""
    calls: list[int] = []

    def drift(_: object, images: np.ndarray, outputs: dict[str, tuple[int, ...]]) -> list[np.ndarray]:
        calls.append(len(images))
        value = 1.001 if len(images) == 1 else 1
        return [np.full((len(images), *shape), value, np.float32) for shape in outputs.values()]

    monkeypatch.setattr("patchsight_export.verify._run", drift)
    monkeypatch.setattr("patchsight_export.verify._torch", lambda _, images: drift(None, images, outputs))
    with pytest.raises(BundleError, match=r"differs by 0\.001 of its largest value \(one by one, noise\)"):
        verify((bundle / "1" / "model.onnx").read_bytes(), module, outputs, PICTURES)
    assert calls.count(1) >= 8


def test_another_shape_is_seen(model: onnx.ModelProto, module: nn.Module, outputs: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(BundleError, match=r"attention is float32 \(8, 2, 4, 4\) instead of float32 \(8, 4, 2, 4\)"):
        verify(model.SerializeToString(), module, outputs | {"attention": (4, 2, 4)}, PICTURES)


@pytest.mark.parametrize("cut", [0, 100, -1000])
def test_a_damaged_file_is_seen(
    model: onnx.ModelProto, module: nn.Module, outputs: dict[str, tuple[int, ...]], cut: int
) -> None:
    with pytest.raises(BundleError, match="not published: the ONNX file is not valid"):
        verify(model.SerializeToString()[:cut], module, outputs, PICTURES)


def test_an_output_named_like_a_parameter_is_seen(
    model: onnx.ModelProto, module: nn.Module, outputs: dict[str, tuple[int, ...]]
) -> None:
    rewire(
        model, "cls_embedding", through=lambda inner, _: [helper.make_node("Identity", [inner], ["encoder.norm.bias"])]
    )
    model.graph.output[0].name = "encoder.norm.bias"
    with pytest.raises(BundleError, match="not valid"):
        verify(model.SerializeToString(), module, outputs, PICTURES)


def test_photos_are_real_and_differ() -> None:
    images = photos(Transform(resize=16, crop=16))
    assert images.shape == (8, 16, 16, 3)
    assert images.dtype == np.uint8
    assert len({image.tobytes() for image in images}) == 8
    assert 10 < images.std() < 120
