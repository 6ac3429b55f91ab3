"""Embeddings as Parquet: what is written is read again, by us and by any reader; what is wrong is named."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from patchsight_serve import embedding_file
from patchsight_serve.embedding_file import ROW_GROUP, holds_embeddings, read_embeddings, written
from patchsight_serve.errors import InvalidRequest
from patchsight_serve.item import Identity
from patchsight_serve.sample_gallery import SAMPLES

MADE_BY = Identity("tiny", "ab" * 32)


def vectors(count: int, dim: int = 5) -> np.ndarray:
    return np.random.default_rng(count).standard_normal((count, dim)).astype(np.float32)


def write(path: Path, rows: Sequence[np.ndarray], labels: list[int | None], encoder: Identity = MADE_BY) -> Path:
    with written(path, ["cat", "dog"], encoder, "cls") as file:
        for i, (label, row) in enumerate(zip(labels, rows, strict=True)):
            file.add(f"a/{i}.jpg", label, row)
    return path


@pytest.mark.parametrize("count", [1, ROW_GROUP, ROW_GROUP + 3])
def test_what_is_written_is_read(count: int, tmp_path: Path) -> None:
    rows, labels = vectors(count), [(i % 2 if i % 3 else None) for i in range(count)]
    labels[0] = 1
    found = read_embeddings(write(tmp_path / "new" / "e.parquet", rows, labels))
    assert np.array_equal(found.vectors, rows)
    assert found.vectors.dtype == np.float32
    assert found.labels is not None
    assert found.labels.tolist() == [-1 if label is None else label for label in labels]
    assert found.names == [f"a/{i}.jpg" for i in range(count)]
    assert (found.encoder, found.output, found.class_names) == (MADE_BY, "cls", ["cat", "dog"])


def test_any_reader_finds_three_columns_and_the_class_names(tmp_path: Path) -> None:
    rows = vectors(3)
    table = pq.read_table(write(tmp_path / "e.parquet", rows, [0, 1, None]))
    assert table.column_names == ["id", "label", "embedding"]
    assert table.column("label").to_pylist() == [0, 1, None]
    np.testing.assert_array_equal(np.array(table.column("embedding").to_pylist(), np.float32), rows)
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert features["label"] == {"names": ["cat", "dog"], "_type": "ClassLabel"}
    assert features["embedding"]["length"] == 5


def test_files_are_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding_file, "BATCH", 2)
    parts = vectors(8)
    write(tmp_path / "e-0.parquet", parts[:5], [0] * 5)
    write(tmp_path / "e-1.parquet", parts[5:], [1] * 3)
    for source in (tmp_path, str(tmp_path / "e-*.parquet")):
        found = read_embeddings(source)
        assert np.array_equal(found.vectors, parts)
        assert found.labels is not None
        assert found.labels.tolist() == [0] * 5 + [1] * 3


@pytest.mark.parametrize("kind", [pa.list_(pa.float64()), pa.large_list(pa.float32()), pa.list_(pa.float16(), 2)])
def test_embeddings_of_others_need_no_more_than_a_list(kind: pa.DataType, tmp_path: Path) -> None:
    rows = [np.array(row, np.float16) if "half" in str(kind) else row for row in ([1.0, 2.0], [3.0, 4.0])]
    pq.write_table(pa.table({"embedding": pa.array(rows, kind)}), tmp_path / "e.parquet")
    found = read_embeddings(tmp_path / "e.parquet")
    assert found.vectors.tolist() == [[1, 2], [3, 4]]
    assert (found.labels, found.encoder, found.class_names) == (None, None, None)
    assert found.names == ["e.parquet row 0", "e.parquet row 1"]


def test_of_files_with_and_without_labels_the_rest_is_unlabelled(tmp_path: Path) -> None:
    pq.write_table(pa.table({"label": [3], "embedding": [[1.0]]}), tmp_path / "0.parquet")
    pq.write_table(pa.table({"embedding": [[2.0]]}), tmp_path / "1.parquet")
    labels = read_embeddings(tmp_path).labels
    assert labels is not None
    assert labels.tolist() == [3, -1]


def test_nothing_is_overwritten_and_nothing_half_is_left(tmp_path: Path) -> None:
    path = write(tmp_path / "e.parquet", vectors(2), [0, 1])
    before = path.read_bytes()
    with pytest.raises(InvalidRequest, match="exists already"):
        write(path, vectors(3), [0, 1, 1])
    with pytest.raises(ValueError, match="all input arrays must have the same shape"):
        write(tmp_path / "other.parquet", [*vectors(2), np.zeros(3, np.float32)], [0, 1, 0])
    with written(tmp_path / "other.parquet", None, MADE_BY, "cls"):
        pass
    assert [entry.name for entry in tmp_path.iterdir()] == ["e.parquet"]
    assert path.read_bytes() == before


@pytest.mark.parametrize("poison", [np.nan, np.inf, 0.0])
def test_a_vector_without_direction_is_named(poison: float, tmp_path: Path) -> None:
    rows = vectors(5)
    rows[3] = poison
    path = write(tmp_path / "e.parquet", rows, [0] * 5)
    with pytest.raises(InvalidRequest, match=r"the embedding of a/3\.jpg holds NaN or infinity, or has length 0"):
        read_embeddings(path)


def test_what_is_no_matrix_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "e.parquet"
    for column, message in (
        (pa.array([[1.0], [1.0, 2.0]]), "of 1 numbers, and of 2"),
        (pa.array([[1.0], None]), "a list in every row"),
        (pa.array([1.0, 2.0]), "a list in every row"),
        (pa.array([], pa.list_(pa.float32())), "has no rows"),
    ):
        pq.write_table(pa.table({"embedding": column}), path)
        with pytest.raises(InvalidRequest, match=message):
            read_embeddings(path)
    pq.write_table(pa.table({"label": [["a"]], "embedding": [[1.0]]}), path)
    with pytest.raises(InvalidRequest, match="`label` holds neither whole numbers nor texts"):
        read_embeddings(path)
    path.write_bytes(b"no parquet")
    with pytest.raises(InvalidRequest, match="cannot be read as Parquet"):
        read_embeddings(path)


def test_files_of_two_encoders_or_two_widths_are_not_mixed(tmp_path: Path) -> None:
    write(tmp_path / "0.parquet", vectors(2), [0, 1])
    write(tmp_path / "1.parquet", vectors(2), [0, 1], Identity("tiny", "cd" * 32))
    with pytest.raises(InvalidRequest, match="different encoders"):
        read_embeddings(tmp_path)
    (tmp_path / "1.parquet").unlink()
    write(tmp_path / "1.parquet", vectors(2, 6), [0, 1])
    with pytest.raises(InvalidRequest, match="of 6 numbers, and of 5"):
        read_embeddings(tmp_path)


def test_images_are_not_taken_for_embeddings(tmp_path: Path) -> None:
    assert holds_embeddings(write(tmp_path / "e.parquet", vectors(2), [0, 1]))
    (tmp_path / "text.parquet").write_text("text")
    pq.write_table(pa.table({"image": [{"bytes": b"", "path": "a"}]}), tmp_path / "i.parquet")
    for source in (SAMPLES, tmp_path / "i.parquet", tmp_path / "text.parquet", tmp_path / "nowhere"):
        assert not holds_embeddings(source)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_labels_may_be_texts(kind: pa.DataType, tmp_path: Path) -> None:
    """As a gallery's export has them."""
    path = tmp_path / "e.parquet"
    for texts, numbers, names in (
        (["dog", None, "cat", "dog"], [1, -1, 0, 1], ["cat", "dog"]),
        (["10", "9", None, "0"], [10, 9, -1, 0], None),
        (["10", "09"], [1, 0], ["09", "10"]),
    ):
        column = pa.array(texts, pa.string()).cast(kind)
        pq.write_table(pa.table({"label": column, "embedding": [[1.0]] * len(texts)}), path)
        found = read_embeddings(path)
        assert found.labels is not None
        assert (found.labels.tolist(), found.class_names) == (numbers, names)
    pq.write_table(pa.table({"label": pa.array([None], pa.string()).cast(kind), "embedding": [[1.0]]}), path)
    assert read_embeddings(path).labels is None
