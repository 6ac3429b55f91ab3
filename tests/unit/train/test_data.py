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
from patchsight_train.data import (
    LOST_AFTER,
    DataLost,
    EncodedImages,
    Images,
    decode_all,
    eval_transform,
    load_images,
    look_ahead,
    sample_images,
)


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
    figures = "12 images of 5000 px need 0.8 GiB decoded, 1.0 GiB are free"
    with pytest.raises(InvalidRequest, match=f"{figures}; use a smaller --image-size or --limit, or let them be str"):
        load(picture_folder, size=5_000)
    assert len(load(picture_folder)) == 12


def test_available_memory_is_a_size() -> None:
    assert data_module.available_memory() > 2**20


@pytest.mark.parametrize(
    ("most", "used", "expected"), [("max", 5_000, float("inf")), ("9000", 5_000, 4_100), (None, 0, float("inf"))]
)
def test_a_container_has_less_than_its_machine(most: str | None, used: int, expected: float, tmp_path: Path) -> None:
    if most is not None:
        (tmp_path / "memory.max").write_text(f"{most}\n")
        (tmp_path / "memory.current").write_text(f"{used}\n")
        (tmp_path / "memory.stat").write_text("anon 4900\ninactive_file 100\n")
    assert data_module._memory_of_the_container(tmp_path) == expected


def test_some_images_may_have_no_label(picture_folder: Path, tmp_path: Path, load: Callable[..., Images]) -> None:
    table = pq.read_table(as_parquet(picture_folder, tmp_path / "a.parquet"))
    some = pa.array([0, None, 1, -1, *[1] * 8], pa.int64())
    pq.write_table(table.set_column(1, "label", some), tmp_path / "a.parquet")
    images = load(tmp_path / "a.parquet")
    assert images.labels is not None
    assert images.labels.tolist() == [0, -1, 1, -1, *[1] * 8]
    assert load(tmp_path / "a.parquet", limit=2).labels is not None
    nothing = pa.array([None] * 12, pa.int64())
    pq.write_table(table.set_column(1, "label", nothing), tmp_path / "a.parquet")
    assert load(tmp_path / "a.parquet").labels is None


def test_an_unlabelled_source_beside_a_labelled_one(picture_folder: Path, load: Callable[..., Images]) -> None:
    images = load(picture_folder / "dogs", picture_folder)
    assert images.labels is not None
    assert images.labels.tolist() == [-1] * 6 + [0] * 6 + [1] * 6
    assert images.class_names == ["cats", "dogs"]
    assert load(picture_folder / "dogs", picture_folder, limit=6).labels is None  # none of these has one


def test_files_that_vanish_while_they_are_decoded(tmp_path: Path, screen: Screen) -> None:
    for i in range(30):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i:02}.png")
    encoded = EncodedImages([str(tmp_path)])
    for i in range(5, 5 + LOST_AFTER - 1):
        (tmp_path / f"{i:02}.png").unlink()
    assert len(decode_all(encoded, range(30), 8, screen)) == 30 - LOST_AFTER + 1
    (tmp_path / f"{5 + LOST_AFTER:02}.png").unlink()
    (tmp_path / f"{5 + LOST_AFTER - 1:02}.png").write_bytes(b"damaged, but there")
    assert len(decode_all(encoded, range(30), 8, screen)) == 30 - LOST_AFTER - 1
    (tmp_path / f"{5 + LOST_AFTER - 1:02}.png").unlink()
    with pytest.raises(DataLost, match=f"{LOST_AFTER} images in a row cannot be read, the last is ") as error:
        decode_all(encoded, range(30), 8, screen)
    assert str(tmp_path) in error.value.message


def test_scattered_files_that_vanish_are_no_loss_of_the_set(tmp_path: Path, screen: Screen) -> None:
    for i in range(4 * LOST_AFTER):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i:02}.png")
    encoded = EncodedImages([str(tmp_path)])
    for i in range(0, 4 * LOST_AFTER, 2):
        (tmp_path / f"{i:02}.png").unlink()
    assert len(decode_all(encoded, range(4 * LOST_AFTER), 8, screen)) == 2 * LOST_AFTER


def test_a_sample_is_random_but_always_the_same(
    picture_folder: Path, load: Callable[..., Images], screen: Screen
) -> None:
    everything = load(picture_folder)
    assert everything.labels is not None
    sample = sample_images([str(picture_folder)], 16, 5, screen)
    again = sample_images([str(picture_folder)], 16, 5, screen)
    rows = [next(i for i in range(12) if torch.equal(everything.pixels[i], p)) for p in sample.pixels]
    assert rows == sorted(set(rows))
    assert rows != [0, 1, 2, 3, 4]
    assert torch.equal(sample.pixels, again.pixels)
    assert sample.labels is not None
    assert sample.labels.tolist() == everything.labels[rows].tolist()
    assert len(sample_images([str(picture_folder)], 16, 50, screen)) == 12
    assert torch.equal(sample_images([str(picture_folder)], 16, 50, screen, limit=3).pixels, everything.pixels[:3])


def test_batches_are_the_images_asked_for(random_pixels: torch.Tensor) -> None:
    images, cpu = Images(random_pixels, None), torch.device("cpu")
    assert images.on_device(cpu) is images
    orders = [torch.tensor([3, 3, 19]), torch.tensor([0])]
    found = list(images.batches(orders, cpu))
    assert [len(batch) for batch in found] == [3, 1]
    assert all(torch.equal(batch, random_pixels[order]) for batch, order in zip(found, orders, strict=True))


def test_looking_ahead_starts_what_it_yields_later() -> None:
    started: list[int] = []
    found = look_ahead(range(5), lambda i: started.append(i) or 10 * i, depth=2)
    assert not started
    assert (next(found), started) == (0, [0, 1, 2])
    assert (next(found), started) == (10, [0, 1, 2, 3])
    assert list(found) == [20, 30, 40]
    assert list(look_ahead([1], float, depth=3)) == [1.0]


def test_cores_are_shared_by_the_ranks_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert data_module.cores() == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert data_module.cores() == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "20")
    assert data_module.cores() == 1
