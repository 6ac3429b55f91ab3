"""What is found under each kind of source, against lists written by hand."""

import io
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from patchsight_serve.dataset import Dataset, read_dataset
from patchsight_serve.errors import InvalidRequest
from patchsight_serve.sample_gallery import SAMPLES
from patchsight_serve.sources import read_sources


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder has `photos/`, where each file holds its own name."""
    for name in ("cat/a.jpg", "cat/b.png", "dog/c.jpg", "dog/deep/d.jpg", "dog/notes.md"):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    monkeypatch.chdir(tmp_path)
    return Path("photos")


def contents(dataset: Dataset) -> list[str]:
    return [dataset.read(i).decode() for i in range(len(dataset))]


def labelled(dataset: Dataset) -> list[str | None]:
    assert dataset.labels is not None
    names = dataset.class_names or []
    return [None if label < 0 else names[label] for label in dataset.labels]


def test_a_folder_is_as_for_training(photos: Path) -> None:
    found, expected = read_sources(["photos/"]), read_dataset(photos)
    assert (found.names, found.class_names) == (expected.names, expected.class_names)
    assert contents(found) == expected.names == ["cat/a.jpg", "cat/b.png", "dog/c.jpg", "dog/deep/d.jpg"]


@pytest.mark.parametrize(
    ("pattern", "names", "labels"),
    [
        ("photos/*/*.jpg", ["cat/a.jpg", "dog/c.jpg"], ["cat", "dog"]),
        ("photos/**/*", ["cat/a.jpg", "cat/b.png", "dog/c.jpg", "dog/deep/d.jpg"], ["cat", "cat", "dog", "dog"]),
        ("photos/cat/?.*", ["a.jpg", "b.png"], None),
    ],
)
def test_a_glob_names_from_where_it_begins_to_choose(
    photos: Path, pattern: str, names: list[str], labels: list[str] | None
) -> None:
    for source in (pattern, str(photos.resolve().parent / pattern)):
        found = read_sources([source])
        assert found.names == names
        assert (found.labels is None) if labels is None else (labelled(found) == labels)
        assert [Path(content).name for content in contents(found)] == [Path(name).name for name in names]


def test_a_glob_that_the_shell_expanded_is_the_same(photos: Path) -> None:
    quoted, expanded = read_sources(["photos/*/*.jpg"]), read_sources(["photos/cat/a.jpg", "photos/dog/c.jpg"])
    assert quoted.names == expanded.names
    assert labelled(quoted) == labelled(expanded)
    assert contents(quoted) == contents(expanded)
    assert read_sources(["photos/cat/a.jpg"]).names == ["a.jpg"]
    mixed = [str(photos.resolve() / "cat/a.jpg"), "photos/dog/c.jpg"]
    assert (read_sources(mixed).names, contents(read_sources(mixed))) == (mixed, ["cat/a.jpg", "dog/c.jpg"])


def test_a_file_whose_name_looks_like_a_glob_is_a_file(photos: Path) -> None:
    (photos / "[cat].jpg").write_text("brackets")
    assert contents(read_sources(["photos/[cat].jpg"])) == ["brackets"]


def test_a_list_is_relative_to_its_folder_and_stdin_to_ours(photos: Path) -> None:
    absolute = str(photos.resolve() / "dog/c.jpg")
    (photos / "some.txt").write_text(f"dog/c.jpg\r\n\ncat/a.jpg\n{absolute}\ngone.jpg")
    found = read_sources(["photos/some.txt"])
    assert (found.names, found.labels) == (["dog/c.jpg", "cat/a.jpg", absolute, "gone.jpg"], None)
    assert [found.read(i).decode() for i in range(3)] == ["dog/c.jpg", "cat/a.jpg", "dog/c.jpg"]
    with pytest.raises(FileNotFoundError):
        found.read(3)
    piped = read_sources(["-"], io.BytesIO(b"photos/dog/c.jpg\n"))
    assert (piped.names, contents(piped)) == (["photos/dog/c.jpg"], ["dog/c.jpg"])


def test_names_that_are_no_unicode_are_found(photos: Path) -> None:
    name = os.fsdecode(b"caf\xe9.jpg")
    (photos / name).write_text("latin")
    (photos / "l.txt").write_bytes(b"caf\xe9.jpg\n")
    for source in ("photos/l.txt", "photos/caf*.jpg"):
        assert (read_sources([source]).names, contents(read_sources([source]))) == ([name], ["latin"])


def test_several_are_one_behind_the_other_with_classes_by_name(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "more" / "bird").mkdir(parents=True)
    (tmp_path / "more" / "dog").mkdir()
    for name in ("bird/x.jpg", "dog/a.jpg"):
        (tmp_path / "more" / name).write_text(name)
    (photos / "l.txt").write_text("cat/a.jpg\n")
    found = read_sources(["photos", "photos/l.txt", "more", "photos/cat/b.png"])
    assert found.names == [
        "photos/cat/a.jpg", "photos/cat/b.png", "photos/dog/c.jpg", "photos/dog/deep/d.jpg", "photos/cat/a.jpg",
        "more/bird/x.jpg", "more/dog/a.jpg", "photos/cat/b.png",
    ]  # fmt: skip
    assert contents(found) == [name.split("/", 1)[1] for name in found.names]
    assert labelled(found) == ["cat", "cat", "dog", "dog", None, "bird", "dog", None]
    assert found.class_names == ["cat", "dog", "bird"]


def test_parquet_beside_a_folder_keeps_its_bytes_and_its_size_counts(photos: Path) -> None:
    samples = read_dataset(SAMPLES)
    found = read_sources([str(SAMPLES), str(photos)])
    assert found.names[0] == f"{SAMPLES}/{samples.names[0]}"
    assert [found.read(i) for i in (0, 150, 199)] == [samples.read(i) for i in (0, 150, 199)]
    assert found.read(200) == b"cat/a.jpg"
    assert found.nbytes == samples.nbytes == samples.parquet.nbytes > 0 == read_sources(["photos"]).nbytes  # type: ignore[union-attr]
    assert labelled(found)[-1] == "dog"


def test_a_glob_of_parquet_is_one_source(tmp_path: Path) -> None:
    for i in range(2):
        image = pa.array([{"bytes": bytes([i]), "path": f"{i}.jpg"}])
        pq.write_table(pa.table({"image": image, "label": [i]}), tmp_path / f"t-{i}.parquet")
    found = read_sources([str(tmp_path / "t-*.parquet")])
    assert (found.names, found.labels.tolist()) == (["0.jpg", "1.jpg"], [0, 1])  # type: ignore[union-attr]
    with pytest.raises(InvalidRequest, match=r"the classes of .*clothing\.parquet have names, those of .*t-0"):
        read_sources([str(SAMPLES), str(tmp_path / "t-0.parquet")])
    assert np.array_equal(read_sources([str(tmp_path / "t-0.parquet"), str(tmp_path / "t-1.parquet")]).labels, [0, 1])  # type: ignore[arg-type]


def test_what_is_not_there_is_said(photos: Path) -> None:
    (photos / "empty.txt").write_text("\n\n")
    (photos / "t.parquet").write_text("no Parquet")
    for source, message in (
        ("nowhere", "no such folder"),
        ("photos/*.gif", r"photos/\*\.gif: matches no image"),
        ("photos/**/*.md", "matches no image"),
        ("photos/**", "matches both images and Parquet"),
        ("photos/empty.txt", "names no image"),
        ("photos/dog/notes.md", "cannot be read as Parquet"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            read_sources([source])
    with pytest.raises(InvalidRequest, match="there is no source"):
        read_sources([])
