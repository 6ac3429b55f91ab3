"""Folders and Parquet in the Hugging Face image convention."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from patchsight_serve.dataset import read_dataset
from patchsight_serve.errors import InvalidRequest


def write(path: Path, content: bytes = b"x") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def write_parquet(
    path: Path, images: list[dict], labels: list[int | None] | None = None, names: list[str] | None = None
) -> None:
    columns = {"image": pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))}
    if labels is not None:
        columns["label"] = pa.array(labels, pa.int64())
    table = pa.table(columns)
    if names is not None:
        features = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    pq.write_table(table, path)


def test_a_folder_of_class_folders_is_labelled_in_alphabetical_order(tmp_path: Path) -> None:
    for name in ("cat/2.PNG", "ant/b.jpg", "ant/a.webp", "bee/deep/er/1.gif", "ant/notes.txt", "dog/none.md"):
        write(tmp_path / name, name.encode())
    dataset = read_dataset(tmp_path)
    assert dataset.names == ["ant/a.webp", "ant/b.jpg", "bee/deep/er/1.gif", "cat/2.PNG"]
    assert dataset.class_names == ["ant", "bee", "cat"]
    assert dataset.labels.tolist() == [0, 0, 1, 2]
    assert dataset.labels.dtype == np.int64
    assert [dataset.read(i) for i in range(len(dataset))] == [name.encode() for name in dataset.names]


def test_a_folder_with_images_at_its_top_is_unlabelled(tmp_path: Path) -> None:
    for name in ("1.png", "sub/2.png"):
        write(tmp_path / name)
    dataset = read_dataset(str(tmp_path))
    assert (dataset.names, dataset.labels, dataset.class_names) == (["1.png", "sub/2.png"], None, None)


def test_parquet_keeps_order_names_labels_and_bytes(tmp_path: Path) -> None:
    images = [{"bytes": b"a", "path": "x/a.jpg"}, {"bytes": b"b", "path": None}, {"bytes": None, "path": "c.jpg"}]
    write_parquet(tmp_path / "t.parquet", images, [2, 0, 1], ["u", "v", "w"])
    dataset = read_dataset(tmp_path / "t.parquet")
    assert dataset.names == ["x/a.jpg", "row 1", "c.jpg"]
    assert dataset.labels.tolist() == [2, 0, 1]
    assert dataset.class_names == ["u", "v", "w"]
    assert [dataset.read(i) for i in range(3)] == [b"a", b"b", b""]  # nothing there is an empty image, for the decoder


def test_several_files_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    for number in (1, 0):
        write_parquet(tmp_path / f"train-{number}.parquet", [{"bytes": bytes([number]), "path": f"{number}"}], [number])
    write_parquet(tmp_path / "test-0.parquet", [{"bytes": b"t", "path": "t"}], [5])
    assert read_dataset(tmp_path / "train-*.parquet").names == ["0", "1"]
    assert read_dataset(tmp_path).names == ["t", "0", "1"]
    dataset = read_dataset(tmp_path / "train-*.parquet")
    assert [dataset.read(i) for i in (0, 1)] == [b"\0", b"\1"]
    assert dataset.labels.tolist() == [0, 1]


def test_parquet_without_labels_or_names(tmp_path: Path) -> None:
    write_parquet(tmp_path / "t.parquet", [{"bytes": b"a", "path": "a"}])
    dataset = read_dataset(tmp_path / "t.parquet")
    assert (dataset.labels, dataset.class_names) == (None, None)


def test_null_and_minus_one_mean_unlabelled(tmp_path: Path) -> None:
    images = [{"bytes": b"a", "path": "a"}] * 4
    write_parquet(tmp_path / "some.parquet", images, [1, None, -1, 0])
    assert read_dataset(tmp_path / "some.parquet").labels.tolist() == [1, -1, -1, 0]
    for labels in ([None] * 4, [-1, None, -1, None]):
        write_parquet(tmp_path / "none.parquet", images, labels)
        assert read_dataset(tmp_path / "none.parquet").labels is None
    both = read_dataset(tmp_path / "*.parquet")
    assert both.labels.tolist() == [-1, -1, -1, -1, 1, -1, -1, 0]


def test_a_file_without_labels_beside_one_with(tmp_path: Path) -> None:
    image = [{"bytes": b"a", "path": "a"}]
    write_parquet(tmp_path / "0.parquet", image * 2, [4, 5])
    write_parquet(tmp_path / "1.parquet", image)
    table = pa.table({"label": pa.array([7], pa.int32()), "image": [{"bytes": b"z"}]})  # another type, order, no path
    pq.write_table(table, tmp_path / "2.parquet")
    dataset = read_dataset(tmp_path)
    assert dataset.labels.tolist() == [4, 5, -1, 7]
    assert dataset.names == ["a", "a", "a", "row 3"]
    assert [dataset.read(i) for i in range(4)] == [b"a", b"a", b"a", b"z"]


def test_images_are_read_when_asked_for(tmp_path: Path) -> None:
    write_parquet(tmp_path / "t.parquet", [{"bytes": bytes([i]) * 1000, "path": f"{i}"} for i in range(200)])
    dataset = read_dataset(tmp_path / "t.parquet")
    (tmp_path / "t.parquet").unlink()
    with pytest.raises(FileNotFoundError):
        dataset.read(3)


def test_a_folder_is_read_in_the_order_of_the_parts_of_its_paths(tmp_path: Path) -> None:
    files = ["a/b.png", "a-b/c.png", "a/b/c.png", "a.png/d.png", ".hidden/e.png", "Z/f.PNG", "a/.png", "a/g.png.txt"]
    for name in files:
        write(tmp_path / name)
    (tmp_path / "a" / "folder.png").mkdir()
    (tmp_path / "a" / "gone.png").symlink_to("nowhere")
    (tmp_path / "a" / "link.png").symlink_to("b.png")
    (tmp_path / "around").symlink_to(tmp_path, target_is_directory=True)
    expected = sorted(p for p in tmp_path.rglob("*") if p.suffix.lower() == ".png" and p.is_file())
    dataset = read_dataset(tmp_path)
    assert dataset.names == [p.relative_to(tmp_path).as_posix() for p in expected]
    assert len(dataset) == 7
    assert dataset.read(dataset.names.index("a/link.png")) == b"x"


def test_metadata_that_is_not_ours_is_no_error(tmp_path: Path) -> None:
    write_parquet(tmp_path / "t.parquet", [{"bytes": b"a", "path": "a"}], [0])
    table = pq.read_table(tmp_path / "t.parquet").replace_schema_metadata({"huggingface": "{no json"})
    pq.write_table(table, tmp_path / "t.parquet")
    assert read_dataset(tmp_path / "t.parquet").class_names is None


def test_what_is_no_source_says_so(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path / "text.parquet", b"no parquet")
    pq.write_table(pa.table({"picture": ["x"]}), tmp_path / "other.parquet")
    write_parquet(tmp_path / "none.parquet", [], [])
    pq.write_table(pa.table({"image": [{"bytes": b"a"}], "label": [["cat"]]}), tmp_path / "lists.parquet")
    pq.write_table(pa.table({"image": [{"path": "a"}]}), tmp_path / "paths.parquet")
    pq.write_table(pa.table({"image": [{"bytes": b"a"}], "label": [["x"]]}), tmp_path / "mixed-0.parquet")
    pq.write_table(pa.table({"image": [{"bytes": b"a"}], "label": [1]}), tmp_path / "mixed-1.parquet")
    for source, message in (
        ("nowhere", "no such folder, file or glob"),
        ("no*.parquet.x", "no such folder, file or glob"),
        ("empty", "no image in this folder"),
        ("text.parquet", "cannot be read as Parquet"),
        ("other.parquet", "its columns are .*picture"),
        ("none.parquet", "has no rows"),
        ("lists.parquet", r"lists\.parquet: its column `label` holds neither whole numbers nor texts"),
        ("paths.parquet", "has no struct column `image` with `bytes`"),
        ("mixed-*.parquet", "have different columns"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            read_dataset(tmp_path / source)


@pytest.mark.data
def test_the_labelled_data_reads_as_its_readme_says(data: Path) -> None:
    for source, rows, classes in (("clothing10/test.parquet", 372, 10), ("caltech101/test.parquet", 594, 99)):
        dataset = read_dataset(data / source)
        assert len(dataset) == rows
        assert len(dataset.class_names) == classes == len(set(dataset.labels.tolist()))
        assert dataset.read(rows - 1)[:2] == b"\xff\xd8"
