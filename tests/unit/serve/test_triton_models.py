"""Bundles written as models of Triton: whole, again, or not at all."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from patchsight_serve.errors import BundleError, Conflict
from patchsight_serve.manifest import load_manifest, sha256_of
from patchsight_serve.models import main
from patchsight_serve.triton_config import config_pbtxt
from patchsight_serve.triton_models import PYTHON_MODEL, write_triton_models


@pytest.fixture
def bundles(make_bundle: Callable[..., Path], tmp_path: Path) -> list[Path]:
    return [make_bundle(tmp_path / "model_repository" / name) for name in ("a", "b")]


def test_what_the_python_backend_needs(bundles: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "models"
    assert write_triton_models(bundles, folder, "python") == [folder / "a", folder / "b"]
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert files == [
        "a/1/model.onnx", "a/1/model.py", "a/config.pbtxt", "b/1/model.onnx", "b/1/model.py", "b/config.pbtxt",
    ]  # fmt: skip
    assert (folder / "a" / "1" / "model.py").read_bytes() == PYTHON_MODEL.read_bytes()
    assert (folder / "a" / "config.pbtxt").read_text() == config_pbtxt(load_manifest(bundles[0]), "python")
    assert sha256_of(folder / "b" / "1" / "model.onnx") == load_manifest(bundles[1]).sha256


def test_again_replaces_what_was_there(bundles: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "models"
    write_triton_models(bundles, folder, "python")
    write_triton_models(bundles[:1], folder, "onnxruntime", tensorrt_cache="/engines")
    assert not (folder / "a" / "1" / "model.py").exists()
    assert "/engines" in (folder / "a" / "config.pbtxt").read_text()
    assert (folder / "b" / "1" / "model.py").exists()


def test_where_files_cannot_be_linked_they_are_copied(
    bundles: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    (model, _) = write_triton_models(bundles, tmp_path / "models", "python")
    assert (model / "1" / "model.onnx").stat().st_nlink == 1
    assert sha256_of(model / "1" / "model.onnx") == load_manifest(bundles[0]).sha256


def test_a_damaged_bundle_lets_nothing_be_written(bundles: list[Path], tmp_path: Path) -> None:
    (bundles[1] / "1" / "model.onnx").write_bytes(b"x")
    with pytest.raises(BundleError, match="the file was changed"):
        write_triton_models(bundles, tmp_path / "models", "python")
    assert not (tmp_path / "models").exists()


def test_nothing_of_others_is_overwritten(bundles: list[Path], tmp_path: Path) -> None:
    (tmp_path / "models" / "a").mkdir(parents=True)
    (tmp_path / "models" / "a" / "thesis.tex").write_text("x")
    with pytest.raises(Conflict, match="is no model of Triton"):
        write_triton_models(bundles, tmp_path / "models", "python")
    (bundles[0] / "config.pbtxt").write_text("")
    with pytest.raises(Conflict, match="is the bundle itself"):
        write_triton_models(bundles, bundles[0].parent, "python")
    assert sha256_of(bundles[0] / "1" / "model.onnx") == load_manifest(bundles[0]).sha256


def test_the_command(bundles: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model-repository", str(bundles[0].parent), "--to", str(tmp_path / "models")]
    main(["triton", "b", *options])
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["b"]
    main(["triton", *options])
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == ["a", "b"]
    with pytest.raises(SystemExit) as stopped:
        main(["triton", *options, "--tensorrt-cache", "/engines"])
    assert stopped.value.code == 1
    assert "--tensorrt-cache needs --backend onnxruntime" in capsys.readouterr().err
