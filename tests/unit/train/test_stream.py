"""Streamed images are the resident ones, whatever happens to their files."""

import contextlib
import io
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Generator, Tensor

from patchsight_serve.errors import InvalidRequest
from patchsight_serve.sample_gallery import SAMPLES
from patchsight_train import data as data_module
from patchsight_train import stream as stream_module
from patchsight_train.data import LOST_AFTER, DataLost, EncodedImages, Images, load_images
from patchsight_train.stream import StreamedImages, open_images

CPU = torch.device("cpu")


class Screen(Console):
    """A narrow console that remembers what was printed."""

    def __init__(self) -> None:
        super().__init__(file=io.StringIO(), width=40)

    @property
    def lines(self) -> list[str]:
        assert isinstance(self.file, io.StringIO)
        return [line for line in self.file.getvalue().splitlines() if line]


@pytest.fixture
def screen() -> Screen:
    return Screen()


@pytest.fixture
def stream(screen: Screen) -> Callable[..., StreamedImages]:
    """`stream(source, …, size=16)`."""

    def stream(*sources: Path, size: int = 16) -> StreamedImages:
        return StreamedImages(EncodedImages([str(s) for s in sources]), size, screen)

    return stream


def orders(n: int, b: int, epochs: int = 2) -> Iterator[Tensor]:
    """Every image once an epoch, `b` at a time, in an order of its own."""
    generator = Generator().manual_seed(n)
    for _ in range(epochs):
        yield from torch.randperm(n, generator=generator).split(b)


def flat(folder: Path, count: int) -> Path:
    """`count` PNGs, `000.png` and so on, each all over of its number."""
    folder.mkdir()
    for i in range(count):
        Image.fromarray(np.full((4, 4, 3), i, dtype=np.uint8)).save(folder / f"{i:03}.png")
    return folder


def numbers(batch: Tensor) -> list[int]:
    return batch[:, 0, 0, 0].tolist()


def decoding() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("decode")]


@pytest.fixture(autouse=True)
def threads_end() -> Iterator[None]:
    yield
    assert not decoding()


@pytest.mark.parametrize("b", [1, 5, 64])
@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_batches_are_those_of_resident_images(
    b: int, kind: str, picture_folder: Path, stream: Callable[..., StreamedImages]
) -> None:
    source = picture_folder if kind == "folder" else SAMPLES
    resident, streamed = load_images([str(source)], 24, None, Screen()), stream(source, size=24)
    assert len(streamed) == len(resident)
    assert torch.equal(streamed.labels, resident.labels)
    assert streamed.class_names == resident.class_names
    pairs = zip(
        resident.batches(orders(len(resident), b), CPU), streamed.batches(orders(len(resident), b), CPU), strict=True
    )
    count = 0
    for expected, found in pairs:
        assert found.dtype == torch.uint8
        assert torch.equal(found, expected)
        count += len(found)
    assert count == 2 * len(resident)


def test_parquet_that_memory_does_not_hold(tmp_path: Path, stream: Callable[..., StreamedImages]) -> None:
    pq.write_table(pq.read_table(SAMPLES), tmp_path / "a.parquet", row_group_size=20)
    streamed, truth = stream(tmp_path / "a.parquet"), load_images([str(SAMPLES)], 16, None, Screen()).pixels
    streamed.encoded.datasets[0].parquet.kept.most = 500_000
    for order, batch in zip(orders(200, 32), streamed.batches(orders(200, 32), CPU), strict=True):
        assert torch.equal(batch, truth[order])
    kept = streamed.encoded.datasets[0].parquet.kept
    assert sum(values.nbytes for values in kept._values.values()) <= 500_000


@pytest.mark.data
def test_real_photos_of_several_files(data: Path, stream: Callable[..., StreamedImages]) -> None:
    files = [data / "clothing10" / f"{part}.parquet" for part in ("validation", "test")]
    truth, streamed = load_images(map(str, files), 32, None, Screen()), stream(*files, size=32)
    for order, batch in zip(orders(713, 100, 1), streamed.batches(orders(713, 100, 1), CPU), strict=True):
        assert torch.equal(batch, truth.pixels[order])


# What is chosen


@pytest.mark.parametrize(
    ("free", "resident", "kind", "said"),
    [
        (2**30, None, Images, "12 images of 16 px need 0.0 GiB decoded, 1.0 GiB are free: kept in memory"),
        (9_000, None, StreamedImages, "12 images of 16 px need 0.0 GiB decoded, 0.0 GiB are free: streamed, "),
        (2**30, False, StreamedImages, "1.0 GiB are free: streamed, "),
        (2**30, True, Images, "kept in memory"),
    ],
)
def test_what_fits_is_resident_and_the_rest_streamed(
    free: int, resident: bool | None, kind: type, said: str, picture_folder: Path, screen: Screen,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(data_module, "available_memory", lambda: free)
    images = open_images([str(picture_folder)], 16, None, screen, resident)
    assert type(images) is kind
    assert len(images) == 12
    assert len(screen.lines) == 1
    assert said in screen.lines[0]


def test_every_rank_has_its_own_copy(picture_folder: Path, screen: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_module, "available_memory", lambda: 20_000)  # of which one copy takes 9,216
    assert type(open_images([str(picture_folder)], 16, None, screen)) is Images
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert type(open_images([str(picture_folder)], 16, None, screen)) is StreamedImages


def test_what_must_be_resident_and_does_not_fit_is_refused(
    picture_folder: Path, screen: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_module, "available_memory", lambda: 9_000)
    with pytest.raises(InvalidRequest, match=r"12 images of 16 px need .* are free; use a smaller"):
        open_images([str(picture_folder)], 16, None, screen, resident=True)


@pytest.mark.parametrize(("compression", "said"), [("snappy", 1), ("none", 0)])
def test_parquet_larger_than_the_memory_says_what_it_costs(
    compression: str, said: int, tmp_path: Path, screen: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    pq.write_table(pq.read_table(SAMPLES), tmp_path / "a.parquet", row_group_size=100, compression=compression)
    images = open_images([str(tmp_path / "a.parquet")], 16, None, screen, resident=False)
    assert isinstance(images, StreamedImages)
    assert images.encoded.datasets[0].parquet.kept.most > 2**26
    assert len(screen.lines) == 1
    monkeypatch.setattr(stream_module, "available_memory", lambda: 400_000)
    images = open_images([str(tmp_path / "a.parquet")], 16, None, screen, resident=False)
    assert isinstance(images, StreamedImages)
    assert images.encoded.datasets[0].parquet.kept.most == 100_000
    assert sum("each image drawn costs reading " in line for line in screen.lines) == said


def test_limit_takes_the_first(tmp_path: Path, screen: Screen) -> None:
    images = open_images([str(flat(tmp_path / "a", 9))], 4, 5, screen, resident=False)
    assert len(images) == 5
    (batch,) = images.batches([torch.arange(5)], CPU)
    assert numbers(batch) == [0, 1, 2, 3, 4]


# Damage


def test_the_next_readable_image_stands_in_for_a_damaged_one(
    tmp_path: Path, stream: Callable[..., StreamedImages], screen: Screen
) -> None:
    folder = flat(tmp_path / "a", 12)
    for i, content in ((3, b"no image"), (4, b""), (11, b"\xff\xd8\xff\xe0 half a JPEG")):
        (folder / f"{i:03}.png").write_bytes(content)
    streamed = stream(folder, size=4)
    expected = [0, 1, 2, 5, 5, 5, 6, 7, 8, 9, 10, 0]
    for order, batch in zip(orders(12, 5, 3), streamed.batches(orders(12, 5, 3), CPU), strict=True):
        assert numbers(batch) == [expected[i] for i in order.tolist()]
    reported = sorted(line.split(":")[0] for line in screen.lines)
    assert reported == [f"replaced by the next {name}.png" for name in ("003", "004", "011")]  # once each
    again = stream(folder, size=4)  # a resumed run, which meets them in another order
    (batch,) = again.batches([torch.arange(12).flip(0)], CPU)
    assert numbers(batch) == expected[::-1]


def test_a_damaged_row_among_good_ones(tmp_path: Path, stream: Callable[..., StreamedImages], screen: Screen) -> None:
    good = [p.read_bytes() for p in sorted(flat(tmp_path / "a", 4).iterdir())]
    image = [{"bytes": good[0]}, {"bytes": b"?"}, None, {"bytes": good[3]}]
    pq.write_table(pa.table({"image": image}), tmp_path / "a.parquet")
    (batch,) = stream(tmp_path / "a.parquet", size=4).batches([torch.arange(4)], CPU)
    assert numbers(batch) == [0, 3, 3, 3]
    assert [line.split(":")[0] for line in screen.lines] == [f"replaced by the next row {i}" for i in (1, 2)]


def test_not_one_good_image_is_an_error(tmp_path: Path, stream: Callable[..., StreamedImages]) -> None:
    for i in range(LOST_AFTER + 3):
        (tmp_path / f"{i}.png").write_bytes(b"no image")
    with pytest.raises(InvalidRequest, match=f"none of the {LOST_AFTER + 3} images could be read"):
        next(stream(tmp_path).batches([torch.arange(2)], CPU))


def test_a_few_files_that_go_are_replaced(
    tmp_path: Path, stream: Callable[..., StreamedImages], screen: Screen
) -> None:
    folder = flat(tmp_path / "a", 30)
    streamed = stream(folder, size=4)
    for i in range(10, 10 + LOST_AFTER - 1):
        (folder / f"{i:03}.png").unlink()
    (batch,) = streamed.batches([torch.arange(30)], CPU)
    assert numbers(batch) == [10 + LOST_AFTER - 1 if 10 <= i < 10 + LOST_AFTER - 1 else i for i in range(30)]
    assert len(screen.lines) == LOST_AFTER - 1
    assert "No such file" in screen.lines[0]


@pytest.mark.parametrize("count", [LOST_AFTER - 3, 40])
def test_a_folder_that_vanishes_ends_it_with_its_name(
    count: int, tmp_path: Path, stream: Callable[..., StreamedImages]
) -> None:
    folder = flat(tmp_path / "a", count)
    batches = stream(folder, size=4).batches(orders(count, 2, 50), CPU)
    assert len(next(batches)) == 2
    shutil.rmtree(folder)
    with pytest.raises(DataLost, match="No such file") as error:
        list(batches)
    assert str(folder) in error.value.message
    assert f"{min(count, LOST_AFTER)} images in a row cannot be read" in error.value.message
    assert not decoding()


def test_a_parquet_file_that_vanishes(tmp_path: Path, stream: Callable[..., StreamedImages]) -> None:
    pq.write_table(pq.read_table(SAMPLES), tmp_path / "a.parquet", row_group_size=20)
    streamed = stream(tmp_path / "a.parquet", size=4)
    streamed.encoded.datasets[0].parquet.kept.most = 0
    batches = streamed.batches(orders(200, 10, 50), CPU)
    next(batches)
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(DataLost, match=r"a\.parquet: .*Was the data moved, deleted or unmounted"):
        list(batches)


# Threads


@pytest.mark.parametrize("ahead", [1, 3])
def test_no_more_is_decoded_ahead_than_allowed(
    ahead: int, tmp_path: Path, stream: Callable[..., StreamedImages]
) -> None:
    taken = 0

    def count() -> Iterator[Tensor]:
        nonlocal taken
        for order in orders(40, 2, 5):
            taken += 1
            yield order

    with contextlib.closing(stream(flat(tmp_path / "a", 40), size=4).batches(count(), CPU, ahead)) as batches:
        for used in range(1, 60):
            next(batches)
            time.sleep(0.001)
            assert taken == used + ahead


def test_batches_are_decoded_before_they_are_asked_for(tmp_path: Path, stream: Callable[..., StreamedImages]) -> None:
    streamed, decoded = stream(flat(tmp_path / "a", 6), size=4), threading.Semaphore(0)
    decode = streamed.encoded.decode

    def slow(i: int, size: int) -> np.ndarray:
        found = decode(i, size)
        decoded.release()
        return found

    streamed.encoded.decode = slow  # type: ignore[method-assign]
    with contextlib.closing(streamed.batches(torch.arange(6).split(1), CPU, ahead=2)) as batches:
        next(batches)
        assert all(decoded.acquire(timeout=60) for _ in range(3))  # that one and two ahead
        assert not decoded.acquire(timeout=0.05)


def test_an_error_of_ours_passes_through_and_ends_the_threads(
    tmp_path: Path, stream: Callable[..., StreamedImages]
) -> None:
    streamed = stream(flat(tmp_path / "a", 6), size=4)

    def broken(i: int, size: int) -> np.ndarray:  # noqa: ARG001
        raise ZeroDivisionError

    streamed.encoded.decode = broken  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        next(streamed.batches(torch.arange(6).split(1), CPU))
    assert not decoding()


ABANDONED = """
import itertools, sys, torch
from rich.console import Console
from patchsight_train.data import EncodedImages
from patchsight_train.stream import StreamedImages
streamed = StreamedImages(EncodedImages([sys.argv[1]]), 64, Console())
batches = streamed.batches(itertools.repeat(torch.arange(200)), torch.device("cpu"))
next(batches)
raise RuntimeError("abandoned")
"""


def test_a_process_that_closes_nothing_ends_all_the_same() -> None:
    done = subprocess.run([sys.executable, "-c", ABANDONED, str(SAMPLES)], capture_output=True, timeout=200)
    assert done.stderr.splitlines()[-1] == b"RuntimeError: abandoned"
    assert done.returncode == 1
