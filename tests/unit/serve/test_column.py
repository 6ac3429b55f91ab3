"""Values of a Parquet column, one at a time: pyarrow, which reads whole tables, is the oracle."""

import itertools
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from patchsight_serve.column import BinaryColumn
from patchsight_serve.errors import DamagedImage
from patchsight_serve.pages import hybrid, read_struct

ROWS = 700


def images(rows: int = ROWS, seed: int = 0, largest: int = 300) -> list[dict[str, Any] | None]:
    """Some absent, some without bytes, some empty, some twice."""
    rng = random.Random(seed)
    found: list[dict[str, Any] | None] = []
    for i in range(rows):
        content = rng.randbytes(rng.randrange(largest))
        kind = rng.random()
        if kind < 0.05:
            found.append(None)
        elif kind < 0.3 and i:
            found.append(found[rng.randrange(i)])
        else:
            found.append({"bytes": None if kind > 0.95 else content, "path": f"{i}"})
    return found


def expected(rows: list[dict[str, Any] | None]) -> list[bytes]:
    return [(row or {}).get("bytes") or b"" for row in rows]


def write(path: Path, rows: list[dict[str, Any] | None], **options: Any) -> Path:
    pq.write_table(pa.table({"image": rows, "label": list(range(len(rows)))}), path, **options)
    return path


class Counting(BinaryColumn):
    """Remembers how many bytes were read of its files, and how often one was opened."""

    read = opened = 0

    def _open(self, path: Path) -> BinaryIO:
        file, column = super()._open(path), self
        self.opened += 1

        class File:
            def __enter__(self) -> "File":
                return self

            def __exit__(self, *_: object) -> None:
                file.close()

            def read(self, n: int) -> bytes:
                data = file.read(n)
                column.read += len(data)
                return data

            def seek(self, at: int) -> int:
                return file.seek(at)

        return File()  # type: ignore[return-value]


def column(*files: Path, keep: float = 2**20, kind: type[BinaryColumn] = BinaryColumn) -> Any:
    return kind([(file, pq.ParquetFile(file).metadata) for file in files], "image.bytes", keep)


LAYOUTS = [
    {"compression": compression, "data_page_version": version, "use_dictionary": dictionary, **sizes}
    for compression, version, dictionary, sizes in itertools.product(
        ("none", "snappy", "gzip", "zstd", "brotli"),
        ("1.0", "2.0"),
        (True, False),
        (
            {"row_group_size": 150},
            {"data_page_size": 2_000, "write_batch_size": 7},
            {"dictionary_pagesize_limit": 9_000, "data_page_size": 4_000, "write_batch_size": 16},
        ),
    )
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: "-".join(map(str, x.values())))
def test_values_are_those_of_pyarrow_in_any_order(tmp_path: Path, layout: dict[str, Any]) -> None:
    rows = images()
    found = column(write(tmp_path / "a.parquet", rows, **layout), keep=5_000)
    order = random.Random(1).sample(range(ROWS), ROWS)
    assert len(found) == ROWS
    assert {i: found[i] for i in order} == dict(enumerate(expected(rows)))
    assert not found._strange  # pyarrow was not asked


@pytest.mark.parametrize(
    "layout",
    [
        {"compression": "lz4"},
        {"use_dictionary": False, "column_encoding": {"image.bytes": "DELTA_LENGTH_BYTE_ARRAY"}},
        {"use_dictionary": False, "column_encoding": {"image.bytes": "DELTA_BYTE_ARRAY"}, "compression": "none"},
    ],
    ids=["lz4", "delta lengths", "delta"],
)
def test_unknown_pages_are_left_to_pyarrow(tmp_path: Path, layout: dict[str, Any]) -> None:
    rows = images()
    found = column(write(tmp_path / "a.parquet", rows, row_group_size=150, **layout))
    assert [found[i] for i in range(ROWS)] == expected(rows)
    assert found._strange == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.string(), pa.binary(3)])
@pytest.mark.parametrize("nullable", [True, False])
def test_every_type_that_holds_bytes(tmp_path: Path, kind: pa.DataType, nullable: bool) -> None:
    words = [b"abc", b"def", b"xyz"] * 20
    inner = pa.array([w.decode() for w in words] if kind == pa.string() else words, kind)
    struct = pa.StructArray.from_arrays([inner], fields=[pa.field("bytes", kind, nullable=nullable)])
    schema = pa.schema([pa.field("image", struct.type, nullable=nullable)])
    pq.write_table(pa.Table.from_arrays([struct], schema=schema), tmp_path / "a.parquet")
    found = column(tmp_path / "a.parquet")
    assert [found[i] for i in range(60)] == words


def test_several_files_follow_each_other(tmp_path: Path) -> None:
    parts = [images(rows, seed=rows) for rows in (3, 150, 2)]
    found = column(*(write(tmp_path / f"{i}.parquet", rows, row_group_size=40) for i, rows in enumerate(parts)))
    assert [found[i] for i in range(155)] == expected(sum(parts, []))


def test_what_is_kept_is_bounded(tmp_path: Path) -> None:
    rows = images(2_000)
    path = write(tmp_path / "a.parquet", rows, row_group_size=100, use_dictionary=False)
    found = column(path, keep=50_000)
    for i in random.Random(2).choices(range(2_000), k=300):
        found[i]
        assert sum(values.nbytes for values in found.kept._values.values()) == found.kept._held <= 50_000
    small = column(path, keep=0)
    assert small[7] == expected(rows)[7]
    assert len(small.kept._values) == 1  # at least the last


@pytest.mark.parametrize("dictionary", [True, False])
def test_without_compression_a_value_costs_itself_alone(tmp_path: Path, dictionary: bool) -> None:
    rows = images(1_000)
    path = write(tmp_path / "a.parquet", rows, compression="none", use_dictionary=dictionary, row_group_size=250)
    found, truth = column(path, keep=0, kind=Counting), expected(rows)
    for i in range(0, 1_000, 125):
        found[i]
    first = found.read
    assert first < 3 * path.stat().st_size
    order = random.Random(3).sample(range(1_000), 500)
    assert [found[i] for i in order] == [truth[i] for i in order]
    assert found.read - first <= sum(len(truth[i]) for i in order)


def test_threads_read_each_page_once(tmp_path: Path) -> None:
    rows = images(2_000)
    path = write(tmp_path / "a.parquet", rows, row_group_size=100, use_dictionary=False, compression="snappy")
    found = column(path, keep=2**30, kind=Counting)
    order = random.Random(4).choices(range(2_000), k=1_000)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(found.__getitem__, order)) == [expected(rows)[i] for i in order]
    assert found.opened == 2 * 20  # to find the pages, and to read the one there is


def test_a_file_that_goes_or_changes_is_an_error_of_the_system(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", images(), row_group_size=100)
    found = column(path, keep=0)
    assert found[0] is not None
    write(path, images(seed=1), row_group_size=100)
    with pytest.raises(OSError, match=r"a\.parquet was changed since it was opened"):
        found[500]
    path.unlink()
    with pytest.raises(FileNotFoundError):
        found[500]


@pytest.mark.parametrize("layout", [{"compression": "snappy"}, {"compression": "none"}, {"compression": "lz4"}])
def test_damage_harms_no_other_row_group_and_raises_what_it_should(
    tmp_path: Path, layout: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = images(300)
    whole = write(tmp_path / "a.parquet", rows, row_group_size=100, **layout).read_bytes()
    metadata = pq.ParquetFile(tmp_path / "a.parquet").metadata
    begin, end = (metadata.row_group(g).column(0).dictionary_page_offset for g in (1, 2))
    monkeypatch.setattr("patchsight_serve.column._identity", lambda _: (0, 0))
    rng, damaged = random.Random(5), 0
    for _ in range(25):
        found = column(tmp_path / "a.parquet")
        broken = bytearray(whole)
        for at in rng.choices([begin + rng.randrange(60), rng.randrange(begin, end)], k=3):
            broken[at] = rng.randrange(256)
        (tmp_path / "a.parquet").write_bytes(broken)
        for i in (100, 150, 199):
            try:
                assert isinstance(found[i], bytes)
            except DamagedImage as error:
                assert "row group 1 of " in error.message  # noqa: PT017 - not all damage is seen
                damaged += 1
        assert [found[i] for i in (0, 99, 200, 299)] == [expected(rows)[i] for i in (0, 99, 200, 299)]
        (tmp_path / "a.parquet").write_bytes(whole)
    assert damaged


@pytest.mark.parametrize("width", [1, 2, 3, 7, 8, 11, 17])
def test_the_hybrid_of_runs_and_packed_bits(width: int) -> None:
    """Encoded here as the format's page says: a varint, whose lowest bit tells which of the two follows."""
    rng = random.Random(width)
    data, values = b"", []
    for _ in range(20):
        if rng.random() < 0.5:
            run, value = rng.randrange(1, 60), rng.randrange(2**width)
            data += bytes([run << 1]) + value.to_bytes((width + 7) // 8, "little")
            values += [value] * run
        else:
            packed = [rng.randrange(2**width) for _ in range(8 * rng.randrange(1, 5))]
            number = sum(value << (width * i) for i, value in enumerate(packed))
            data += bytes([len(packed) // 8 << 1 | 1]) + number.to_bytes(len(packed) * width // 8, "little")
            values += packed
    for count in (len(values), len(values) - 3, 1, 0):
        assert hybrid(b"??" + data, 2, width, count).tolist() == values[:count]
    with pytest.raises(IndexError):
        hybrid(data, 0, width, len(values) + 1)


def test_a_struct_of_thrift() -> None:
    """Fields 1: i32 −3, 2: true, 5: binary, 9: struct {1: i64 300}, 40: false; and a byte that is not its own."""
    data = bytes([0x15, 5, 0x11, 0x38, 2, 7, 7, 0x4C, 0x16, 0xD8, 4, 0, 0x02, 80, 0, 99])
    assert read_struct(data, 0) == ({1: -3, 2: True, 5: None, 9: {1: 300}, 40: False}, len(data) - 1)
    for n in range(len(data) - 1):
        with pytest.raises(IndexError):
            read_struct(data[:n], 0)


@pytest.mark.data
@pytest.mark.parametrize("name", ["clothing10/validation", "caltech101/test", "cifar10/test"])
def test_real_files(data: Path, name: str) -> None:
    path = data / f"{name}.parquet"
    truth = pq.read_table(path).column("image").combine_chunks().field("bytes").to_pylist()
    found = column(path)
    for i in random.Random(6).sample(range(len(truth)), 300):
        assert found[i] == truth[i]
    assert not found._strange


def test_nothing_is_asked_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row group that was strange once goes to pyarrow at once the next time."""
    found = column(write(tmp_path / "a.parquet", images(), use_dictionary=False, compression="snappy"))
    calls: list[int] = []
    broken: Callable[..., Any] = lambda *_: calls.append(1) or [][0]  # noqa: E731
    monkeypatch.setattr("patchsight_serve.column.read_page", broken)
    assert [found[i] for i in range(5)] == expected(images())[:5]
    assert len(calls) == 1
