"""A published graph as the source of another: its weights as they are, whatever way they are stored."""

import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto

from patchsight_export.__main__ import main
from patchsight_export.bundle_source import read_bundle
from patchsight_serve.errors import BundleError, InvalidRequest
from patchsight_serve.manifest import load_manifest
from patchsight_serve.trial_pictures import noise


def test_weights_that_are_stored_as_fp16_are_float32_again(run: Path, tmp_path: Path) -> None:
    stored = tmp_path / "repository" / "stored"
    main([str(run), str(stored), "--weights", "fp16"])
    manifest, graph = read_bundle(stored)
    assert manifest == load_manifest(stored)
    assert {tensor.data_type for tensor in graph.graph.initializer} <= {TensorProto.FLOAT, TensorProto.INT64}
    onnx.checker.check_model(graph, full_check=True)
    images = noise(16, 3)
    before, after = (
        ort.InferenceSession(model).run(None, {"image": images})
        for model in ((stored / "1" / "model.onnx").read_bytes(), graph.SerializeToString())
    )
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_was_rounded_is_not_rounded_again(bundle: Path, tmp_path: Path) -> None:
    main([str(bundle), str(tmp_path / "half"), "--precision", "fp16"])
    with pytest.raises(InvalidRequest, match="half computes in fp16.*give the bundle in fp32"):
        read_bundle(tmp_path / "half")


def test_a_damaged_bundle(bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle, tmp_path / "tiny")
    with (copy / "1" / "model.onnx").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(BundleError, match="the file was changed"):
        read_bundle(copy)
