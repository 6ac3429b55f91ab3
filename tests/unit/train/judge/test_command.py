"""patchsight-eval from the command line to report.html, on a tiny encoder and small pictures."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from patchsight_serve.embed import main as embed_command
from patchsight_serve.embedding_file import written
from patchsight_serve.item import Identity
from patchsight_train.__main__ import train
from patchsight_train.architecture import architecture
from patchsight_train.build import build_encoder
from patchsight_train.initial import read_encoder
from patchsight_train.judge.__main__ import main
from patchsight_train.objective_settings import SETTINGS
from patchsight_train.probe import embed, knn_predict

TINY: dict[str, Any] = {
    "image_size": 16, "patch_size": 4, "width": 16, "depth": 2, "heads": 2, "epochs": 1, "batch_size": 8,
    "warmup_epochs": 0, "device": "cpu", "precision": "fp32", "knn_every": 0,
}  # fmt: skip
COLORS = {"blue": (30, 60, 220), "green": (40, 190, 60), "red": (220, 40, 30)}


def pictures(folder: Path, each: int, seed: int, classes: tuple[str, ...] = tuple(COLORS), gray: bool = False) -> Path:
    """Noisy pictures of one color, a folder for each class."""
    rng = np.random.default_rng(seed)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(each):
            pixels = (np.array(COLORS[name]) + rng.normal(0, 25, (20, 24, 3))).clip(0, 255).astype(np.uint8)
            image = Image.fromarray(pixels)
            (image.convert("L") if gray else image).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    torch.set_num_threads(1)
    settings = SETTINGS["simclr"](
        **TINY, data=[str(pictures(folder / "images", 8, 0))], run=folder / "tiny", projection_hidden=16
    )
    return train(settings)


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("sides")
    return pictures(folder / "train", 12, 1), pictures(folder / "test", 5, 2)


def judged(out: Path, *arguments: str | Path) -> dict[str, Any]:
    main([*map(str, arguments), "--out", str(out)])
    found: dict[str, Any] = json.loads((out / "result.json").read_text())
    return found


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    with pytest.raises(SystemExit) as caught:
        main([str(a) for a in arguments])
    assert caught.value.code in (1, 2)
    return capsys.readouterr().err


def test_a_run_is_judged_and_reported(run: Path, sides: tuple[Path, Path], tmp_path: Path) -> None:
    train_side, test_side = sides
    result = judged(tmp_path / "out", "--source", run, "--train", train_side, "--test", test_side)
    (encoder,) = result["encoders"]
    assert encoder["name"] == "tiny"
    assert encoder["recommended"] == "cls"
    assert encoder["train"]["images"] == 36
    assert set(encoder["linear"]["best"]) == {"kind", "rate", "held_out", "test", "interval_95"}
    assert encoder["linear"]["folding_error"] < 1e-4
    assert encoder["knn"]["cls"]["headline_k"] == 20
    names = {"neighbors_right", "confusion", "map", "atlas", "attention", "units"}
    assert names <= {path.stem for path in (tmp_path / "out" / "pictures" / "tiny").iterdir()}
    html = (tmp_path / "out" / "report.html").read_text()
    assert html.count("data:image/png") >= len(names)
    assert "://" not in html.replace("http://www.w3.org", "")
    assert f"{encoder['knn']['cls']['accuracy']['20']:.1%}" in html
    assert "JPEG" in html


def test_its_knn_is_the_trainers(run: Path, sides: tuple[Path, Path], tmp_path: Path) -> None:
    result = judged(tmp_path / "out", "--source", run, "--train", sides[0], "--test", sides[1])
    encoder, _ = read_encoder(run)
    from rich.console import Console

    from patchsight_train.data import load_images

    gallery, queries = (load_images([str(side)], 16, None, Console(quiet=True)) for side in sides)
    z, q = (embed(encoder, side.pixels, "mean", torch.device("cpu")) for side in (gallery, queries))
    assert gallery.labels is not None
    right = (knn_predict(z, gallery.labels, q, 5) == queries.labels).double().mean().item()
    assert result["encoders"][0]["knn"]["mean"]["accuracy"]["5"] == pytest.approx(right)


def test_several_sources_stand_side_by_side(run: Path, sides: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "other").symlink_to(run)
    copied = tmp_path / "copy"
    copied.mkdir()
    for name in ("config.toml", "checkpoints"):
        (copied / name).symlink_to(run / name)
    result = judged(
        tmp_path / "out", "--source", run, "--source", copied, "--train", sides[0], "--test", sides[1]
    )  # fmt: skip
    first, second = result["encoders"]
    assert first["knn"] == second["knn"]
    assert set(result["label_free_rank_correlation"]) >= {"rankme", "step"}
    assert "Side by side" in (tmp_path / "out" / "report.html").read_text()


def test_a_whitened_bundle_is_judged_as_it_is_served(sides: tuple[Path, Path], tmp_path: Path) -> None:
    """The same figures as from the embeddings that the bundle itself gives."""
    bundle = Path(__file__).resolve().parents[4] / "model_repository" / "mae-vit-cifar10"
    result = judged(tmp_path / "out", "--source", bundle, "--train", sides[0], "--test", sides[1])
    (encoder,) = result["encoders"]
    assert encoder["recommended"] == "mean"
    files = []
    for side in sides:
        files.append(tmp_path / f"{side.name}.parquet")
        embed_command([str(side), "--out", str(files[-1]), "--encoder", bundle.name,
                       "--model-repository", str(bundle.parent)])  # fmt: skip
    served = judged(tmp_path / "served", "--train", files[0], "--test", files[1])["encoders"][0]
    assert encoder["knn"]["mean"] == served["knn"]["mean"]
    for measure in ("rankme", "intrinsic_dimension", "uniformity"):
        assert encoder["representation"][measure] == pytest.approx(served["representation"][measure], rel=1e-3)


def test_two_sources_of_one_name_are_refused(
    run: Path, sides: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, "--source", run, "--source", run, "--train", sides[0], "--test", sides[1])
    assert "two sources are called 'tiny'" in said


def test_a_class_that_test_lacks_three_images_gray_ones_and_a_broken_one(
    run: Path, sides: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    test = pictures(tmp_path / "test", 1, 3, ("green", "red"), gray=True)
    (test / "red" / "more.png").write_bytes((sides[1] / "red" / "0.png").read_bytes())
    (test / "red" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
    result = judged(tmp_path / "out", "--source", run, "--train", sides[0], "--test", test)
    (encoder,) = result["encoders"]
    assert encoder["test"]["images"] == 3
    assert [entry["name"] for entry in encoder["test"]["skipped"]] == ["red/broken.png"]
    assert "red/broken.png" in capsys.readouterr().out
    assert (tmp_path / "out" / "report.html").is_file()


def test_a_class_that_only_test_has_is_said(run: Path, sides: tuple[Path, Path], tmp_path: Path) -> None:
    train_side = pictures(tmp_path / "train", 6, 4, ("blue", "red"))
    result = judged(tmp_path / "out", "--source", run, "--train", train_side, "--test", sides[1])
    assert result["encoders"][0]["classes_only_in_test"] == ["green"]
    assert "always wrong, as the gallery has none: green" in (tmp_path / "out" / "report.html").read_text()


def test_a_set_against_itself_needs_skip_self(run: Path, sides: tuple[Path, Path], tmp_path: Path) -> None:
    own = judged(tmp_path / "a", "--source", run, "--train", sides[0], "--test", sides[0])
    left_out = judged(tmp_path / "b", "--source", run, "--train", sides[0], "--test", sides[0], "--skip-self")
    assert own["encoders"][0]["knn"]["cls"]["accuracy"]["1"] == 1.0
    assert max(map(int, left_out["encoders"][0]["knn"]["cls"]["accuracy"])) <= 35


def vectors(path: Path, z: np.ndarray, labels: list[int], names: list[str], output: str = "cls") -> Path:
    with written(path, list(COLORS), Identity("somebody's", "0" * 64), output) as file:
        for name, label, row in zip(names, labels, z, strict=True):
            file.add(name, label, row.astype(np.float32))
    return path


def test_embeddings_are_judged_with_the_pictures_behind_them(sides: tuple[Path, Path], tmp_path: Path) -> None:
    names = [f"{color}/{i}.png" for color in COLORS for i in range(5)]
    labels = [label for label in range(3) for _ in range(5)]
    z = np.eye(3)[labels] + np.random.default_rng(0).normal(0, 0.05, (15, 3))
    made = [vectors(tmp_path / f"{side}.parquet", z, labels, names) for side in ("train", "test")]
    shown = ["--train-images", sides[0], "--test-images", sides[1]]
    result = judged(tmp_path / "out", "--train", made[0], "--test", made[1], *shown)
    assert result["encoders"][0]["knn"]["cls"]["accuracy"]["1"] == 1.0
    pictures_drawn = {path.stem for path in (tmp_path / "out" / "pictures" / "somebody's").iterdir()}
    assert {"neighbors_right", "atlas", "units"} <= pictures_drawn
    assert "attention" not in pictures_drawn


def test_nan_in_embeddings_is_an_error_that_names_the_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    z = np.ones((3, 2))
    z[1, 1] = np.nan
    broken = vectors(tmp_path / "bad.parquet", z, [0, 1, 2], ["a", "b", "c"])
    said = refused(capsys, "--train", broken, "--test", broken, "--out", tmp_path / "out")
    assert "the embedding of b holds NaN" in said


def test_an_encoder_that_gives_nan_is_an_error_that_names_the_image(
    run: Path, sides: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from patchsight_train.judge import subject

    encoder = build_encoder(architecture(TINY))
    torch.nn.init.constant_(encoder.norm.weight, torch.nan)  # type: ignore[arg-type, union-attr]
    monkeypatch.setattr(subject, "read_encoder", lambda source: (encoder, str(source)))
    said = refused(
        capsys, "--source", run, "--train", sides[0], "--test", sides[1], "--out", tmp_path / "out"
    )  # fmt: skip
    assert "the embedding of blue/0.png holds NaN or infinity" in said


def test_images_without_a_source_and_embeddings_with_one_are_refused(
    run: Path, sides: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "give --source" in refused(capsys, "--train", sides[0], "--test", sides[1], "--out", tmp_path / "out")
    made = vectors(tmp_path / "made.parquet", np.eye(3), [0, 1, 2], ["a", "b", "c"])
    said = refused(capsys, "--source", run, "--train", made, "--test", made, "--out", tmp_path / "out")
    assert "holds embeddings already" in said
    said = refused(capsys, "--train", made, "--test", sides[1], "--out", tmp_path / "out")
    assert "one holds embeddings, the other images" in said
