"""ONNX Runtime against numpy on the tiny bundle, and bundles that must be refused."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from patchsight_serve.errors import BundleError
from patchsight_serve.manifest import Manifest, sha256_of
from patchsight_serve.ort_encoder import OrtEncoder, _load_cuda


def test_numbers_are_those_of_numpy(tiny_bundle: Path) -> None:
    model = onnx.load(tiny_bundle / "1" / "model.onnx")
    w = {t.name: numpy_helper.to_array(t).astype(np.float64) for t in model.graph.initializer}
    images = np.random.default_rng(1).integers(0, 256, (3, 16, 16, 3), np.uint8)
    x = (images / 255.0 - w["mean"]) / w["std"]
    patches = x.reshape(3, 4, 4, 4, 4, 3)  # N, row of patches, row, column of patches, column, channel
    tokens = np.einsum("naibjc,dcij->nabd", patches, w["patch"])
    mean = tokens.mean(axis=(1, 2))
    logits = np.einsum("nabd,hd->nhab", tokens, w["head"][:, :, 0, 0])
    weight = np.exp(logits - logits.max(axis=(2, 3), keepdims=True))
    expected = {
        "patch_tokens": tokens,
        "mean_embedding": mean,
        "cls_embedding": mean @ w["cls"],
        "attention": 0.9 * weight / weight.sum(axis=(2, 3), keepdims=True),
    }
    actual = OrtEncoder(tiny_bundle).run(images, list(expected))
    for name, value in expected.items():
        np.testing.assert_allclose(actual[name], value, rtol=1e-4, atol=1e-5)


def test_a_mean_alone_is_that_of_the_whole_graph(tiny_bundle: Path, mean_bundle: Path) -> None:
    images = np.random.default_rng(1).integers(0, 256, (3, 16, 16, 3), np.uint8)
    found, wanted = (
        OrtEncoder(b).run(images, ["mean_embedding"])["mean_embedding"] for b in (mean_bundle, tiny_bundle)
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_a_resnet_that_promises_attention_is_refused(
    make_bundle: Callable[..., Path], tmp_path: Path, rewrite: Callable[..., Path]
) -> None:
    """encoder.json and the graph's own words agree with each other, but not with the graph."""
    bundle = make_bundle(tmp_path / "resnet", patch_size=None, num_heads=None)

    def promise(model: onnx.ModelProto) -> None:
        (entry,) = model.metadata_props
        entry.value = json.dumps(json.loads(entry.value) | {"patch_size": 4, "num_heads": 2})

    told = json.loads((bundle / "encoder.json").read_text())
    (bundle / "encoder.json").write_text(json.dumps(told | {"patch_size": 4, "num_heads": 2}))
    with pytest.raises(BundleError, match="output 'cls_embedding' is None"):
        OrtEncoder(rewrite(bundle, promise))


def test_a_graph_that_says_something_else_is_refused(make_bundle: Callable[..., Path], tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "tiny")
    told = json.loads((bundle / "encoder.json").read_text())
    (bundle / "encoder.json").write_text(json.dumps(told | {"license": "mine"}))
    with pytest.raises(BundleError, match="license = 'mine', the ONNX file says 'CC0-1.0'"):
        OrtEncoder(bundle)


def test_a_graph_without_metadata_is_refused(
    make_bundle: Callable[..., Path], tmp_path: Path, rewrite: Callable[..., Path]
) -> None:
    bundle = rewrite(make_bundle(tmp_path / "tiny"), lambda model: model.ClearField("metadata_props"))
    with pytest.raises(BundleError, match="no metadata 'patchsight'"):
        OrtEncoder(bundle)


def test_a_graph_without_a_promised_output_is_refused(
    make_bundle: Callable[..., Path], tmp_path: Path, rewrite: Callable[..., Path]
) -> None:
    def drop(model: onnx.ModelProto) -> None:
        del model.graph.output[2]

    with pytest.raises(BundleError, match="output 'attention' is None"):
        OrtEncoder(rewrite(make_bundle(tmp_path / "tiny"), drop))


def test_a_graph_of_another_input_size_is_refused(make_bundle: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"not image: uint8 \[N, 32, 32, 3\]"):
        OrtEncoder(make_bundle(tmp_path / "tiny", transform={"resize": 32, "crop": 32}))


def test_a_file_that_is_no_graph_is_refused(make_bundle: Callable[..., Path], tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "tiny")
    (bundle / "1" / "model.onnx").write_bytes(b"no graph")
    told = json.loads((bundle / "encoder.json").read_text())
    (bundle / "encoder.json").write_text(json.dumps(told | {"sha256": sha256_of(bundle / "1" / "model.onnx")}))
    with pytest.raises(BundleError, match="ONNX Runtime cannot load(?!.*bf16)"):
        OrtEncoder(bundle)
    (bundle / "encoder.json").write_text(
        json.dumps(told | {"sha256": sha256_of(bundle / "1" / "model.onnx"), "precision": "bf16"})
    )
    with pytest.raises(BundleError, match="ONNX Runtime cannot load.*; bf16 needs a GPU"):
        OrtEncoder(bundle)


def test_a_provider_that_onnx_runtime_was_built_without_is_refused(tiny_bundle: Path) -> None:
    with pytest.raises(BundleError, match="no usable NoSuchExecutionProvider"):
        OrtEncoder(tiny_bundle, providers=("NoSuchExecutionProvider", "CPUExecutionProvider"))


def test_a_provider_that_cannot_start_is_not_replaced_silently(tiny_bundle: Path) -> None:
    """Without a GPU the CUDA provider is there and does not work, and ONNX Runtime goes on with the CPU."""
    wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
    try:
        encoder = OrtEncoder(tiny_bundle, providers=wanted)
    except BundleError as error:
        assert "no usable CUDAExecutionProvider" in error.message  # noqa: PT017 - a machine with a GPU may load it
    else:
        assert encoder._session.get_providers()[0] == wanted[0]


def test_younger_fields_leave_older_bundles_as_they_are(manifest: Manifest) -> None:
    """A bundle from before them says nothing of them in its graph, and must go on loading."""
    assert not {"precision", "dynamic_size"} & set(json.loads(manifest.metadata()))
    told = json.loads(manifest.model_copy(update={"precision": "int8", "dynamic_size": True}).metadata())
    assert (told["precision"], told["dynamic_size"]) == ("int8", True)


def test_a_graph_of_one_size_is_not_one_of_any_size(tmp_path: Path, make_bundle: Callable[..., Path]) -> None:
    with pytest.raises(BundleError, match=r"not image: uint8 \[N, H, W, 3\]"):
        OrtEncoder(make_bundle(tmp_path / "x", dynamic_size=True), threads=1)


def test_a_missing_library_of_cuda_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """ONNX Runtime prints it; who starts a server is told in the error, with what installs it."""
    monkeypatch.setattr(
        "onnxruntime.preload_dlls", lambda: print("Failed to load libcublasLt.so.13: no such file\nSee")
    )
    assert _load_cuda() == ": Failed to load libcublasLt.so.13: no such file; pip install 'patchsight[gpu]'"
    monkeypatch.setattr("onnxruntime.preload_dlls", lambda: None)
    assert "GPU" in _load_cuda()
    assert capsys.readouterr().out == ""
