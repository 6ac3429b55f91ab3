"""Labelled or unlabelled images on disk: a folder, or Parquet in the Hugging Face image convention.

Knows where the encoded bytes are and what they are called; it does not decode.
"""

import glob
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from patchsight_serve.column import BinaryColumn
from patchsight_serve.errors import InvalidRequest

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif"}


class Content(Protocol):
    """Encoded images that do not lie in files of their own."""

    @property
    def nbytes(self) -> int:
        """Bytes that they take there."""

    def __getitem__(self, i: int) -> bytes:
        """As `Dataset.read`."""


@dataclass(frozen=True)
class Dataset:
    """Encoded images in a fixed order.

    names: one per image: the path relative to the folder, or the Parquet row's `path`.
    labels: int64 `(N,)`, −1 where an image has none (in Parquet: null or −1); None where no image has one.
    class_names: in label order, or None.
    """

    names: list[str]
    labels: np.ndarray[Any, np.dtype[np.int64]] | None
    class_names: list[str] | None
    _content: Path | Content  # the folder, or the column

    def __len__(self) -> int:
        return len(self.names)

    @property
    def parquet(self) -> BinaryColumn | None:
        """The column of the encoded images, where they lie in Parquet files."""
        return self._content if isinstance(self._content, BinaryColumn) else None

    @property
    def nbytes(self) -> int:
        """Bytes of the images in Parquet files; those of files of their own are not counted, which would take long."""
        return 0 if isinstance(self._content, Path) else self._content.nbytes

    def read(self, i: int) -> bytes:
        """The encoded bytes of image `i`; any number of threads may ask, in any order.

        Raises OSError where the file cannot be read, or a Parquet file was changed; DamagedImage where one is broken.
        """
        if isinstance(self._content, Path):
            return (self._content / self.names[i]).read_bytes()
        return self._content[i]


def read_dataset(source: str | Path) -> Dataset:
    """Open a folder, a Parquet file, or a glob of Parquet files (`train-*.parquet`).

    In a folder whose images all lie in first-level subfolders, those are the classes, in alphabetical order;
    otherwise the images are unlabelled.

    Raises:
        InvalidRequest: nothing is there, or it holds no image.
    """
    files = parquet_files(source)
    if files:
        return from_parquet(files)
    if not Path(source).is_dir():
        raise InvalidRequest(f"{source}: no such folder, file or glob of Parquet files")
    return _from_folder(Path(source))


def parquet_files(source: str | Path) -> list[Path]:
    """The file, those of a glob, or those in a folder; none for a folder without any, and where nothing is."""
    path = Path(source)
    if path.is_dir():
        return sorted(path.glob("*.parquet"))
    return [path] if path.is_file() else sorted(map(Path, glob.glob(str(source))))  # noqa: PTH207 - any root


def _from_folder(root: Path) -> Dataset:
    names = sorted(_image_files(root), key=lambda name: name.split("/"))
    if not names:
        raise InvalidRequest(f"{root}: no image in this folder; we look for {', '.join(sorted(SUFFIXES))}")
    return from_files(root, names)


def from_files(root: Path, names: list[str]) -> Dataset:
    """Files below a folder, in this order: labelled where all lie in first-level subfolders of it."""
    if not all("/" in name for name in names):
        return Dataset(names, None, None, root)
    classes = sorted({name.split("/")[0] for name in names})
    number = {name: i for i, name in enumerate(classes)}
    labels = np.array([number[name.split("/")[0]] for name in names], dtype=np.int64)
    return Dataset(names, labels, classes, root)


def _image_files(root: Path) -> Iterator[str]:
    """Paths relative to `root`, with `/`. Ten times as fast as `rglob`, which counts with a million files; as there,
    links to folders are not followed, and a folder that may not be read is passed over."""
    folders = [""]
    while folders:
        folder = folders.pop()
        try:
            entries = list(os.scandir(root / folder))
        except PermissionError:
            continue
        for entry in entries:
            stem, _, suffix = entry.name.rpartition(".")
            if entry.is_dir(follow_symlinks=False):
                folders.append(f"{folder}{entry.name}/")
            elif stem and f".{suffix.lower()}" in SUFFIXES and entry.is_file():
                yield folder + entry.name


def from_parquet(files: Sequence[Path]) -> Dataset:
    """Files one behind the other. Names and labels are read now, the images when asked for. Raises InvalidRequest."""
    footers: list[tuple[Path, pq.FileMetaData]] = []
    tables: list[pa.Table] = []
    for path in files:
        try:
            with pq.ParquetFile(path) as file:
                _check_columns(path, file.schema_arrow)
                tables.append(file.read(columns=["image.path", "label"]))
                footers.append((path, file.metadata))
        except (OSError, pa.ArrowException) as error:
            raise InvalidRequest(f"{path}: cannot be read as Parquet: {error}") from None
    try:
        table = pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise InvalidRequest(f"{files[0]} and those beside it have different columns: {error}") from None
    rows = sum(footer.num_rows for _, footer in footers)
    if rows == 0:
        raise InvalidRequest(f"{files[0]}: has no rows")
    paths = [None] * rows
    if "image" in table.column_names:
        paths = table.column("image").combine_chunks().field("path").to_pylist()
    names = [path or f"row {i}" for i, path in enumerate(paths)]
    return Dataset(names, *labels_of(table, files[0]), BinaryColumn(footers, "image.bytes"))


def _check_columns(path: Path, schema: pa.Schema) -> None:
    image = schema.field("image").type if "image" in schema.names else None
    if image is None or not pa.types.is_struct(image) or image.get_field_index("bytes") < 0:
        raise InvalidRequest(
            f"{path}: has no struct column `image` with `bytes` and `path`; its columns are {schema.names}"
        )


Labels = np.ndarray[Any, np.dtype[np.int64]]


def labels_of(table: pa.Table, file: Path) -> tuple[Labels | None, list[str] | None]:
    """`Dataset.labels` and `Dataset.class_names` of a table whose column `label` holds numbers or texts.

    Raises InvalidRequest, naming `file`, where it holds something else.
    """
    if "label" not in table.column_names:
        return None, class_names(table.schema)
    column, kind = table.column("label"), table.schema.field("label").type
    if pa.types.is_dictionary(kind):
        column, kind = column.cast(kind.value_type), kind.value_type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        labels, names = classes_of(column.to_pylist())
        return (labels, names) if (labels >= 0).any() else (None, None)
    try:
        labels = column.cast(pa.int64()).fill_null(-1).to_numpy()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise InvalidRequest(f"{file}: its column `label` holds neither whole numbers nor texts: {error}") from None
    return labels if (labels >= 0).any() else None, class_names(table.schema)


def classes_of(labels: Sequence[str | None]) -> tuple[Labels, list[str] | None]:
    """Labels that are texts as numbers int64, −1 for None, and the classes' names, in alphabetical order. Where all are
    whole numbers, these, and no names."""
    names = sorted({label for label in labels if label is not None})
    if all(name.isdecimal() and name == str(int(name)) and int(name) < 2**63 for name in names):
        return np.array([-1 if label is None else int(label) for label in labels], np.int64), None
    number: dict[str | None, int] = {name: i for i, name in enumerate(names)}
    return np.array([number.get(label, -1) for label in labels], np.int64), names


def class_names(schema: pa.Schema) -> list[str] | None:
    """`ClassLabel` names from the schema's `huggingface` metadata."""
    raw = (schema.metadata or {}).get(b"huggingface")
    try:
        names = json.loads(raw)["info"]["features"]["label"]["names"] if raw else None
    except (ValueError, KeyError, TypeError):
        return None
    return list(names) if names else None
