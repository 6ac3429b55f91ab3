"""The command, from its arguments to a bundle that the server loads."""

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient

from patchsight_export import to_onnx
from patchsight_export.__main__ import main
from patchsight_serve.app import create_app
from patchsight_serve.manifest import load_manifest
from patchsight_serve.ort_encoder import OrtEncoder
from patchsight_serve.repository import load_encoders
from patchsight_serve.settings import ServeSettings
from patchsight_serve.trial_pictures import noise
from patchsight_train.objective import Objective
from patchsight_train.views import eval_view


def fails(argv: list[str], capsys: pytest.CaptureFixture[str], status: int = 1) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == status
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.err


def test_the_server_loads_what_was_exported(bundle: Path) -> None:
    encoder = load_encoders(bundle.parent, threads=1)["tiny"]
    values = encoder.run(noise(16, 2), list(encoder.manifest.outputs))
    for name, shape in encoder.manifest.outputs.items():
        assert values[name].shape == (2, *shape)


def test_the_server_answers_with_an_exported_resnet(resnet_bundle: Path) -> None:
    """Its mean is what /embed gives; asked for attention it says what it has."""
    (loaded,) = load_encoders(resnet_bundle.parent, threads=1).values()
    images = noise(16, 2)
    pngs = [io.BytesIO() for _ in images]
    for image, file in zip(images, pngs, strict=True):
        Image.fromarray(image).save(file, "PNG")
    files = [("images", file.getvalue()) for file in pngs]
    with TestClient(create_app({"resnet": loaded}, ServeSettings(sample_gallery=False))) as client:
        results = client.post("/embed?normalize=false", files=files).json()["results"]
        refused = client.post("/attention", files=files[:1])
    expected = loaded.run(images, ["mean_embedding"])["mean_embedding"]
    np.testing.assert_allclose([r["embedding"] for r in results], expected, rtol=1e-5, atol=1e-5)
    assert refused.status_code == 400
    assert refused.json()["error"]["message"] == (
        "encoder 'resnet' (ResNet-18, cifar stem) has no output 'attention'; it has embedding, mean"
    )


@pytest.mark.parametrize(("objective", "settings"), [("mae", {}), ("autoencoder", {}), ("dino", {"stem": "conv"})])
def test_the_recommended_embedding_is_what_training_evaluates(
    objective: str, settings: dict[str, str], make_run: Callable[..., Objective], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    made = make_run(tmp_path / "run", objective, **settings)
    main([str(tmp_path / "run"), str(tmp_path / "repository" / "x")])
    encoder = OrtEncoder(tmp_path / "repository" / "x", threads=1)
    images = noise(16, 5)
    with torch.no_grad():
        tokens = made.kept(eval_view(torch.from_numpy(images).permute(0, 3, 1, 2)))
    P = made.kept.config.prefix_tokens
    wanted = (tokens[:, 0] if made.pooling == "cls" else tokens[:, P:].mean(1)).numpy()
    name = f"{encoder.manifest.recommended}_embedding"
    found = encoder.run(images, [name])[name]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())
    told = capsys.readouterr().out
    assert f"{objective}, ViT 24×3" in told
    assert "one by one, photos" in told
    assert load_manifest(tmp_path / "repository" / "x").sha256 in told


def test_a_graph_that_differs_is_not_published(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], bundle: Path
) -> None:
    """Sabotage: the exporter hands over a graph with one wrong weight."""

    def sabotaged(*_: object, **__: object) -> onnx.ModelProto:
        model = onnx.load(bundle / "1" / "model.onnx")
        (weight,) = [t for t in model.graph.initializer if t.name == "encoder.norm.weight"]
        changed = onnx.numpy_helper.to_array(weight).copy()
        changed[5] *= 1.05
        weight.CopyFrom(onnx.numpy_helper.from_array(changed, weight.name))
        return model

    monkeypatch.setattr(to_onnx, "to_onnx", sabotaged)
    told = fails([str(run), str(tmp_path / "repository" / "x")], capsys)
    assert "not published" in told
    assert "differs by" in told
    assert list(tmp_path.iterdir()) == []


def test_another_embedding_can_be_recommended(
    run: Path, resnet_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(run), str(tmp_path / "repository" / "x"), "--recommend", "mean"])
    encoder = load_encoders(tmp_path / "repository", threads=1)["x"]
    assert encoder.manifest.recommended == "mean"
    told = fails([str(resnet_run), str(tmp_path / "repository" / "y"), "--recommend", "cls"], capsys)
    assert "this encoder has no CLS token" in told
    assert not (tmp_path / "repository" / "y").exists()


def test_scaled_decoding_is_declared_in_the_file_and_changes_nothing_else(
    run: Path, bundle: Path, tmp_path: Path
) -> None:
    scaled = tmp_path / "model_repository" / "scaled"
    main([str(run), str(scaled), "--scaled-decode"])
    one, other = OrtEncoder(bundle).manifest, OrtEncoder(scaled).manifest  # which compares with the file's metadata
    assert (one.transform.decoder, other.transform.decoder) == ("pillow", "pillow-scaled")
    assert other.transform == one.transform.model_copy(update={"decoder": "pillow-scaled"})
    assert other.sha256 != one.sha256


def test_an_opset_is_chosen_on_the_command_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(run), str(tmp_path / "repository" / "x"), "--opset", "18"])
    assert onnx.load(tmp_path / "repository" / "x" / "1" / "model.onnx").opset_import[0].version == 18
    assert "Input should be 18 or 23 (got 'new')" in fails(
        [str(run), str(tmp_path / "repository" / "y"), "--opset", "new"], capsys, status=2
    )


def test_mistakes_write_nothing(run: Path, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = str(tmp_path / "repository" / "x")
    assert "not a run folder" in fails([str(tmp_path), target], capsys)
    assert "no checkpoint of step 99" in fails([str(run), target, "--step", "99"], capsys)
    assert "not the name of a bundle" in fails([str(run), "../x"], capsys)
    assert "choose another name" in fails([str(run), str(bundle)], capsys)
    assert "BUNDLE" in fails([str(run)], capsys, status=2)
    assert "opset" in fails([str(run), target, "--opset", "9"], capsys, status=2)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("patchsight_export.repository._write", full)
    assert "No space left on device" in fails([str(run), str(tmp_path / "repository" / "x")], capsys)
    assert list((tmp_path / "repository").iterdir()) == []


def test_a_measurement_is_added(bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "tiny"
    (copy / "1").mkdir(parents=True)
    for name in ("encoder.json", "1/model.onnx"):
        (copy / name).write_bytes((bundle / name).read_bytes())
    (tmp_path / "knn.json").write_text(json.dumps({"accuracy": {"20": 0.5}}))
    main([str(tmp_path / "knn.json"), str(copy)])
    manifest = OrtEncoder(copy, threads=1).manifest
    assert manifest.measured == {"knn": {"accuracy": {"20": 0.5}}}
    assert manifest.sha256 == load_manifest(bundle).sha256


def test_help_loads_nothing_heavy() -> None:
    script = (
        "import sys\n"
        "from patchsight_export.__main__ import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as stopped:\n    assert stopped.code == 0\n"
        "print(sorted({'torch', 'onnx', 'onnxruntime', 'pyarrow', 'numpy'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "SOURCE BUNDLE" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"
