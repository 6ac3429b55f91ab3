"""What the data is like, by a few headers."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from patchsight_serve.dataset import read_dataset
from patchsight_serve.errors import InvalidRequest
from patchsight_serve.sample_gallery import SAMPLES
from patchsight_train.survey import SAMPLE, Survey, survey


def encoded(width: int, height: int) -> bytes:
    content = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(content, "PNG")
    return content.getvalue()


def write(folder: Path, sizes: list[tuple[int, int]], first: int = 0) -> Path:
    folder.mkdir(exist_ok=True)
    for i, size in enumerate(sizes):
        (folder / f"{first + i:05}.png").write_bytes(encoded(*size))
    return folder


class Counted:
    """A data set of any length, of one image, that notes which rows are asked for."""

    def __init__(self, length: int) -> None:
        self.length, self.content, self.rows = length, encoded(20, 10), []

    def __len__(self) -> int:
        return self.length

    def read(self, i: int) -> bytes:
        self.rows.append(i)
        return self.content


def test_medians_and_the_low_tenth(tmp_path: Path) -> None:
    sizes = [(10 * (i + 1), 100 + i) for i in range(21)]  # 10 × 100, 20 × 101, …, 210 × 120
    found = survey([read_dataset(write(tmp_path / "p", sizes))])
    short = sorted(min(size) for size in sizes)
    assert found == Survey(
        count=21, width=110, height=110, short_side=short[10], low_side=short[2],
        elongation=float(np.median([max(s) / min(s) for s in sizes])),
    )  # fmt: skip


def test_evenly_spread_over_all_sources() -> None:
    first, second = Counted(7_000_000), Counted(3_000_000)
    found = survey([first, second])  # type: ignore[list-item]
    assert found.count == 10_000_000
    rows = first.rows + [7_000_000 + i for i in second.rows]
    assert len(rows) == SAMPLE
    assert (rows[0], rows[-1]) == (0, 9_999_999)
    steps = np.diff(rows)
    assert steps.max() - steps.min() <= 1
    again = Counted(7_000_000)
    survey([again, Counted(3_000_000)])  # type: ignore[list-item]
    assert again.rows == first.rows


def test_the_limit_holds() -> None:
    first, second = Counted(10), Counted(10)
    assert survey([first, second], limit=4).count == 4  # type: ignore[list-item]
    assert (first.rows, second.rows) == ([0, 1, 2, 3], [])


def test_only_the_header_is_needed(tmp_path: Path) -> None:
    folder = write(tmp_path / "p", [(40, 30)])
    file = next(folder.iterdir())
    file.write_bytes(file.read_bytes()[:60])
    assert survey([read_dataset(folder)]).short_side == 30


def test_what_cannot_be_read_is_skipped(tmp_path: Path) -> None:
    folder = write(tmp_path / "p", [(40, 30)] * 3)
    (folder / "a.png").write_bytes(b"no picture")
    (folder / "b.png").write_bytes(b"")
    Image.new("1", (9000, 9000)).save(folder / "c.png")  # more pixels than the decoder takes
    dataset = read_dataset(folder)
    (folder / "00001.png").unlink()
    found = survey([dataset])
    assert (found.count, found.width, found.height) == (6, 40, 30)


def test_nothing_but_broken_files(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(InvalidRequest, match="none of 1 images"):
        survey([read_dataset(tmp_path)])


def test_the_sample_photos() -> None:
    found = survey([read_dataset(SAMPLES)])
    assert found.count == 200
    assert found.short_side == found.low_side == 160
    assert 1 <= found.elongation < 2
