import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from rich.console import Console

from patchsight_serve.decode import decode
from patchsight_serve.errors import InvalidRequest
from patchsight_train import data as data_module
from patchsight_train.data import Images, eval_transform, load_images


class Screen(Console):
    """A narrow console that remembers what was printed."""

    def __init__(self) -> None:
        super().__init__(file=io.StringIO(), width=40)

    @property
    def text(self) -> str:
        assert isinstance(self.file, io.StringIO)
        return self.file.getvalue()


@pytest.fixture
def screen() -> Screen:
    return Screen()


@pytest.fixture
def load(screen: Screen) -> Callable[..., Images]:
    """`load(source, …, size=16, limit=None)`."""

    def load(*sources: Path | str, size: int = 16, limit: int | None = None) -> Images:
        return load_images([str(s) for s in sources], size, limit, screen)

    return load


def as_parquet(folder: Path, target: Path) -> Path:
    """The same images, in the order of their paths, in the Hugging Face image convention."""
    files = sorted(folder.rglob("*.png"))
    names = sorted({p.parent.name for p in files})
    image = [{"bytes": p.read_bytes(), "path": p.relative_to(folder).as_posix()} for p in files]
    table = pa.table({"image": image, "label": [names.index(p.parent.name) for p in files]})
    pq.write_table(table, target)
    return target


@pytest.mark.parametrize("size", [8, 16, 32])
def test_pixels_are_those_of_the_servers_decoder(picture_folder: Path, load: Callable[..., Images], size: int) -> None:
    images = load(picture_folder, size=size)
    assert images.pixels.dtype == torch.uint8
    assert images.pixels.shape == (12, 3, size, size)
    for pixels, path in zip(images.pixels, sorted(picture_folder.rglob("*.png")), strict=True):
        expected = decode(path.read_bytes(), eval_transform(size))
        assert np.array_equal(pixels.permute(1, 2, 0).numpy(), expected)


def test_real_photos_are_those_of_the_servers_decoder(photos: Images) -> None:
    from patchsight_serve.dataset import read_dataset
    from patchsight_serve.sample_gallery import SAMPLES

    dataset = read_dataset(SAMPLES)
    assert len(photos) == len(dataset) == 200
    for i in range(0, 200, 13):
        assert np.array_equal(photos.pixels[i].permute(1, 2, 0).numpy(), decode(dataset.read(i), eval_transform(32)))


def test_class_subfolders_give_labels(picture_folder: Path, load: Callable[..., Images]) -> None:
    images = load(picture_folder)
    assert images.labels is not None
    assert images.labels.tolist() == [0] * 6 + [1] * 6
    assert images.class_names == ["cats", "dogs"]


def test_an_image_outside_of_the_subfolders_means_no_labels(picture_folder: Path, load: Callable[..., Images]) -> None:
    Image.new("RGB", (16, 16)).save(picture_folder / "stray.png")
    images = load(picture_folder)
    assert len(images) == 13
    assert images.labels is None


def test_parquet_and_folder_give_the_same(picture_folder: Path, tmp_path: Path, load: Callable[..., Images]) -> None:
    folder, parquet = load(picture_folder), load(as_parquet(picture_folder, tmp_path / "same.parquet"))
    assert torch.equal(folder.pixels, parquet.pixels)
    assert folder.labels is not None
    assert parquet.labels is not None
    assert torch.equal(folder.labels, parquet.labels)


def test_several_sources_follow_each_other(picture_folder: Path, load: Callable[..., Images]) -> None:
    one, two = load(picture_folder / "dogs"), load(picture_folder / "cats")
    both = load(picture_folder / "dogs", picture_folder / "cats")
    assert torch.equal(both.pixels, torch.cat([one.pixels, two.pixels]))
    assert both.labels is None
    twice = load(picture_folder, picture_folder)
    assert twice.labels is not None
    assert twice.labels.tolist() == ([0] * 6 + [1] * 6) * 2


def test_sources_of_different_classes_have_no_labels(
    picture_folder: Path, tmp_path: Path, load: Callable[..., Images]
) -> None:
    other = tmp_path / "other"
    (other / "birds").mkdir(parents=True)
    Image.new("RGB", (16, 16)).save(other / "birds" / "1.png")
    assert load(picture_folder, other).labels is None


def test_limit_takes_the_first(picture_folder: Path, load: Callable[..., Images]) -> None:
    assert torch.equal(load(picture_folder, limit=5).pixels, load(picture_folder).pixels[:5])


NAMES = ["broken.jpg", "[bold]a[/b].jpg", "a name that is a good deal longer than the console is wide.jpg"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("content", [b"no image", b"", b"\xff\xd8\xff\xe0 half a JPEG"])
def test_an_unreadable_image_is_reported_once_and_skipped(
    name: str, content: bytes, picture_folder: Path, load: Callable[..., Images], screen: Screen
) -> None:
    path = picture_folder / "cats" / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    images = load(picture_folder)
    assert len(images) == 12
    assert images.labels is not None
    assert images.labels.tolist() == [0] * 6 + [1] * 6  # the others keep theirs
    assert screen.text.count("skipped") == 1
    reported = next(line for line in screen.text.splitlines() if "skipped" in line)
    assert f"skipped cats/{name}: " in reported


def test_an_unreadable_row_is_named(
    picture_folder: Path, tmp_path: Path, load: Callable[..., Images], screen: Screen
) -> None:
    good = next(picture_folder.rglob("*.png")).read_bytes()
    image = pa.array([{"bytes": good}, {"bytes": None}, {"bytes": b"?"}, {"bytes": good}])
    pq.write_table(pa.table({"image": image}), tmp_path / "a.parquet")
    assert len(load(tmp_path / "a.parquet")) == 2
    assert "skipped row 1: " in screen.text
    assert "skipped row 2: " in screen.text


def test_nothing_to_train_on_is_an_error(tmp_path: Path, load: Callable[..., Images]) -> None:
    with pytest.raises(InvalidRequest, match="no such folder"):
        load(tmp_path / "missing")
    with pytest.raises(InvalidRequest, match="no image in this folder"):
        load(tmp_path)
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"no image")
    with pytest.raises(InvalidRequest, match="none of the 3 images could be read"):
        load(tmp_path)


def test_more_than_the_memory_holds_is_refused(
    picture_folder: Path, load: Callable[..., Images], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_module, "available_memory", lambda: 2.0**30)
    with pytest.raises(
        InvalidRequest, match=r"12 images of 5000 px need 0.8 GiB decoded, 1.0 GiB are free; use a smaller"
    ):
        load(picture_folder, size=5_000)
    assert len(load(picture_folder)) == 12


def test_available_memory_is_a_size() -> None:
    assert data_module.available_memory() > 2**20
