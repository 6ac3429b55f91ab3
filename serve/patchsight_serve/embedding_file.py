"""Embeddings as Parquet: `id`, `label`, `embedding`, one row an image; which encoder made them stands in the footer.

Any Parquet reader opens it; `datasets` finds the class names where it looks for them.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from patchsight_serve.dataset import labels_of, parquet_files
from patchsight_serve.durable import sync
from patchsight_serve.errors import InvalidRequest
from patchsight_serve.item import Identity
from patchsight_serve.nearest import F32, I64

ROW_GROUP = 4096  # rows
BATCH = 65_536  # rows read at once


@dataclass(frozen=True)
class Embeddings:
    """names: N ids. labels: int64 `(N,)`, −1 where there is none; None where no row has one. vectors: float32 `(N, D)`,
    as the graph gave them. encoder, output: who made them; None where the file does not say."""

    names: list[str]
    labels: I64 | None
    vectors: F32
    class_names: list[str] | None
    encoder: Identity | None
    output: str | None

    def __len__(self) -> int:
        return len(self.names)


def holds_embeddings(source: str | Path) -> bool:
    """Whether a source is Parquet with a column `embedding`, not images."""
    files = parquet_files(source)
    try:
        return bool(files) and "embedding" in pq.read_schema(files[0]).names
    except (OSError, pa.ArrowException):
        return False  # whoever reads it will say what is wrong


def read_embeddings(source: str | Path) -> Embeddings:
    """Of a Parquet file, a glob of them, or a folder with them. Memory: the vectors, and little more.

    Raises:
        InvalidRequest: it cannot be read, has no rows, or its rows are not vectors of one length; its files are of
            different encoders; a vector holds NaN or infinity, or has length 0 (its id is named).
    """
    files = parquet_files(source)
    try:
        schemas = [pq.read_schema(path) for path in files]
        makers = {made_by(schema) for schema in schemas}
        if len(makers) > 1:
            raise InvalidRequest(f"{source}: its files are of different encoders: {sorted(map(str, makers))}")
        rest = [
            pq.read_table(f, columns=[c for c in ("id", "label") if c in s.names])
            for f, s in zip(files, schemas, strict=True)
        ]
        names = [name for path, table in zip(files, rest, strict=True) for name in _names(path, table)]
        labels, classes = labels_of(pa.concat_tables(rest, promote_options="permissive"), files[0])
        vectors = _vectors(files)
    except (OSError, pa.ArrowException) as error:
        raise InvalidRequest(f"{source}: cannot be read as Parquet: {error}") from None
    for start in range(0, len(vectors), BATCH):
        part = vectors[start : start + BATCH]
        bad = np.flatnonzero(~np.isfinite(part).all(axis=1) | ~part.any(axis=1))
        if bad.size:
            name = names[start + bad[0]]
            raise InvalidRequest(f"{source}: the embedding of {name} holds NaN or infinity, or has length 0")
    ((encoder, output),) = makers
    return Embeddings(names, labels, vectors, classes, encoder, output)


def made_by(schema: pa.Schema) -> tuple[Identity | None, str | None]:
    """Which encoder, and which embedding of it; None where the footer does not say."""
    found = json.loads((schema.metadata or {}).get(b"patchsight", b"{}"))
    return (Identity(found["name"], found["sha256"]), found["output"]) if found else (None, None)


def _names(path: Path, table: pa.Table) -> list[str]:
    if "id" in table.column_names:
        return [str(name) for name in table.column("id").to_pylist()]
    return [f"{path.name} row {i}" for i in range(pq.read_metadata(path).num_rows)]


def _vectors(files: list[Path]) -> F32:
    """Lists of any kind, of one length: float32 `(N, D)`, filled batch by batch."""
    vectors: F32 | None = None
    done, rows = 0, sum(pq.read_metadata(path).num_rows for path in files)
    for path in files:
        for batch in pq.ParquetFile(path).iter_batches(BATCH, columns=["embedding"]):
            part = matrix(path, batch.column(0))
            if vectors is None:
                vectors = np.empty((rows, part.shape[1]), np.float32)
            if part.shape[1] != vectors.shape[1]:
                raise InvalidRequest(f"{path}: has embeddings of {part.shape[1]} numbers, and of {vectors.shape[1]}")
            vectors[done : done + len(part)] = part
            done += len(part)
    if vectors is None:
        raise InvalidRequest(f"{files[0]}: has no rows")
    return vectors


def matrix(path: Path, column: pa.Array) -> F32:
    """A column of lists: float32 `(N, D)`. Raises InvalidRequest, which names `path`."""
    if not hasattr(column, "flatten") or column.null_count:
        raise InvalidRequest(f"{path}: its column `embedding` does not hold a list in every row")
    flat: F32 = column.flatten().cast(pa.float32()).to_numpy(zero_copy_only=False)
    if not pa.types.is_fixed_size_list(column.type):
        lengths = column.value_lengths().to_numpy()
        if lengths.min() != lengths.max():
            raise InvalidRequest(f"{path}: has embeddings of {lengths.min()} numbers, and of {lengths.max()}")
    return flat.reshape(len(column), -1)


def footer(encoder: Identity, output: str, features: dict[str, Any], D: int) -> dict[str, str]:
    """What a file says of itself. features: of its columns beside the embedding, as `datasets` knows them."""
    value = {"dtype": "float32", "_type": "Value"}
    features = features | {"embedding": {"feature": value, "length": D, "_type": "Sequence"}}
    return {
        "patchsight": json.dumps(encoder._asdict() | {"output": output}),
        "huggingface": json.dumps({"info": {"features": features}}),
    }


class EmbeddingWriter:
    """A file that is being written: rows one by one, in groups."""

    def __init__(self, path: Path, names_of_classes: list[str] | None, encoder: Identity, output: str) -> None:
        self._path, self._classes = path, names_of_classes
        self._made_by = encoder, output
        self._file: pq.ParquetWriter | None = None
        self._rows: list[tuple[str, int | None, F32]] = []
        self.count = 0

    def add(self, name: str, label: int | None, vector: F32) -> None:
        """vector: float32 `(D,)`; the first one says what D is."""
        self._rows.append((name, label, vector))
        self.count += 1
        if len(self._rows) == ROW_GROUP:
            self.flush()

    def flush(self) -> None:
        if not self._rows:
            return
        names, labels, vectors = zip(*self._rows, strict=True)
        stacked = np.stack(vectors)
        schema = self._schema(stacked.shape[1])
        column = pa.FixedSizeListArray.from_arrays(pa.array(stacked.ravel()), stacked.shape[1])
        if self._file is None:
            self._file = pq.ParquetWriter(self._path, schema, use_dictionary=["label"])
        self._file.write_table(pa.table([pa.array(names), pa.array(labels, pa.int64()), column], schema=schema))
        self._rows.clear()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _schema(self, D: int) -> pa.Schema:
        features: dict[str, Any] = {"id": {"dtype": "string", "_type": "Value"}}
        features["label"] = {"dtype": "int64", "_type": "Value"}
        if self._classes is not None:
            features["label"] = {"names": self._classes, "_type": "ClassLabel"}
        columns = [("id", pa.string()), ("label", pa.int64()), ("embedding", pa.list_(pa.float32(), D))]
        return pa.schema(columns, metadata=footer(*self._made_by, features, D))


@contextmanager
def written(
    path: Path, names_of_classes: list[str] | None, encoder: Identity, output: str
) -> Iterator[EmbeddingWriter]:
    """A writer whose file stands at `path` when all went well, whole and on disk, and nowhere otherwise.

    Raises InvalidRequest if there is a file already: nobody's embeddings are overwritten.
    """
    if path.exists():
        raise InvalidRequest(f"{path} exists already; choose another --out, or delete it")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    writer = EmbeddingWriter(partial, names_of_classes, encoder, output)
    try:
        yield writer
        writer.flush()
        writer.close()
        if writer.count:
            sync(partial)
            partial.replace(path)
            sync(path.parent)
    finally:
        writer.close()
        partial.unlink(missing_ok=True)
