"""A binary column of Parquet files, value by value in any order, in little memory."""

import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from patchsight_serve.errors import DamagedImage
from patchsight_serve.pages import I64, STRANGE, Chunk, Page, Values, chunks_of, find_pages, read_page

Key = tuple[int, int]  # chunk and page
WHOLE = -1  # in place of a page: the whole row group
KEEP = 256 * 1024**2  # bytes


class BinaryColumn:
    """The column `name` (dotted: `image.bytes`) of some files, one behind the other. Null is `b""`.

    A value costs reading the page it lies in, 1 MB or 1,024 values; in a file without compression only the first one
    of a page does, and then each costs itself alone. Where the pages are not as `pages` knows them, a value costs its
    row group. What was read last is kept, up to `keep` bytes. Any number of threads may read.
    """

    def __init__(self, files: Sequence[tuple[Path, pq.FileMetaData]], name: str, keep: float = KEEP) -> None:
        self._name = name
        self._metadata = dict(files)
        self._identity = {path: _identity(path.stat()) for path, _ in files}
        self._chunks = [chunk for path, metadata in files for chunk in chunks_of(path, metadata, name)]
        self._ends = list(accumulate(chunk.rows for chunk in self._chunks))
        self._strange = {c for c, chunk in enumerate(self._chunks) if not chunk.known}
        self._pages: dict[int, list[Page]] = {}
        self._verbatim: dict[Key, tuple[I64, I64]] = {}  # where the values of a page begin and end in the file
        self._locks = _locks()
        self.kept = Kept(keep)

    def __getstate__(self) -> dict[str, Any]:
        """For another process, which reads on its own, and from the same files alone."""
        return vars(self) | {"_locks": None, "kept": self.kept.most}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state | {"_locks": _locks(), "kept": Kept(state["kept"])})

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def nbytes(self) -> int:
        """Bytes of the column in its files."""
        return sum(chunk.end - chunk.start for chunk in self._chunks)

    @property
    def page_bytes(self) -> float:
        """About what the largest pages take: pyarrow ends none before 1,024 values, if there are as many."""
        return self.nbytes / len(self) * min(1024, max(chunk.rows for chunk in self._chunks))

    @property
    def is_compressed(self) -> bool:
        return any(chunk.codec != "UNCOMPRESSED" for chunk in self._chunks)

    def __getitem__(self, row: int) -> bytes:
        """Raises OSError where the file is gone or was changed, DamagedImage where its content is broken."""
        c = bisect_right(self._ends, row)
        row -= self._ends[c] - self._chunks[c].rows
        if c not in self._strange:
            try:
                pages = self._pages_of(c)
                p = bisect_right(pages, row, key=lambda page: page.first) - 1
                return self._value(c, p, row - pages[p].first)
            except STRANGE:
                self._strange.add(c)  # pyarrow may know better, or says what is wrong
        return self._value(c, WHOLE, row)

    def _pages_of(self, c: int) -> list[Page]:
        with self._locks[hash(c) % len(self._locks)]:
            if c not in self._pages:
                with self._open(self._chunks[c].path) as file:
                    self._pages[c] = find_pages(file, self._chunks[c])
            return self._pages[c]

    def _value(self, c: int, p: int, r: int) -> bytes:
        """A page is read once, by whichever thread comes first."""
        with self._locks[hash((c, p)) % len(self._locks)]:
            values = self.kept.get((c, p))
            if values is None and (c, p) not in self._verbatim:
                values = self._whole(self._chunks[c]) if p == WHOLE else self._page(c, p)
                self.kept.put((c, p), values)
                if values.offset is not None:
                    self._verbatim[c, p] = values.offset + values.starts, values.offset + values.ends
        if values is not None:
            return values[r]
        starts, ends = self._verbatim[c, p]
        with self._open(self._chunks[c].path) as file:
            file.seek(starts[r])
            return file.read(ends[r] - starts[r])

    def _page(self, c: int, p: int) -> Values:
        chunk, pages = self._chunks[c], self._pages[c]
        with self._open(chunk.path) as file:
            dictionary = None
            if pages[0].is_dictionary and p > 0:
                dictionary = self.kept.get((c, 0)) or read_page(file, chunk, pages[0], None)
                self.kept.put((c, 0), dictionary)
            return read_page(file, chunk, pages[p], dictionary)

    def _whole(self, chunk: Chunk) -> Values:
        try:
            with self._open(chunk.path) as file:
                reader = pq.ParquetFile(file, metadata=self._metadata[chunk.path])
                table = reader.read_row_group(chunk.group, columns=[self._name], use_threads=False)
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and (error.errno or isinstance(error, Changed)):
                raise
            raise DamagedImage(f"row group {chunk.group} of {chunk.path} is damaged: {error}") from None
        while pa.types.is_struct(table.schema.field(0).type):
            table = table.flatten()
        values = table.column(0).cast(pa.large_binary()).fill_null(b"").combine_chunks()
        _, offsets, content = values.buffers()
        place = np.frombuffer(offsets, np.int64, len(values) + 1, 8 * values.offset)
        return Values(content.to_pybytes() if content else b"", place[:-1], place[1:])

    def _open(self, path: Path) -> BinaryIO:
        file = path.open("rb")
        if _identity(os.fstat(file.fileno())) != self._identity[path]:
            file.close()
            raise Changed(f"{path} was changed since it was opened")
        return file


class Changed(OSError):
    """A file that is not the one whose footer was read: its rows would be others'."""


class Kept:
    """The values read last, up to `most` bytes."""

    def __init__(self, most: float) -> None:
        self.most, self._held = most, 0
        self._values: OrderedDict[Key, Values] = OrderedDict()
        self._lock = Lock()

    def get(self, key: Key) -> Values | None:
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
            return self._values.get(key)

    def put(self, key: Key, values: Values) -> None:
        with self._lock:
            if key not in self._values:
                self._values[key] = values
                self._held += values.nbytes
            while self._held > self.most and len(self._values) > 1:
                self._held -= self._values.popitem(last=False)[1].nbytes


def _locks() -> list[Lock]:
    """One for each key that hashes to it."""
    return [Lock() for _ in range(61)]


def _identity(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_size, stat.st_mtime_ns
