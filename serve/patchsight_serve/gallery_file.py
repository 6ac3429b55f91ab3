"""A gallery as Parquet: `id`, `label`, `metadata` (JSON), `sha256`, `embedding`, without the pictures. What is written
is what `patchsight-embed` writes and two columns more; what is read may be either."""

import hashlib
import re
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import CancelledError
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from patchsight_serve.dataset import class_names
from patchsight_serve.embedding_file import ROW_GROUP, footer, made_by, matrix
from patchsight_serve.errors import InvalidRequest, PatchsightError
from patchsight_serve.gallery import Gallery
from patchsight_serve.item import Identity, Item, NewVector, check_id, parse_metadata
from patchsight_serve.nearest import F32, normalize
from patchsight_serve.row import Row
from patchsight_serve.scratch import Scratch, told

OUTPUT = "embedding"  # in place of `cls`, `mean` or `both`: the one that galleries hold, whichever that is
MAX_DIM = 65_536  # numbers of one vector
TEXTS = ("id", "label", "metadata", "sha256")
FEATURES: dict[str, Any] = {name: {"dtype": "string", "_type": "Value"} for name in TEXTS}
UNIT = 2.0**-22  # how far a vector's length may be from 1 and still be 1, as float32 has it
BODY = Path("the file")  # as errors name it
_SHA256 = re.compile(r"[0-9a-f]{64}")


def export(gallery: Gallery, scratch: Scratch, outputs: Mapping[Identity, str], left: threading.Event) -> BinaryIO:
    """All sound rows as they were when it began; a file that is open and has no name any more. One row group is in
    memory at a time.

    outputs: which embedding of an encoder galleries hold, where that is known. Ends with an error once `left` is set.
    Raises NotFound (removed meanwhile), StorageFull.
    """
    with scratch.folder() as folder, gallery.all_rows(left, ROW_GROUP) as (encoder, chunks), told("the export"):
        path = folder / "gallery.parquet"
        file: pq.ParquetWriter | None = None
        try:
            for sound in chunks:
                if file is None and sound:
                    assert encoder is not None
                    D = len(sound[0].vector) // 4
                    said = footer(encoder, outputs.get(encoder, OUTPUT), FEATURES, D)
                    file = pq.ParquetWriter(path, _schema(D, said), write_page_checksum=True)
                if file is not None:
                    file.write_table(_table(sound, file.schema))
            if file is None:  # a gallery without images
                file = pq.ParquetWriter(path, _schema(None, {}))
        finally:
            if file is not None:
                file.close()
        return path.open("rb")


def _schema(D: int | None, metadata: dict[str, str]) -> pa.Schema:
    vector = pa.list_(pa.float32()) if D is None else pa.list_(pa.float32(), D)
    return pa.schema([*((name, pa.string()) for name in TEXTS), ("embedding", vector)], metadata=metadata)


def _table(rows: list[Row], schema: pa.Schema) -> pa.Table:
    flat = np.frombuffer(b"".join(row.vector for row in rows), dtype="<f4").astype(np.float32)
    texts = [(row.id, row.label, row.metadata, row.sha256 or None) for row in rows]
    columns = [pa.array([text[i] for text in texts], pa.string()) for i in range(len(TEXTS))]
    embedding = pa.FixedSizeListArray.from_arrays(pa.array(flat), schema.field("embedding").type.list_size)
    return pa.table([*columns, embedding], schema=schema)


@dataclass(frozen=True)
class GalleryFile:
    """A file that was looked over: every row of it can be added. dim: numbers per vector. output: which embedding."""

    path: Path
    encoder: Identity
    output: str
    dim: int
    count: int

    def batches(self, left: threading.Event) -> Iterator[list[NewVector]]:
        """All rows, in order. Ends with an error once `left` is set."""
        with _readable():
            yield from _batches(self.path, left)


def look_over(path: Path, left: threading.Event) -> GalleryFile:
    """Read a file to its end. Memory: its ids. Ends with an error once `left` is set.

    An id that no gallery takes, as a path, goes to `metadata.path`; the id is then the beginning of its sha256. Numbers
    as labels are named by the file's class names, where it has any.

    Raises InvalidRequest: it cannot be read; does not say which encoder made it; has no rows; has an id twice; a row
    that cannot be added, which is named.
    """
    with _readable():
        schema = pq.read_schema(path)
        try:
            encoder, output = made_by(schema)
        except (ValueError, KeyError, TypeError):
            encoder, output = None, None
        if encoder is None or not _is_identity(encoder) or not isinstance(output, str):
            raise InvalidRequest(
                "the file does not say which encoder made its embeddings: its metadata has no key `patchsight` with "
                '{"name", "sha256", "output"}'
            )
        _check_columns(path, schema)
        ids: set[str] = set()
        dim = count = 0
        for batch in _batches(path, left):
            for new in batch:
                if new.item.id in ids:
                    raise InvalidRequest(f"the file has id {new.item.id!r} twice", "id")
                ids.add(new.item.id)
                dim = dim or new.vector.size
                if new.vector.size != dim:
                    raise InvalidRequest(f"the file has embeddings of {dim} numbers, and of {new.vector.size}")
            count += len(batch)
    if not count:
        raise InvalidRequest("the file has no rows")
    return GalleryFile(path, encoder, output, dim, count)


@contextmanager
def _readable() -> Iterator[None]:
    """Arrow's errors in our words."""
    try:
        yield
    except (OSError, pa.ArrowException, UnicodeDecodeError, RecursionError) as error:
        said = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise InvalidRequest(f"the file cannot be read as Parquet: {said}") from None


def _is_identity(encoder: Identity) -> bool:
    texts = isinstance(encoder.name, str) and isinstance(encoder.sha256, str)
    return texts and 0 < len(encoder.name) <= 256 and bool(_SHA256.fullmatch(encoder.sha256))


def _check_columns(path: Path, schema: pa.Schema) -> None:
    """That there are those that are needed, once each; and that no row has a vector larger than any encoder gives."""
    for name in ("id", "embedding"):
        if schema.names.count(name) != 1:
            raise InvalidRequest(f"the file needs one column `{name}`; its columns are {schema.names[:20]}")
    kind = schema.field("embedding").type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        raise InvalidRequest(f"the file's column `embedding` holds {str(kind)[:80]}, no lists of numbers")
    footer_of_file = pq.read_metadata(path)
    for i in range(footer_of_file.num_row_groups):
        group = footer_of_file.row_group(i)
        for j in range(group.num_columns):
            column = group.column(j)
            if column.path_in_schema.startswith("embedding") and column.num_values > group.num_rows * MAX_DIM:
                raise InvalidRequest(f"the file has embeddings of more than {MAX_DIM:,} numbers")


def _batches(path: Path, left: threading.Event) -> Iterator[list[NewVector]]:
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        names = class_names(file.schema_arrow)
        columns = [name for name in (*TEXTS, "embedding") if name in file.schema_arrow.names]
        done = 0
        for batch in file.iter_batches(ROW_GROUP, columns=columns, use_threads=False):
            if left.is_set():
                raise CancelledError
            if len(batch):
                yield _rows(batch, names, done)
            done += len(batch)


def _rows(batch: pa.RecordBatch, names: list[str] | None, first: int) -> list[NewVector]:
    """first: the row that the batch begins with, for errors."""
    vectors = matrix(BODY, batch.column("embedding"))
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1) | ~vectors.any(axis=1))
    if bad.size:
        raise InvalidRequest(f"the file's row {first + bad[0]}: its embedding holds NaN or infinity, or has length 0")
    vectors = _units(vectors)
    ids, labels, metadata, digests = (_texts(batch, column, names) for column in TEXTS)
    rows = []
    for i, (id, label, described, digest) in enumerate(zip(ids, labels, metadata, digests, strict=True)):
        try:
            if id is None:
                raise InvalidRequest("its id is null", "id")
            if digest is not None and not _SHA256.fullmatch(digest):
                raise InvalidRequest(f"sha256 {digest[:80]!a} is not 64 hex digits", "sha256")
            rows.append(NewVector(_item(id, label, described), digest, vectors[i]))
        except PatchsightError as error:
            raise InvalidRequest(f"the file's row {first + i}: {error.message}", error.param) from None
    return rows


def _item(id: str, label: str | None, described: str | None) -> Item:
    """Raises InvalidRequest."""
    metadata = parse_metadata(described) if described is not None else {}
    try:
        check_id(id)
    except InvalidRequest:
        if not id:
            raise
        metadata = {"path": id} | metadata
        id = hashlib.sha256(id.encode()).hexdigest()[:32]
    return Item(id, label, metadata)


def _texts(batch: pa.RecordBatch, column: str, names: list[str] | None) -> list[str | None]:
    """A column as texts; None in each row where there is none. Raises InvalidRequest, pa.ArrowException."""
    if column not in batch.schema.names:
        return [None] * len(batch)
    values = batch.column(column)
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if column == "label" and pa.types.is_integer(values.type):
        numbers = values.to_pylist()
        return [_class(number, names) for number in numbers]
    if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type) or pa.types.is_null(values.type)):
        raise InvalidRequest(f"the file's column `{column}` holds {str(values.type)[:80]}, no text", column)
    texts: list[str | None] = values.to_pylist()
    return texts


def _class(number: int | None, names: list[str] | None) -> str | None:
    """The name of a class; no name where it has none, and None for what has no label."""
    if number is None or number < 0:
        return None
    return str(names[number]) if names is not None and number < len(names) else str(number)


def _units(vectors: F32) -> F32:
    """To length 1. What is that long already stays bit by bit: twice is as once."""
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)
    other = np.abs(lengths - 1) > UNIT
    if other.any():
        vectors = vectors.copy()
        vectors[other] = normalize(vectors[other])
    return vectors
