"""Labelled or unlabelled images on disk: a folder, or Parquet in the Hugging Face image convention.

Knows where the encoded bytes are and what they are called; it does not decode.
"""

import glob
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from patchsight_serve.errors import InvalidRequest

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif"}


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
    _content: list[Path] | pa.ChunkedArray

    def __len__(self) -> int:
        return len(self.names)

    def read(self, i: int) -> bytes:
        """The encoded bytes of image `i`."""
        if isinstance(self._content, list):
            return self._content[i].read_bytes()
        value: bytes | None = self._content[i].as_py()
        return value or b""


def read_dataset(source: str | Path) -> Dataset:
    """Open a folder, a Parquet file, or a glob of Parquet files (`train-*.parquet`).

    In a folder whose images all lie in first-level subfolders, those are the classes, in alphabetical order;
    otherwise the images are unlabelled.

    Raises:
        InvalidRequest: nothing is there, or it holds no image.
    """
    path = Path(source)
    if path.is_dir():
        parquet = sorted(path.glob("*.parquet"))
        return _from_parquet(parquet) if parquet else _from_folder(path)
    files = [path] if path.is_file() else sorted(map(Path, glob.glob(str(source))))  # noqa: PTH207 - any root
    if not files:
        raise InvalidRequest(f"{source}: no such folder, file or glob of Parquet files")
    return _from_parquet(files)


def _from_folder(root: Path) -> Dataset:
    files = sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not files:
        raise InvalidRequest(f"{root}: no image in this folder; we look for {', '.join(sorted(SUFFIXES))}")
    names = [p.relative_to(root).as_posix() for p in files]
    if not all("/" in name for name in names):
        return Dataset(names, None, None, files)
    classes = sorted({name.split("/")[0] for name in names})
    number = {name: i for i, name in enumerate(classes)}
    labels = np.array([number[name.split("/")[0]] for name in names], dtype=np.int64)
    return Dataset(names, labels, classes, files)


def _from_parquet(files: list[Path]) -> Dataset:
    try:
        table = pa.concat_tables([pq.read_table(p) for p in files], promote_options="permissive")
    except (OSError, pa.ArrowInvalid) as error:
        raise InvalidRequest(f"{files[0]}: cannot be read as Parquet: {error}") from None
    if "image" not in table.column_names or not pa.types.is_struct(table.schema.field("image").type):
        raise InvalidRequest(
            f"{files[0]}: has no struct column `image` with `bytes` and `path`; its columns are {table.column_names}"
        )
    if table.num_rows == 0:
        raise InvalidRequest(f"{files[0]}: has no rows")
    image = table.column("image").combine_chunks()
    paths = image.field("path").to_pylist() if image.type.get_field_index("path") >= 0 else [None] * len(image)
    names = [path or f"row {i}" for i, path in enumerate(paths)]
    labels = _labels(table, files[0])
    return Dataset(names, labels, _class_names(table.schema), pa.chunked_array([image.field("bytes")]))


def _labels(table: pa.Table, file: Path) -> np.ndarray[Any, np.dtype[np.int64]] | None:
    if "label" not in table.column_names:
        return None
    try:
        column = table.column("label").cast(pa.int64()).fill_null(-1)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise InvalidRequest(f"{file}: its column `label` does not hold whole numbers: {error}") from None
    labels = column.to_numpy()
    return labels if (labels >= 0).any() else None


def _class_names(schema: pa.Schema) -> list[str] | None:
    """`ClassLabel` names from the schema's `huggingface` metadata."""
    raw = (schema.metadata or {}).get(b"huggingface")
    try:
        names = json.loads(raw)["info"]["features"]["label"]["names"] if raw else None
    except (ValueError, KeyError, TypeError):
        return None
    return list(names) if names else None
