"""Graphs for pictures of any size: positions as torch interpolates them, at sizes that nobody traced."""

import io
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from public_layouts import dinov3, randomized, vit
from starlette.testclient import TestClient
from torch import Tensor, nn

from patchsight_export.__main__ import main
from patchsight_export.dynamic_size import TRANSLATIONS
from patchsight_export.public_encoder import wrap
from patchsight_export.source import read_run
from patchsight_export.to_onnx import OUTPUTS, served, to_onnx
from patchsight_serve.app import create_app
from patchsight_serve.bundle_check import check
from patchsight_serve.decode import decode
from patchsight_serve.manifest import Transform, load_manifest
from patchsight_serve.openvino_encoder import OpenvinoEncoder
from patchsight_serve.ort_encoder import OrtEncoder
from patchsight_serve.settings import ServeSettings
from patchsight_serve.trial_pictures import noise
from patchsight_serve.triton_config import config_pbtxt
from patchsight_train.architecture import ResNetConfig
from patchsight_train.onnx_weights import read_vit
from patchsight_train.resnet import ResNet
from patchsight_train.views import MEAN, STD


class Grid(nn.Module):
    """Positions `(1, 5, 7, 6)` to the size of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(1, 5, 7, 6))

    def forward(self, image: Tensor) -> Tensor:
        size = (image.shape[1], image.shape[2])
        return F.interpolate(self.positions, size=size, mode="bicubic", antialias=True, align_corners=False)


@pytest.mark.parametrize("opset", [18, 23])
def test_positions_are_those_of_torch(opset: int) -> None:
    torch.manual_seed(0)
    module = Grid().eval()
    axes = {1: torch.export.Dim("h", min=1, max=99), 2: torch.export.Dim("w", min=1, max=99)}
    program = torch.onnx.export(
        module, (torch.zeros(1, 9, 11, 3),), dynamo=True, opset_version=opset, dynamic_shapes={"image": axes},
        custom_translation_table=TRANSLATIONS, verbose=False,
    )  # fmt: skip
    assert program is not None
    assert not [node for node in program.model_proto.graph.node if node.op_type == "Resize"]
    session = ort.InferenceSession(program.model_proto.SerializeToString())
    for h, w in ((7, 6), (1, 1), (2, 3), (4, 13), (8, 5), (14, 12), (31, 2), (64, 64)):
        image = torch.zeros(1, h, w, 3)
        (found,) = session.run(None, {"image": image.numpy()})
        np.testing.assert_allclose(found, module(image).detach().numpy(), rtol=0, atol=3e-6)
        if (h, w) == (7, 6):
            np.testing.assert_array_equal(found, module.positions.detach().numpy())


def differences(module: nn.Module, model: onnx.ModelProto, height: int, width: int) -> list[float]:
    """max|a − b| / max|b| of each output against torch."""
    images = noise(height, 2, width)
    found = ort.InferenceSession(model.SerializeToString()).run(None, {"image": images})
    with torch.no_grad():
        wanted = [value.numpy() for value in module(torch.from_numpy(images))]
    assert [a.shape for a in found] == [b.shape for b in wanted]
    return [float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(found, wanted, strict=True)]


# Positions of CLS, without; DINOv3's registers, whose positions are computed for each size.
NETWORKS: dict[str, Any] = {
    "CLS has a position": lambda: vit(dynamic_img_size=True),
    "DINOv3": lambda: dinov3(dynamic_img_size=True),
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_networks_of_timm_at_any_size(kind: str) -> None:
    """timm's own network, which interpolates by torch, is the oracle; 28 pixels are its own size."""
    module = served(wrap(NETWORKS[kind](), 28, MEAN, STD, kind))
    model = to_onnx(module, 28, OUTPUTS, dynamic=True)
    for height, width in ((28, 28), (7, 7), (42, 42), (56, 21)):
        assert max(differences(module, model, height, width)) < 1e-5


def test_a_resnet_at_any_size() -> None:
    module = served(randomized(ResNet(ResNetConfig(64, 18, "imagenet"))))
    model = to_onnx(module, 64, ("mean_embedding",), opset=18, dynamic=True)
    for height, width in ((64, 64), (32, 32), (97, 131)):
        assert max(differences(module, model, height, width)) < 1e-5


@pytest.fixture(scope="module", params=[18, 23])
def any_size(request: pytest.FixtureRequest, run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of 16 pixels and patches of 4 through the command."""
    target = tmp_path_factory.mktemp("export") / "repository" / "x"
    main([str(run), str(target), "--dynamic-size", "--opset", str(request.param)])
    return target


def assert_close(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    for name, value in found.items():
        limit = 1e-5 * np.abs(expected[name]).max()
        np.testing.assert_allclose(value, expected[name], rtol=0, atol=limit, err_msg=name)


def test_through_the_command(any_size: Path, run: Path, bundle: Path) -> None:
    manifest, module = load_manifest(any_size), served(read_run(run).encoder)
    assert manifest.dynamic_size
    assert manifest.outputs == load_manifest(bundle).outputs
    model = onnx.load(any_size / "1" / "model.onnx")
    for height, width in ((16, 16), (4, 4), (32, 32), (12, 40)):
        assert max(differences(module, model, height, width)) < 1e-5
    encoder = OrtEncoder(any_size, threads=1)
    images, names = noise(16, 3), list(manifest.outputs)
    assert_close(encoder.run(images, names), OrtEncoder(bundle, threads=1).run(images, names))
    other = OpenvinoEncoder(any_size, threads=1)
    for images in (noise(16, 3), noise(4, 1), noise(32, 2), noise(12, 1, 40)):
        assert_close(other.run(images, names), encoder.run(images, names))
    assert encoder.run(noise(24, 1, 8), ["attention"])["attention"].shape == (1, 2, 6, 2)
    assert check(any_size)[-1] == "takes any size, tried on 8 × 8, 24 × 24, 28 × 8: finite"
    assert "dims: [-1, -1, 3]" in config_pbtxt(manifest)
    assert "dims: [2, -1, -1]" in (any_size / "config.pbtxt").read_text()


def test_training_begins_from_it(any_size: Path, run: Path) -> None:
    config, weights = read_vit(any_size / "1" / "model.onnx", load_manifest(any_size))
    assert config == read_run(run).encoder.config
    for name, value in read_run(run).encoder.state_dict().items():
        np.testing.assert_allclose(weights[name].numpy(), value.numpy(), rtol=0, atol=1e-6, err_msg=name)


def test_a_graph_that_is_tied_to_a_size_is_not_published(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An interpolation that is right at the native size alone, as any constant in the trace would be."""
    from onnxscript import opset18

    def nearest(x: Any, output_size: Any, *_: object) -> Any:
        shape = opset18.Concat(opset18.Constant(value_ints=[1, 24]), *(
            opset18.Unsqueeze(n, opset18.Constant(value_ints=[0])) for n in output_size), axis=0)  # fmt: skip
        return opset18.Resize(x, None, None, shape, mode="nearest")

    table = {torch.ops.aten._upsample_bicubic2d_aa.default: nearest}
    monkeypatch.setattr("patchsight_export.to_onnx.TRANSLATIONS", table)
    with pytest.raises(SystemExit):
        main([str(run), str(tmp_path / "repository" / "x"), "--dynamic-size"])
    said = capsys.readouterr().err
    assert "differs by" in said
    assert "(torch, noise, " in said
    assert not (tmp_path / "repository").exists()


def test_what_timm_computes_of_dinov3_s_positions_would_be_tied_to_one_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why `traceable_rotary` is there; when this fails, timm has changed, and it can go."""
    monkeypatch.setattr("patchsight_export.to_onnx.traceable_rotary", lambda _: nullcontext())
    module = served(wrap(dinov3(dynamic_img_size=True), 28, MEAN, STD, "x"))
    model = to_onnx(module, 28, OUTPUTS, dynamic=True)
    assert max(differences(module, model, 56, 21)) > 1e-3


def test_it_is_served_at_the_size_that_is_asked_for(any_size: Path) -> None:
    """What the server answers is what the graph makes of the larger picture."""
    encoder = OrtEncoder(any_size, threads=1)
    photo = io.BytesIO()
    Image.fromarray(noise(50, 1, 70)[0]).save(photo, "PNG")
    with TestClient(create_app({"x": encoder}, ServeSettings(sample_gallery=False))) as client:
        headers = {"Content-Type": "image/png", "Accept": "application/octet-stream"}
        reply = client.post("/attention", content=photo.getvalue(), headers=headers, params={"size": 32, "head": 1})
    pixels = decode(photo.getvalue(), Transform(resize=32, crop=32))[None]
    wanted = encoder.run(pixels, ["attention"])["attention"][0, 1]
    assert reply.headers["X-Shape"] == "8,8"
    np.testing.assert_array_equal(np.frombuffer(reply.content, "<f4").reshape(8, 8), wanted)
