"""fp16 in the file, fp32 in the sums: what is stored is exactly what the rounded encoder computes with."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from patchsight_export.__main__ import main
from patchsight_export.half_weights import LEAST, halve, round_to_half, store_half
from patchsight_export.source import read_run
from patchsight_export.to_onnx import ServedViT
from patchsight_serve.errors import BundleError, InvalidRequest
from patchsight_serve.ort_encoder import OrtEncoder
from patchsight_serve.trial_pictures import noise
from patchsight_train.encoder import Encoder
from patchsight_train.initial import read_encoder


@pytest.fixture(scope="module")
def half(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("export") / "model_repository" / "tiny"
    main([str(run), str(target), "--weights", "fp16"])
    return target


@pytest.fixture
def encoder(run: Path) -> Encoder:
    return read_run(run).encoder


def linear(weight: np.ndarray) -> onnx.ModelProto:
    """`x @ weight`, x `(n, k)`."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", weight.shape[0]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", weight.shape[1]])],
        [numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def test_rounding_is_to_the_nearest(encoder: Encoder) -> None:
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    round_to_half(encoder)
    for name, value in encoder.state_dict().items():
        assert value.dtype == torch.float32
        np.testing.assert_array_equal(value.numpy(), before[name].numpy().astype(np.float16).astype(np.float32))


def test_what_half_cannot_hold_is_an_error(encoder: Encoder) -> None:
    name, parameter = next(iter(encoder.named_parameters()))
    parameter.data.view(-1)[0] = -70_000
    with pytest.raises(InvalidRequest, match=f"--weights fp16: {name} holds 70000, beyond"):
        round_to_half(encoder)


@torch.no_grad()
def test_the_cosine_is_of_both_embeddings_on_the_images(encoder: Encoder) -> None:
    images = noise(16, 3)
    before = ServedViT(encoder, {}, both=False)(torch.from_numpy(images))[:2]
    found = halve(encoder, images)
    after = ServedViT(encoder, {}, both=False)(torch.from_numpy(images))[:2]
    cosines = [torch.sum(a * b, 1) / a.norm(dim=1) / b.norm(dim=1) for a, b in zip(before, after, strict=True)]
    assert found == pytest.approx(float(torch.cat(cosines).min()), abs=1e-6)
    assert 0.9 < found < 1


def test_an_encoder_that_half_precision_changes_is_not_published(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("patchsight_export.half_weights.COSINE", 1.1)
    with pytest.raises(BundleError, match="the cosine to the original is .*, the limit 1.1; export it with --weights"):
        halve(encoder, noise(16, 2))


@pytest.mark.parametrize("spoiled", [None, 1 + 2**-20, 1e6])
def test_a_tensor_is_stored_in_half_only_where_that_loses_nothing(spoiled: float | None) -> None:
    weight = np.random.default_rng(0).normal(size=(32, 32)).astype(np.float16).astype(np.float32)
    if spoiled:
        weight[3, 4] = spoiled
    model, x = linear(weight), np.random.default_rng(1).normal(size=(3, 32)).astype(np.float32)
    before = ort.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]
    store_half(model)
    stored = model.graph.initializer[0].data_type
    assert stored == (TensorProto.FLOAT if spoiled else TensorProto.FLOAT16)
    onnx.checker.check_model(model, full_check=True)
    np.testing.assert_array_equal(ort.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0], before)


def test_small_tensors_stay() -> None:
    model = linear(np.ones((LEAST - 1, 1), np.float32))
    store_half(model)
    assert model.graph.initializer[0].data_type == TensorProto.FLOAT


def test_the_bundle_serves_the_rounded_encoder(half: Path, bundle: Path, encoder: Encoder) -> None:
    """Against torch with rounded weights it is exact to rounding in sums; from the fp32 bundle it differs, a little."""
    round_to_half(encoder)
    images = noise(16, 5)
    outputs = ["cls_embedding", "attention"]
    found, full = (OrtEncoder(path, threads=1).run(images, outputs) for path in (half, bundle))
    weights = read_encoder(half)[0].state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in encoder.state_dict().items())
    for name in outputs:
        difference = np.abs(found[name] - full[name]).max() / np.abs(full[name]).max()
        assert 0 < difference < 0.02
    sizes = [(path / "1" / "model.onnx").stat().st_size for path in (half, bundle)]
    assert sizes[0] < 0.75 * sizes[1]
    assert "# weights rounded to fp16" in (half / "encoder.json").read_text()
