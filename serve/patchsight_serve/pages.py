"""A Parquet page: found in its file, and taken apart into the binary values of its rows.

A page holds 1 MB, or 1,024 values where these are large; a row group may hold gigabytes, and pyarrow hands out nothing
smaller. This reads pages as https://parquet.apache.org/docs/file-format/ describes them, if their values are PLAIN or
in a dictionary, as those of pyarrow and Hugging Face are unless asked otherwise. Any other raises one of `STRANGE`:
leave its row group to pyarrow.
"""

import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

I64 = np.ndarray[Any, np.dtype[np.int64]]

# What taking apart raises where a page is of another kind, or broken.
STRANGE = (
    struct.error, IndexError, KeyError, ValueError, TypeError, OverflowError, RecursionError, MemoryError,
    pa.ArrowException,
)  # fmt: skip
_CODECS = {"UNCOMPRESSED", "SNAPPY", "GZIP", "ZSTD", "BROTLI"}  # LZ4 is two formats under one name
_DATA, _DICTIONARY, _DATA_V2 = 0, 2, 3  # the format's PageType
_PLAIN, _INDICES = (0,), (2, 8)  # its Encoding
_HEADER_BYTES = 16 * 1024  # as long as a header gets, were it not for minima and maxima


@dataclass(frozen=True)
class Chunk:
    """One binary column of one row group: the file, and the part of it where the pages lie.

    levels: largest definition level, which is that of a value that is there; 0 where none can be null.
    known: whether it is worth to look at the pages at all.
    """

    path: Path
    group: int
    rows: int
    start: int
    end: int
    codec: str
    levels: int
    known: bool


@dataclass(frozen=True)
class Page:
    """start, end: of its content, in the file. first: its first row in the chunk; a dictionary has none of its own.
    header: the format's PageHeader, by field number."""

    start: int
    end: int
    first: int
    header: dict[int, Any]

    @property
    def is_dictionary(self) -> bool:
        return bool(self.header[1] == _DICTIONARY)


@dataclass(frozen=True)
class Values:
    """Row `r` holds `buffer[starts[r]:ends[r]]`; int64 `(rows,)` each. Null is empty.

    offset: where in the file the buffer lies, if that is not compressed.
    """

    buffer: bytes
    starts: I64
    ends: I64
    offset: int | None = None

    def __getitem__(self, r: int) -> bytes:
        return self.buffer[self.starts[r] : self.ends[r]]

    @property
    def nbytes(self) -> int:
        return len(self.buffer) + self.starts.nbytes + self.ends.nbytes


def chunks_of(path: Path, metadata: pq.FileMetaData, name: str) -> list[Chunk]:
    """The chunks of column `name` (dotted: `image.bytes`), one for each row group."""
    number = [metadata.schema.column(i).path for i in range(metadata.num_columns)].index(name)
    column = metadata.schema.column(number)
    flat = column.physical_type == "BYTE_ARRAY" and column.max_repetition_level == 0
    chunks = []
    for g in range(metadata.num_row_groups):
        group = metadata.row_group(g)
        meta = group.column(number)
        start = meta.dictionary_page_offset or meta.data_page_offset  # a dictionary comes first
        known = flat and meta.compression in _CODECS
        end = start + meta.total_compressed_size
        level = column.max_definition_level
        chunks.append(Chunk(path, g, group.num_rows, start, end, meta.compression, level, known))
    return chunks


def find_pages(file: BinaryIO, chunk: Chunk) -> list[Page]:
    """Walk from header to header; raises one of `STRANGE` if they do not cover the chunk and its rows."""
    pages, at, first = list[Page](), chunk.start, 0
    while at < chunk.end:
        file.seek(at)
        data = file.read(_HEADER_BYTES)
        try:
            header, size = read_struct(data, 0)
        except IndexError:
            header, size = read_struct(data + file.read(64 * _HEADER_BYTES), 0)
        pages.append(Page(at + size, at + size + header[3], first, header))
        count = header[5][1] if header[1] == _DATA else header[8][1] if header[1] == _DATA_V2 else 0
        first += count
        if header[3] < 0 or count < 0 or first > chunk.rows:
            raise ValueError("a page of impossible size")
        at = pages[-1].end
    if at != chunk.end or first != chunk.rows:
        raise ValueError("the pages do not add up to the row group")
    return pages


def read_page(file: BinaryIO, chunk: Chunk, page: Page, dictionary: Values | None) -> Values:
    """The values of a page. `dictionary`: those of the chunk's dictionary page, where it has one."""
    file.seek(page.start)
    data = file.read(page.end - page.start)
    header, compressed = page.header, chunk.codec != "UNCOMPRESSED"
    if header[1] == _DATA_V2:
        # Its levels are never compressed, and its values may not be.
        info = header[8]
        count, encoding, at, levels = info[1], info[4], info[5], data[: info[5]]
        compressed = compressed and info.get(7, True)
        if compressed:
            data, at = _decompress(data[at:], chunk.codec, header[2] - at), 0
    else:
        if compressed:
            data = _decompress(data, chunk.codec, header[2])
        if page.is_dictionary:
            return _plain(data, 0, header[7][1], None if compressed else page.start)
        info = header[5]
        count, encoding, at = info[1], info[2], 4 + struct.unpack_from("<I", data)[0] if chunk.levels else 0
        levels = data[4:at]
    present = np.ones(count, bool)
    if chunk.levels:
        present = hybrid(levels, 0, chunk.levels.bit_length(), count) == chunk.levels
    if encoding in _PLAIN:
        found = _plain(data, at, int(present.sum()), None if compressed else page.start)
    elif encoding in _INDICES and dictionary is not None:
        found = _look_up(data, at, int(present.sum()), dictionary)
    else:
        raise ValueError(f"encoding {encoding}")
    starts, ends = np.zeros((2, count), np.int64)
    starts[present], ends[present] = found.starts, found.ends
    return replace(found, starts=starts, ends=ends)


def _decompress(data: bytes, codec: str, size: int) -> bytes:
    if codec == "UNCOMPRESSED" or not size:
        return data
    try:
        out: bytes = pa.decompress(data, decompressed_size=size, codec=codec.lower(), asbytes=True)
    except OSError as error:  # as pyarrow has it, but no file is gone
        raise ValueError(str(error)) from None
    return out


def _plain(data: bytes, at: int, count: int, offset: int | None) -> Values:
    """Each value behind its length, 4 bytes."""
    starts, ends = list[int](), list[int]()
    for _ in range(count):
        start = at + 4
        at = start + int.from_bytes(data[at:start], "little")
        starts.append(start)
        ends.append(at)
        if at > len(data):
            raise IndexError("a value is cut off")
    return Values(data, np.array(starts, np.int64), np.array(ends, np.int64), offset)


def _look_up(data: bytes, at: int, count: int, dictionary: Values) -> Values:
    """Numbers in the dictionary, behind a byte that says how many bits each has."""
    index = hybrid(data, at + 1, data[at], count) if count else np.zeros(0, np.int64)
    return replace(dictionary, starts=dictionary.starts[index], ends=dictionary.ends[index])


def hybrid(data: bytes, at: int, width: int, count: int) -> I64:
    """The format's RLE and bit-packing hybrid: int64 `(count,)` of `width` bits each, from `data[at:]`."""
    out, filled = np.zeros(count, np.int64), 0
    while filled < count and width:
        header, at = _varint(data, at)
        many = (header >> 1) * 8 if header & 1 else header >> 1
        size = (header >> 1) * width if header & 1 else (width + 7) // 8
        if many == 0 or at + size > len(data):
            raise IndexError("a run is cut off")
        if header & 1:
            bits = np.unpackbits(np.frombuffer(data, np.uint8, size, at), bitorder="little").reshape(-1, width)
            values = (bits @ (1 << np.arange(width)))[: count - filled]
            out[filled : filled + len(values)] = values
        else:
            out[filled : filled + many] = int.from_bytes(data[at : at + size], "little")
        at += size
        filled += many
    return out


def read_struct(data: bytes, at: int) -> tuple[dict[int, Any], int]:
    """A struct of Thrift's compact protocol: its numbers, truths and structs by field number, and where it ends.

    Raises IndexError if `data` ends before.
    """
    fields, number = dict[int, Any](), 0
    while kind := data[at]:
        at += 1
        if kind >> 4:
            number += kind >> 4
        else:
            number, at = _zigzag(data, at)
        fields[number], at = (kind & 15 == 1, at) if kind & 15 in (1, 2) else _read(kind & 15, data, at)
    return fields, at + 1


def _read(kind: int, data: bytes, at: int) -> tuple[Any, int]:
    match kind:
        case 3:
            return data[at], at + 1
        case 4 | 5 | 6:
            return _zigzag(data, at)
        case 7:
            return None, at + 8
        case 8:
            size, at = _varint(data, at)
            return None, at + size
        case 12:
            return read_struct(data, at)
    raise ValueError(f"Thrift type {kind} has no place in a page header")


def _zigzag(data: bytes, at: int) -> tuple[int, int]:
    value, at = _varint(data, at)
    return (value >> 1) ^ -(value & 1), at


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
