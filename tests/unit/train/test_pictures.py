from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor
from torch import Generator, Tensor

from patchsight_train.pictures import (
    PAPER,
    RIGHT,
    TILE,
    WIDTH,
    WRONG,
    Cell,
    attention_sheet,
    neighbor_sheet,
    overlay,
    reconstruction_sheet,
    sheet,
    view_sheet,
    write_png,
)


@pytest.fixture
def noise(generator: Generator) -> Tensor:
    """float32 `(24, 3, 8, 8)` in 0..1, all different."""
    return torch.rand(24, 3, 8, 8, generator=generator)


def enlarged(x: Tensor, times: int) -> np.ndarray:
    """`(3, S, S)` in 0..1 to uint8 `(times · S, times · S, 3)`: each pixel a square."""
    pixels = (x.numpy().transpose(1, 2, 0).astype(np.float64) * 255).round().astype(np.uint8)
    return np.kron(pixels, np.ones((times, times, 1), np.uint8))


def place(image: Image.Image, tile: np.ndarray) -> tuple[int, int]:
    """Left and top of the one place where `tile` is in the sheet, to the last pixel."""
    canvas, (h, w, _) = np.asarray(image), tile.shape
    found = [
        (x, y)
        for y, x in np.argwhere((canvas == tile[0, 0]).all(axis=2)).tolist()
        if canvas[y : y + h, x : x + w].shape == tile.shape and (canvas[y : y + h, x : x + w] == tile).all()
    ]
    assert len(found) == 1
    return found[0]


def rgb(color: str) -> tuple[int, ...]:
    return ImageColor.getrgb(color)


def test_views_are_shown_pixel_by_pixel(noise: Tensor) -> None:
    pictures, views = noise[:3], [noise[3:6], noise[6:9]]
    image = view_sheet(pictures, views)
    places = [[place(image, enlarged(column[i], 16)) for column in (pictures, *views)] for i in range(3)]
    for row in places:
        assert row == sorted(row)  # the picture, then the views from left to right
        assert len({y for _, y in row}) == 1


def test_local_views_are_as_small_as_they_are(noise: Tensor) -> None:
    pictures, large, small = noise[:2], noise[2:4], [noise[i : i + 2, :, :4, :4] for i in range(4, 14, 2)]
    image = view_sheet(pictures, [small[0], large, *small[1:]])  # in any order
    for i in range(2):
        left, top = place(image, enlarged(large[i], 16))
        locals_ = [place(image, enlarged(view[i], 16)) for view in small]
        assert all(x > left for x, _ in locals_)
        assert len({y for _, y in locals_}) == 2  # two rows beside one global view
        assert min(y for _, y in locals_) == top
        assert locals_ == sorted(locals_, key=lambda at: (at[1], at[0]))


@pytest.mark.parametrize("size", [8, 32, 48, 64, 96, 224])
def test_pictures_of_any_size_are_shown_at_about_one_size(size: int, generator: Generator) -> None:
    pictures = torch.rand(2, 3, size, size, generator=generator)
    image = view_sheet(pictures, [pictures.flip(3)])
    assert 2 * TILE * 0.7 < image.width < WIDTH * 1.1
    canvas = np.asarray(image)
    assert (canvas[:, 0] == rgb(PAPER)).all()  # a margin all around
    assert (canvas[-1] == rgb(PAPER)).all()


def test_picture_and_views_of_different_sizes_are_shown_alike() -> None:
    """Pictures may be kept larger than the views that are cut from them."""
    flat = torch.full((1, 3, 16, 16), 0.5)
    image = view_sheet(flat, [torch.full((1, 3, 8, 8), 0.9)])
    canvas = np.asarray(image)
    picture, view = ((canvas == value).all(axis=2).any(axis=0).sum() for value in (128, 230))
    assert picture == view == 128


def test_short_rows_share_the_width(noise: Tensor) -> None:
    image = view_sheet(noise[:6], [noise[6:12]])
    assert image.width <= WIDTH
    places = [place(image, enlarged(x, 16)) for x in noise[:6]]
    assert [len({x for x, _ in places}), len({y for _, y in places})] == [3, 2]  # three tables of two rows
    assert places == sorted(places)  # read table by table


def test_reconstructions_stand_beside_what_was_visible(noise: Tensor) -> None:
    original, visible, rebuilt = noise[:2], noise[2:4], noise[4:6]
    image = reconstruction_sheet(original, visible, rebuilt)
    for i in range(2):
        row = [place(image, enlarged(x[i], 16)) for x in (original, visible, rebuilt)]
        assert row == sorted(row)
    without = reconstruction_sheet(original, None, rebuilt)
    assert place(without, enlarged(original[1], 16)) < place(without, enlarged(rebuilt[1], 16))


def test_frames_tell_whether_the_class_is_the_same(noise: Tensor) -> None:
    queries, neighbors = noise[:2], noise[2:8].view(2, 3, 3, 8, 8)
    names = [["a", "b", ""], ["a", "a", "a"]]
    image = neighbor_sheet(queries, neighbors, torch.rand(2, 3), ["a", ""], names)

    def frame(x: Tensor) -> tuple[int, ...]:
        left, top = place(image, enlarged(x, 16))
        return image.getpixel((left - 2, top + 20))

    assert [frame(x) for x in neighbors[0]] == [rgb(RIGHT), rgb(WRONG), rgb(PAPER)]
    assert {frame(x) for x in (*queries, *neighbors[1])} == {rgb(PAPER)}


def test_text_stays_in_its_column() -> None:
    plain = Image.new("RGB", (100, 100), "white")
    image = sheet(["a header that is far too long for its column", "b"], [[Cell(plain, ("x" * 90,)), Cell(plain)]])
    canvas = np.asarray(image)
    white = (canvas == 255).all(axis=2)
    top = int(white.any(axis=1).argmax())
    left = [int(x) for x in np.flatnonzero(np.diff(white[top].astype(int)) == 1) + 1]
    below, above = canvas[top + 100 :, left[0] : left[1]], canvas[: top - 1, left[0] : left[1]]
    assert (below != rgb(PAPER)).any()
    assert (above != rgb(PAPER)).any()
    assert (canvas[top + 100 :, left[1] - 4 :] == rgb(PAPER)).all()
    assert (canvas[: top - 1, left[1] - 4 : left[1]] == rgb(PAPER)).all()


def test_attention_glows_where_it_is_high() -> None:
    picture = Image.new("RGB", (64, 64), (120, 120, 120))
    attention = torch.zeros(8, 8)
    attention[2, 5] = 0.3
    shown = np.asarray(overlay(picture, attention)).astype(int)
    bright = shown.sum(axis=2)
    assert np.unravel_index(bright.argmax(), bright.shape) in {(y, x) for y in range(18, 22) for x in range(42, 46)}
    assert (shown[40:, :20] == round(25 + 0.55 * 120)).all()  # elsewhere the picture, gray
    assert np.ptp(np.asarray(overlay(picture, torch.full((8, 8), 0.01)))) == 0
    assert np.array_equal(np.asarray(overlay(picture, 100 * attention)), shown)


@pytest.mark.parametrize(("heads", "times", "lines"), [(1, 16, 1), (3, 16, 1), (6, 14, 1), (12, 14, 2)])
def test_each_head_is_shown_and_of_several_the_mean(heads: int, times: int, lines: int, generator: Generator) -> None:
    pictures = torch.rand(2, 3, 8, 8, generator=generator)
    attention = torch.rand(2, heads, 4, 4, generator=generator)
    image = attention_sheet(pictures, attention)
    assert image.width <= WIDTH * 1.1
    for i in range(2):
        shown = Image.fromarray(enlarged(pictures[i], times))
        expected = [attention[i].mean(dim=0)] * (heads > 1) + list(attention[i])
        row = [place(image, np.asarray(x)) for x in (shown, *(overlay(shown, one) for one in expected))]
        assert row == sorted(row, key=lambda at: (at[1], at[0]))
        assert len({y for _, y in row}) == lines


def test_numbers_that_are_not_finite_are_no_obstacle() -> None:
    broken = torch.full((2, 3, 8, 8), torch.nan)
    broken[0, 0, 0, 0] = torch.inf
    view_sheet(broken, [broken])
    attention_sheet(broken, torch.full((2, 2, 4, 4), torch.nan))
    neighbor_sheet(broken, broken[:, None], torch.full((2, 1), torch.nan), ["", ""], [[""], [""]])


def test_a_png_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "pictures" / "views.png"
    write_png(Image.new("RGB", (3, 2), "red"), path)
    write_png(Image.new("RGB", (5, 4), "blue"), path)
    assert [x.name for x in path.parent.iterdir()] == ["views.png"]
    with pytest.raises(OSError, match="CMYK"):
        write_png(Image.new("CMYK", (9, 9)), path)  # no PNG can hold it: the old one stays
    with Image.open(path) as image:
        assert image.size == (5, 4)
        assert image.format == "PNG"
