"""`--precision` by the command: what is published, what is said of it, and what is refused."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from patchsight_export import agreement, quantization
from patchsight_export.__main__ import main
from patchsight_export.precision import LEAST
from patchsight_serve.bundle_check import check
from patchsight_serve.errors import InvalidRequest
from patchsight_serve.manifest import load_manifest
from patchsight_serve.model_card import card
from patchsight_serve.ort_encoder import OrtEncoder
from patchsight_serve.trial_pictures import noise
from patchsight_train.initial import read_encoder

COUNT = 120


@pytest.fixture(autouse=True)
def short_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patchsight_export.agreement.ROUND_S", 0.001)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders of PNG, one file of them damaged."""
    root = tmp_path_factory.mktemp("pictures") / "labelled"
    for i, pixels in enumerate(noise(16, COUNT)):
        path = root / f"class-{i % 3}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels // (1 + i % 3)).save(path)
    (root / "class-1" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n no more")
    return root


@pytest.fixture(scope="module")
def quantized(bundle: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`bundle` in int8, made of the bundle."""
    target = tmp_path_factory.mktemp("repository") / "tiny-int8"
    main([str(bundle), str(target), "--precision", "int8", "--calibrate", str(images)])
    return target


def fails(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 1
    told = capsys.readouterr().err
    assert "Traceback" not in told
    return told


def test_fp16_of_a_run_and_of_its_bundle_are_one_graph(
    run: Path, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(run), str(tmp_path / "of-run"), "--precision", "fp16"])
    told = capsys.readouterr().out
    assert "fp16 against fp32, on 200 images; limit: least cosine 0.999" in told
    assert "cosine of cls_embedding" in told
    main([str(bundle), str(tmp_path / "of-bundle"), "--precision", "fp16"])
    graphs = [onnx.load(tmp_path / name / "1" / "model.onnx").graph for name in ("of-run", "of-bundle")]
    assert graphs[0] == graphs[1]
    full, half = load_manifest(bundle), load_manifest(tmp_path / "of-bundle")
    assert half.precision == "fp16"
    assert half.recipe == (f"# computes in fp16\n# made of the bundle tiny, sha256 {full.sha256}\n{full.recipe}")
    changed = {"name", "sha256", "precision", "recipe", "measured"}
    assert half.model_dump(exclude=changed) == full.model_dump(exclude=changed)


def test_the_server_loads_int8_and_it_is_near(bundle: Path, quantized: Path) -> None:
    full, low = (OrtEncoder(path, threads=1) for path in (bundle, quantized))
    assert low.manifest.precision == "int8"
    pixels = noise(16, 5)
    names = list(full.manifest.outputs)
    wanted, found = full.run(pixels, names), low.run(pixels, names)
    for name in names:
        error = np.abs(wanted[name] - found[name]).max() / np.abs(wanted[name]).max()
        assert found[name].dtype == np.float32
        assert 1e-4 < error < 0.2, name
    assert f"{len(names)} outputs, computed in int8" in check(quantized)[1]


def test_the_verdict_is_kept_beside_the_graph(quantized: Path, images: Path) -> None:
    manifest = load_manifest(quantized)
    figures = manifest.measured["precision"]
    assert figures["images"] == COUNT - COUNT // 4
    assert figures["bytes"] == (quantized / "1" / "model.onnx").stat().st_size < 0.6 * figures["fp32_bytes"]
    assert 0.98 < figures["cosine"]["cls_embedding"]["mean"] < 1
    assert figures["knn"]["images"] == figures["images"]
    assert figures["speed"] > 0
    assert f"# computes in int8, ranges learned from {COUNT // 4} images of {images.name}\n" in manifest.recipe
    assert "precision" not in json.loads(manifest.metadata()).get("measured", {})
    shown = card(manifest, figures["bytes"])
    assert "MB, in int8" in shown
    assert f"## Precision\n\nAgainst the same encoder in fp32, on {figures['images']} images" in shown


def test_the_same_bytes_again_and_no_path_inside(
    bundle: Path, quantized: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(bundle), str(tmp_path / "tiny-int8"), "--precision", "int8", "--calibrate", str(images)])
    told = capsys.readouterr().out
    assert "skipped class-1/broken.png" in told
    again, first = ((path / "1" / "model.onnx").read_bytes() for path in (tmp_path / "tiny-int8", quantized))
    assert again == first
    for path in (images.parent, bundle.parent, tmp_path):
        assert str(path).encode() not in first


def test_ranges_are_learned_from_all_over_a_sorted_set(
    bundle: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[np.ndarray] = []
    original = quantization.Pictures
    monkeypatch.setattr(quantization, "Pictures", lambda pixels: seen.append(pixels) or original(pixels))
    main([str(bundle), str(tmp_path / "x"), "--precision", "int8", "--calibrate", str(images)])
    brightest = [pixels.max() for pixels in seen[0]]
    assert [sum(low < b <= high for b in brightest) for low, high in ((200, 255), (100, 200), (0, 100))] == [10, 10, 10]


def test_settings_that_contradict_each_other(
    run: Path, bundle: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = str(tmp_path / "x")
    told = fails([str(run), target, "--precision", "int8"], capsys)
    assert "--precision int8 needs --calibrate IMAGES" in told
    told = fails([str(run), target, "--precision", "fp16", "--weights", "fp16"], capsys)
    assert "--weights fp16 is for graphs that compute in fp32" in told
    assert "fp32 has nothing to calibrate" in fails([str(run), target, "--calibrate", str(images)], capsys)
    assert "is a bundle already; --precision fp16" in fails([str(bundle), target], capsys)
    told = fails([str(bundle), target, "--precision", "fp16", "--recommend", "mean"], capsys)
    assert "--recommend cannot be had of a bundle" in told
    told = fails([str(bundle), target, "--precision", "fp16", "--opset", "18"], capsys)
    assert "--opset cannot be had of a bundle" in told
    assert list(tmp_path.iterdir()) == []


def test_images_that_will_not_do(
    bundle: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty, few, broken = (tmp_path / name for name in ("empty", "few", "broken"))
    for folder in (empty, few, broken):
        folder.mkdir()
    for i, path in enumerate(sorted(images.rglob("*.png"))[: LEAST - 1]):
        (few / f"{i}.png").write_bytes(path.read_bytes())
    (broken / "a.png").write_bytes(b"nothing")
    argv = [str(bundle), str(tmp_path / "x"), "--precision", "int8", "--calibrate"]
    assert f"{empty}: no image in this folder" in fails([*argv, str(empty)], capsys)
    assert f"--calibrate {few}: {LEAST - 1} images can be read, {LEAST} are needed" in fails([*argv, str(few)], capsys)
    assert "none of the 1 images could be read" in fails([*argv, str(broken)], capsys)
    assert "no such folder" in fails([*argv, str(tmp_path / "nowhere")], capsys)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(("precision", "which"), [("fp16", "least"), ("int8", "mean")])
def test_too_far_from_fp32_is_not_published(
    precision: str, which: str, bundle: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setitem(agreement.LIMITS, precision, 1.1)
    argv = [str(bundle), str(tmp_path / "x"), "--precision", precision, "--calibrate", str(images)]
    told = fails(argv, capsys)
    assert f"not published: at {precision} the {which} cosine of cls_embedding to fp32 is " in told
    assert "images, the limit 1.1" in told
    assert list(tmp_path.iterdir()) == []


def test_bf16_is_refused_where_it_cannot_be_tried(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = fails([str(bundle), str(tmp_path / "x"), "--precision", "bf16"], capsys)
    assert "no bf16 on CPUs, and no GPU can be used here" in told
    assert "use --precision fp16" in told
    assert list(tmp_path.iterdir()) == []


def test_numbers_beyond_fp16_are_not_published(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("patchsight_export.half_range.LARGEST", 1)
    told = fails([str(bundle), str(tmp_path / "x"), "--precision", "fp16"], capsys)
    assert "inside the graph, reaches" in told
    assert list(tmp_path.iterdir()) == []


def test_training_starts_from_a_bundle_in_fp16_and_not_from_one_in_int8(
    run: Path, bundle: Path, quantized: Path, tmp_path: Path
) -> None:
    main([str(bundle), str(tmp_path / "half"), "--precision", "fp16"])
    wanted, found = (read_encoder(path)[0].state_dict() for path in (run, tmp_path / "half"))
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=2**-11, atol=1e-7, msg=name)
    with pytest.raises(InvalidRequest, match="rounded to int8; give the bundle in fp32"):
        read_encoder(quantized)
