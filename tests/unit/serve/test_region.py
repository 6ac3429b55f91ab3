"""Regions of pictures: what is shown of one, which patches are of it, and matches by literal loops."""

from itertools import product

import numpy as np
import pytest
from PIL import Image

from patchsight_serve.decode import fit
from patchsight_serve.errors import InvalidRequest
from patchsight_serve.manifest import Transform
from patchsight_serve.region import TOKENS, Box, match, seen, tokens_in, view, where

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    "text",
    ["", "1,2,3", "0,0,1", "0,0,1,1,1", "a,0,1,1", "0,0,1,nan", "0,0,inf,1", "0.5,0,0.5,1", "0.6,0,0.5,1", "-0.1,0,1,1",
     "0,0,1,1.01", "10,10,50,50"],
)  # fmt: skip
def test_what_is_no_box(text: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        Box.parse(text)
    assert refused.value.param == "box"
    assert repr(text) in refused.value.message


def test_a_box_is_read_as_it_is_written() -> None:
    assert Box.parse("0, .25,0.5,1") == Box(0, 0.25, 0.5, 1)
    assert Box(0.5, 0, 1, 0.5).within(Box(0.2, 0.4, 0.6, 0.8)) == Box(0.4, 0.4, 0.6, 0.6000000000000001)


@pytest.mark.parametrize("size", [(64, 64), (300, 100), (90, 200)])
@pytest.mark.parametrize("box", [Box(0, 0, 0.2, 0.2), Box(0.4, 0.3, 0.9, 0.5), Box(0.9, 0.9, 1, 1), Box(0, 0, 1, 1)])
def test_the_region_is_where_the_view_says(size: tuple[int, int], box: Box) -> None:
    """It is red on white: what is inside the told box is red, what is outside is white."""
    width, height = size
    picture = np.full((height, width, 3), 255, np.uint8)
    edges = [round(box.x0 * width), round(box.y0 * height), round(box.x1 * width), round(box.y1 * height)]
    picture[edges[1] : edges[3], edges[0] : edges[2]] = (255, 0, 0)
    shown, inside = view(Image.fromarray(picture), box, Transform(resize=80, crop=60))
    assert shown.shape == (60, 60, 3)
    assert 0 <= inside.x0 < inside.x1 <= 1
    assert 0 <= inside.y0 < inside.y1 <= 1
    y, x = (np.mgrid[:60, :60] + 0.5) / 60
    margin = 0.05 + 1.5 / min(size)
    distance = np.max([inside.x0 - x, x - inside.x1, inside.y0 - y, y - inside.y1], axis=0)
    assert (shown[distance < -margin, 1] < 40).all()
    assert (shown[distance > margin, 1] > 215).all()


def test_the_view_has_the_surroundings_that_there_are() -> None:
    picture = Image.new("RGB", (400, 200))
    transform = Transform(resize=50, crop=50)
    assert view(picture, Box(0.5, 0.5, 0.6, 0.6), transform).box == Box(0.25, 0.375, 0.75, 0.625)
    assert view(picture, Box(0, 0, 0.1, 0.1), transform).box == Box(0, 0, 0.5, 0.25)
    assert view(picture, Box(0, 0, 1, 1), transform).box == Box(0, 0, 1, 1)  # the middle of it is all that fits


def test_less_than_a_pixel_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"0\.5 × 20 pixels of 50 × 20") as refused:
        view(Image.new("RGB", (50, 20)), Box(0.5, 0, 0.51, 1), Transform(resize=8, crop=8))
    assert refused.value.param == "box"


@pytest.mark.parametrize("size", [(120, 60), (60, 150), (60, 60)])
@pytest.mark.parametrize("transform", [Transform(resize=32, crop=32), Transform(resize=40, crop=20)])
def test_what_is_seen_is_what_fit_shows(size: tuple[int, int], transform: Transform) -> None:
    part = seen(size, transform)
    width, height = size
    picture = np.zeros((height, width, 3), np.uint8)
    rows, columns = (
        slice(round(start * sides), round(end * sides))
        for start, end, sides in ((part.y0, part.y1, height), (part.x0, part.x1, width))
    )
    picture[rows, columns] = 255
    assert fit(Image.fromarray(picture), transform)[2:-2, 2:-2].min() > 200
    side = min(size) * transform.crop / transform.resize
    assert ((part.x1 - part.x0) * width, (part.y1 - part.y0) * height) == pytest.approx((side, side))


def test_tokens_are_those_whose_centers_are_inside() -> None:
    tokens = RNG.standard_normal((6, 8, 5)).astype(np.float32)
    box = Box(0.3, 0.1, 0.8, 0.6)
    expected = [
        tokens[i, j] / np.linalg.norm(tokens[i, j])
        for i, j in product(range(6), range(8))
        if 0.3 <= (j + 0.5) / 8 <= 0.8 and 0.1 <= (i + 0.5) / 6 <= 0.6
    ]
    assert len(expected) == 12
    assert tokens_in(tokens, box) == pytest.approx(np.stack(expected), abs=1e-6)


def test_of_a_thin_box_the_nearest_and_of_a_large_one_an_even_part() -> None:
    tokens = RNG.standard_normal((4, 4, 3)).astype(np.float32)
    (only,) = tokens_in(tokens, Box(0.51, 0.999, 0.52, 1))
    assert only == pytest.approx(tokens[3, 2] / np.linalg.norm(tokens[3, 2]), abs=1e-6)
    many = np.stack(np.broadcast_arrays(*np.mgrid[1.0:31, 1.0:31], np.ones((30, 30))), axis=2).astype(np.float32)
    some = tokens_in(many, Box(0, 0, 1, 1))
    assert len(some) == TOKENS
    rows = some[:, 0] / some[:, 2]
    assert (rows.min(), rows.max()) == pytest.approx((1, 30), abs=1e-3)


def test_a_match_is_the_mean_of_best_cosines() -> None:
    for _ in range(5):
        region = tokens_in(RNG.standard_normal((3, 3, 6)).astype(np.float32), Box(0, 0, 1, 1))
        tokens = RNG.standard_normal((4, 5, 6)).astype(np.float32)
        best, likeness = [], np.full((4, 5), -1.0)
        for token in region.astype(np.float64):
            cosines = {(i, j): token @ tokens[i, j] / np.linalg.norm(tokens[i, j]) for i in range(4) for j in range(5)}
            best.append(max(cosines.values()))
            likeness = np.maximum(likeness, [[cosines[i, j] for j in range(5)] for i in range(4)])
        score, found = match(region, tokens)
        assert score == pytest.approx(np.mean(best), abs=1e-6)
        assert found == pytest.approx(likeness, abs=1e-6)
        own, _ = match(region, np.concatenate([tokens, 3 * region[None, :5]]))
        assert own >= score


def test_where_is_the_best_of_all_rectangles() -> None:
    for h, w in ((1, 1), (3, 5), (6, 4), (7, 7)):
        likeness = RNG.standard_normal((h, w)).astype(np.float32)
        box = where(likeness)
        above = likeness.astype(np.float64) - (likeness.mean(dtype=np.float64) + likeness.max()) / 2
        sums = {
            (x0, y0, x1, y1): above[y0:y1, x0:x1].sum()
            for x0, y0 in product(range(w), range(h))
            for x1, y1 in product(range(x0 + 1, w + 1), range(y0 + 1, h + 1))
        }
        told = (round(box.x0 * w), round(box.y0 * h), round(box.x1 * w), round(box.y1 * h))
        assert sums[told] == pytest.approx(max(sums.values()), abs=1e-5)


def test_where_finds_what_stands_out() -> None:
    likeness = np.full((8, 8), 0.2, np.float32)
    likeness[2:5, 3:7] = 0.9
    assert where(likeness) == Box(3 / 8, 2 / 8, 7 / 8, 5 / 8)
