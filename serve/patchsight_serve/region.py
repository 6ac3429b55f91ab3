"""A region of a picture, and how like it the regions of another one are, by their patch tokens.

The score is late interaction (arXiv:2004.12832): each token of the region takes its best match among all tokens of the
other picture, and the mean of these cosines counts. It asks for no size and no shape of the region there. Knows
pictures and tokens, no galleries.
"""

from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
from PIL import Image

from patchsight_serve.decode import fit
from patchsight_serve.encoder import Pixels, Values
from patchsight_serve.errors import InvalidRequest
from patchsight_serve.manifest import Transform
from patchsight_serve.nearest import F32
from patchsight_serve.outputs import to_unit_length

CONTEXT = 2.0  # sides of the region that the square around it has: alone, it would fill what the encoder sees
TOKENS = 64  # of a region, at most; of more, as many are taken, evenly


@dataclass(frozen=True)
class Box:
    """Left, top, right and bottom in fractions of an upright picture's width and height, 0 to 1."""

    x0: float
    y0: float
    x1: float
    y1: float

    @classmethod
    def parse(cls, text: str) -> Self:
        """`x0,y0,x1,y1`. Raises InvalidRequest."""
        try:
            x0, y0, x1, y1 = map(float, text.split(","))
        except ValueError:
            raise InvalidRequest(f"box is {text[:60]!r}; it must be four numbers, x0,y0,x1,y1", "box") from None
        if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):  # nor is NaN
            message = f"box is {text[:60]!r}; it must be fractions of the picture, with 0 <= x0 < x1 <= 1, and y alike"
            raise InvalidRequest(message, "box")
        return cls(x0, y0, x1, y1)

    def within(self, outer: Self) -> "Box":
        """This box, which is in fractions of `outer`, in fractions of the picture that `outer` is of."""
        width, height = outer.x1 - outer.x0, outer.y1 - outer.y0
        return Box(
            outer.x0 + self.x0 * width, outer.y0 + self.y0 * height,
            outer.x0 + self.x1 * width, outer.y0 + self.y1 * height,
        )  # fmt: skip


class View(NamedTuple):
    """What the encoder is shown of a region: uint8 `(S, S, 3)`, and where the region lies in it, cut to it."""

    pixels: Pixels
    box: Box


def view(picture: Image.Image, box: Box, transform: Transform, context: float = CONTEXT) -> View:
    """The square of the picture around a region, `context` times its longer side, as far as the picture has that.

    Raises InvalidRequest for a region of less than a pixel.
    """
    width, height = picture.size
    x0, y0, x1, y1 = box.x0 * width, box.y0 * height, box.x1 * width, box.y1 * height
    if x1 - x0 < 1 or y1 - y0 < 1:
        message = f"the box is {x1 - x0:.2g} × {y1 - y0:.2g} pixels of {width} × {height}; the least is one each"
        raise InvalidRequest(message, "box")
    side = min(round(context * max(x1 - x0, y1 - y0)), width, height)
    left = min(max(round((x0 + x1 - side) / 2), 0), width - side)
    top = min(max(round((y0 + y1 - side) / 2), 0), height - side)
    square = picture.crop((left, top, left + side, top + side))
    shown = fit(square, transform.model_copy(update={"resize": transform.crop}))
    inside = ((x0 - left) / side, (y0 - top) / side, (x1 - left) / side, (y1 - top) / side)
    return View(shown, Box(*(min(max(edge, 0.0), 1.0) for edge in inside)))


def seen(size: tuple[int, int], transform: Transform) -> Box:
    """The part of a picture of that width and height that `fit` shows the encoder."""
    width, height = size
    side = min(width, height) * transform.crop / transform.resize
    x, y = (1 - side / width) / 2, (1 - side / height) / 2
    return Box(x, y, 1 - x, 1 - y)


def tokens_in(tokens: Values, box: Box) -> F32:
    """Unit tokens `(M, D)`, at most `TOKENS`, of the patches `(h, w, D)` whose centers lie in the box; where it is
    narrower than a patch, of those nearest to its middle."""
    rows = _centers_in(box.y0, box.y1, tokens.shape[0])
    columns = _centers_in(box.x0, box.x1, tokens.shape[1])
    inside = tokens[np.ix_(rows, columns)].reshape(-1, tokens.shape[2])
    if len(inside) > TOKENS:
        inside = inside[np.linspace(0, len(inside) - 1, TOKENS).round().astype(np.int64)]
    return to_unit_length(inside)


def _centers_in(start: float, end: float, count: int) -> list[int]:
    found = [i for i in range(count) if start <= (i + 0.5) / count <= end]
    return found or [min(int((start + end) / 2 * count), count - 1)]


def match(region: F32, tokens: Values) -> tuple[float, F32]:
    """How like a picture's best matches are to a region, -1 to 1, and how like each of its patches is, `(h, w)`: its
    cosine to the token of the region that it is most alike.

    region: unit tokens `(M, D)`. tokens: `(h, w, D)`, of any length.
    """
    h, w, D = tokens.shape
    cosines = to_unit_length(tokens).reshape(h * w, D) @ region.T  # (h * w, M)
    score = float(np.clip(cosines.max(axis=0).mean(dtype=np.float64), -1.0, 1.0))
    return score, cosines.max(axis=1).reshape(h, w)


def where(likeness: F32) -> Box:
    """The rectangle of patches that holds the most likeness `(h, w)` above the level, which lies between the mean and
    the best one; in fractions of the square."""
    level = (float(likeness.mean()) + float(likeness.max())) / 2
    above = likeness.astype(np.float64) - level
    h, w = above.shape
    sums = np.zeros((h + 1, w))
    np.cumsum(above, axis=0, out=sums[1:])
    best, box = -np.inf, (0, 0, w, h)
    for top in range(h):
        strips = sums[top + 1 :] - sums[top]  # (h - top, w): rows from `top` on
        reach = np.concatenate([np.zeros((len(strips), 1)), strips.cumsum(axis=1)], axis=1)
        least = np.minimum.accumulate(reach, axis=1)
        gain = reach[:, 1:] - least[:, :-1]
        row, end = np.unravel_index(int(gain.argmax()), gain.shape)
        if gain[row, end] > best:
            start = int(reach[row, : end + 1].argmin())
            best, box = float(gain[row, end]), (start, top, int(end) + 1, top + int(row) + 1)
    x0, y0, x1, y1 = box
    return Box(x0 / w, y0 / h, x1 / w, y1 / h)
