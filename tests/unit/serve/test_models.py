"""patchsight-models on a repository with sound bundles, a damaged one, and what is none."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from patchsight_serve.manifest import load_manifest
from patchsight_serve.models import main

SHIPPED = Path(__file__).resolve().parents[3] / "model_repository"


@pytest.fixture
def repository(make_bundle: Callable[..., Path], tmp_path: Path) -> Path:
    """`a` and `b` are sound, `broken` has a changed graph, `.c.partial` and `other` are none of ours."""
    folder = tmp_path / "repository"
    for name in ("a", "b", "broken", ".c.partial"):
        make_bundle(folder / name, name=name.strip("."))
        (folder / name / "config.pbtxt").write_text(f'name: "{name}"')
    with (folder / "broken" / "1" / "model.onnx").open("ab") as file:
        file.write(b"x")
    (folder / "other" / "1").mkdir(parents=True)
    return folder


def run(repository: Path, *arguments: str, status: int | None = None) -> None:
    argv = [*arguments, "--model-repository", str(repository)]
    if status is None:
        main(argv)
        return
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == status


def test_a_damaged_bundle_hides_no_other(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(repository, "list", status=1)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["name", "a", "b", "broken:"]
    assert "DAMAGED" in lines[3]
    assert "the file was changed" in lines[3]


def test_the_list_as_json_is_the_manifests(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(repository, "list", "--json", status=1)
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == {"a", "b", "broken"}
    assert found["a"] == load_manifest(repository / "a").model_dump(mode="json")
    assert "the file was changed" in found["broken"]["error"]


def test_an_empty_repository_says_how_to_fill_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, "list")
    assert "make one: patchsight-export SOURCE" in capsys.readouterr().out


def test_the_card_of_a_shipped_encoder_tells_all_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    run(SHIPPED, "show", "simclr-vit-cifar10")
    text, manifest = capsys.readouterr().out, load_manifest(SHIPPED / "simclr-vit-cifar10")
    for fact in (manifest.sha256, manifest.license, manifest.data, manifest.commit, manifest.recipe.strip()):
        assert fact in text
    assert "| `cls_embedding`, float32 | `[N, 128]` | the CLS token; **recommended** |" in text
    assert "| `attention`, float32 | `[N, 4, 8, 8]` |" in text
    assert "| cifar10-knn | cls | 50,000, 10,000 | 1: 55.8, 5: 60.6, 10: 62.3, 20: 63.0, 100: 61.0, 200: 60.2 |" in text


def test_a_measurement_of_another_kind_does_not_spoil_the_card(
    make_bundle: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_bundle(tmp_path / "x", measured={"mine": 3, "yours": {"accuracy": [1]}, "theirs": {"headline": {"k": 20}}})
    run(tmp_path, "show", "x")
    assert "Nothing yet" in capsys.readouterr().out
    run(tmp_path, "list")
    assert capsys.readouterr().out.splitlines()[1].endswith("–")


def test_show_as_json_is_the_manifest(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(repository, "show", "b", "--json")
    assert json.loads(capsys.readouterr().out) == load_manifest(repository / "b").model_dump(mode="json")


def test_verify_judges_each(capsys: pytest.CaptureFixture[str], repository: Path) -> None:
    run(SHIPPED, "verify", "mae-vit-cifar10")
    assert capsys.readouterr().out.startswith("mae-vit-cifar10: sound\n  sha256 ")
    run(repository, "verify", status=1)
    told = capsys.readouterr().out
    assert told.count("DAMAGED") == 3  # a and b have a config.pbtxt that says nothing of them
    assert "a: DAMAGED\n  a: config.pbtxt tells of another encoder" in told
    assert "the file was changed" in told


def test_remove_takes_what_is_named_and_nothing_else(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(repository, "remove", "a", "broken", "a")
    assert sorted(path.name for path in repository.iterdir()) == [".c.partial", "b", "other"]
    assert capsys.readouterr().out.count("removed") == 2


@pytest.mark.parametrize(
    "names", [[], ["nothing"], ["../repository/a"], ["a", "nothing"], [".c.partial"], ["other"], ["."]]
)
def test_a_wrong_name_removes_nothing(repository: Path, names: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(repository.rglob("*"))
    run(repository, "remove", *names, status=1)
    assert sorted(repository.rglob("*")) == before
    told = capsys.readouterr().err
    assert "there is a, b, broken" in told if names else "remove needs the name" in told


def test_a_wrong_action_is_a_usage_error(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(repository, "delete", "a", status=2)
    assert "Input should be 'list', 'show', 'verify', 'remove' or 'triton' (got 'delete')" in capsys.readouterr().err


def test_the_precision_is_listed_and_its_verdict_is_on_the_card(
    make_bundle: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = {
        "bytes": 30, "fp32_bytes": 100, "images": 1000, "speed": 1.5, "top10_overlap": 0.94,
        "cosine": {"cls_embedding": {"least": 0.99, "mean": 0.995}}, "knn": {"k": 20, "fp32": 0.7, "accuracy": 0.697},
    }  # fmt: skip
    make_bundle(tmp_path / "full")
    make_bundle(tmp_path / "low", precision="int8", measured={"precision": figures})
    make_bundle(tmp_path / "odd", precision="fp16", measured={"precision": figures | {"cosine": 3}})
    run(tmp_path, "list")
    column = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["fp32" in column[1], "int8" in column[2], "fp16" in column[3]] == [True] * 3
    assert "precision" in column[0]
    run(tmp_path, "show", "low", "full", "odd")
    told = capsys.readouterr().out
    assert (
        "## Precision\n\nAgainst the same encoder in fp32, on 1,000 images: 0.30 of the file; cosine of the "
        "recommended embedding 0.99500 in the mean, 0.99000 at least; 1.50× the speed on the CPU that exported it; "
        "94.0 % of the ten nearest the same; 20-NN -0.30 points.\n"
    ) in told
    assert told.count("## Precision") == 1
    assert [f"MB, in {precision}." in told for precision in ("int8", "fp32", "fp16")] == [True] * 3
