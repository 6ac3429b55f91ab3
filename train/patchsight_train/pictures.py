"""Sheets of pictures to look at while training: views, reconstructions, attention, nearest neighbors.

Tensors in, one dark contact sheet out. Small pictures are enlarged pixel by pixel: what is shown is what the network
sees. Pictures are float32 `(N, 3, S, S)` in 0..1 on the CPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

PAPER, INK, SOFT, RIGHT, WRONG = "#17151a", "#f1ede8", "#a39c94", "#5fbf77", "#f2694f"
WIDTH = 1080  # of a sheet, pixels, about; a report shows it at half of that, so text is large
TILE = 128  # side of a picture, about
MOST_HEADS = 8  # side by side
TITLE = 168  # width of a column of titles
MARGIN, GAP, CLOSE, FRAME = 28, 16, 6, 4
TEXT, LINE = 20, 26  # font size, and a line's height

Color = str


@dataclass(frozen=True)
class Cell:
    """A picture, what is written below it (the first line bright, the others soft), and a frame about it."""

    picture: Image.Image
    caption: tuple[str, ...] = ()
    frame: Color | None = None


def view_sheet(pictures: Tensor, views: Sequence[Tensor]) -> Image.Image:
    """A row for each picture: itself, then every view of it, the larger ones first.

    views: each `(N, 3, S', S')` in 0..1, all to the scale of the largest: local views look as small as they are.
    """
    sizes = sorted({view.shape[-1] for view in views}, reverse=True)
    side = max(sizes)
    scale = scale_for(side, len([v for v in views if v.shape[-1] == side]) + 1)
    headers = [f"picture\n{pictures.shape[-1]} px"]
    columns = [_images(pictures, scale * side / pictures.shape[-1])]
    for size in sizes:
        alike = [view for view in views if view.shape[-1] == size]
        count = len(alike)
        if len(sizes) == 1:
            name = f"{count} views" if count > 1 else "view"
        else:
            name = f"{count} {'global' if size == side else 'local'}"
        headers.append(f"{name}\n{size} px")
        columns.append(
            [mosaic(row, round(side / size)) for row in zip(*(_images(v, scale) for v in alike), strict=True)]
        )
    return sheet(headers, [[Cell(picture) for picture in row] for row in zip(*columns, strict=True)])


def reconstruction_sheet(pictures: Tensor, masked: Tensor | None, reconstructions: Tensor) -> Image.Image:
    """A row for each picture: the original, what the encoder saw of it (where anything was hidden), what came back."""
    columns = [("original", pictures), ("rebuilt", reconstructions)]
    if masked is not None:
        columns.insert(1, ("visible", masked))
    scale = scale_for(pictures.shape[-1], 2 * len(columns))
    images = [_images(column, scale) for _, column in columns]
    return sheet([name for name, _ in columns], [[Cell(x) for x in row] for row in zip(*images, strict=True)])


def attention_sheet(pictures: Tensor, attention: Tensor) -> Image.Image:
    """A row for each picture: itself, and over it the mean and each head of `attention`, `(N, heads, h, w)`."""
    heads = attention.shape[1]
    lines = -(-heads // MOST_HEADS)
    scale = scale_for(pictures.shape[-1], 2 + -(-heads // lines))
    rows = []
    for picture, maps in zip(_images(pictures, scale), attention, strict=True):
        row = [picture] if heads == 1 else [picture, overlay(picture, maps.mean(dim=0))]
        shown = [overlay(picture, one) for one in maps]
        rows.append([Cell(image) for image in (*row, *(shown if lines == 1 else [mosaic(shown, lines)]))])
    names = [f"head {i + 1}" for i in range(heads)] if lines == 1 else [f"{heads} heads"]
    return sheet(["picture", *["mean"] * (heads > 1), *names], rows)


def neighbor_sheet(
    queries: Tensor, neighbors: Tensor, similarity: Tensor, query_names: list[str], neighbor_names: list[list[str]]
) -> Image.Image:
    """A row for each query: itself and its most similar pictures, framed by whether their class is the query's.

    Args:
        neighbors: `(N, k, 3, S, S)`, the most similar first.
        similarity: `(N, k)`.
        query_names, neighbor_names: the classes; "" where one is not known, which leaves the frame out.
    """
    scale = scale_for(queries.shape[-1], neighbors.shape[1] + 1)
    rows = []
    for query, name, images, others, scores in zip(
        _images(queries, scale), query_names, neighbors, neighbor_names, similarity.tolist(), strict=True
    ):
        row = [Cell(query, (name,))]
        for image, other, score in zip(_images(images, scale), others, scores, strict=True):
            frame = (RIGHT if other == name else WRONG) if name and other else None
            row.append(Cell(image, (other, f"{score:.2f}") if other else (f"{score:.2f}",), frame))
        rows.append(row)
    return sheet(["query", "most similar pictures, by cosine"], rows)


def titled_sheet(
    headers: Sequence[str], titles: Sequence[Sequence[str]], pictures: Tensor, names: list[list[str]], common: list[str]
) -> Image.Image:
    """A row for each title: its lines, then pictures, framed where their class is the row's common one.

    Args:
        headers: of the titles, and of the pictures.
        pictures: `(N, k, 3, S, S)`.
        names: the pictures' classes; "" where one is not known. common: one for each row, or "".
    """
    scale = scale_for(pictures.shape[-1], pictures.shape[1] + 1)
    nothing = Image.new("RGB", (TITLE, 1), PAPER)
    rows = []
    for title, images, classes, usual in zip(titles, pictures, names, common, strict=True):
        cells = [
            Cell(image, (name,) if name else (), RIGHT if name and name == usual else None)
            for image, name in zip(_images(images, scale), classes, strict=True)
        ]
        rows.append([Cell(nothing, tuple(title)), *cells])
    return sheet(headers, rows)


def overlay(picture: Image.Image, attention: Tensor) -> Image.Image:
    """The picture in gray, with a glow where the map `(h, w)` is high; each map from its own least to its most."""
    low, high = attention.min(), attention.max()
    value = ((attention - low) / (high - low).clamp(min=1e-12)).float().nan_to_num().numpy()
    smooth = Image.fromarray(value).resize(picture.size, Image.Resampling.BICUBIC)
    heat = np.asarray(smooth).clip(0, 1)[..., None]
    colors = 255 * matplotlib.colormaps["inferno"](0.25 + 0.75 * heat[..., 0])[..., :3]
    gray = 25 + 0.55 * np.asarray(picture.convert("L"), dtype=np.float32)[..., None]
    opacity = 0.75 * heat**0.7
    return Image.fromarray((gray * (1 - opacity) + colors * opacity).round().astype(np.uint8))


def scale_for(side: int, columns: int) -> float:
    """How much to enlarge pictures of `side` pixels so that `columns` of them fill a sheet; whole, for small ones."""
    target = min(TILE, max((WIDTH - 2 * MARGIN) // columns - GAP, TILE // 2))
    return max(target // side, 1) if side <= TILE // 2 else target / side


def mosaic(pictures: Sequence[Image.Image], rows: int) -> Image.Image:
    """Pictures of one size in so many rows, at most, filled row by row."""
    rows = min(rows, len(pictures))
    columns = -(-len(pictures) // rows)
    w, h = pictures[0].size
    out = Image.new("RGB", (columns * (w + CLOSE) - CLOSE, rows * (h + CLOSE) - CLOSE), PAPER)
    for i, picture in enumerate(pictures):
        out.paste(picture, ((i % columns) * (w + CLOSE), (i // columns) * (h + CLOSE)))
    return out


def sheet(headers: Sequence[str], rows: Sequence[Sequence[Cell]]) -> Image.Image:
    """Cells in rows and columns, the columns' headers above; the last header may run on over columns without one.

    Where several such tables fit side by side, they share the rows.
    """
    widths = [max(cell.picture.width for cell in column) for column in zip(*rows, strict=True)]
    lefts = [sum(widths[:i]) + GAP * i for i in range(len(widths))]
    heights = [max(cell.picture.height + LINE * len(cell.caption) for cell in row) + GAP for row in rows]
    table = lefts[-1] + widths[-1] + 2 * MARGIN
    tables = max(min(WIDTH // table, len(rows)), 1)
    length = -(-len(rows) // tables)  # rows of one table
    top = MARGIN + LINE * max(header.count("\n") + 1 for header in headers) + CLOSE
    bottom = top + max(sum(heights[i : i + length]) for i in range(0, len(rows), length)) - GAP + MARGIN
    out = Image.new("RGB", (tables * (table - MARGIN) + MARGIN, bottom), PAPER)
    for first in range(0, len(rows), length):
        x, y = MARGIN + first // length * (table - MARGIN), top
        for i, header in enumerate(headers):
            room = (lefts[i + 1] if i + 1 < len(headers) else table - MARGIN) - lefts[i] - CLOSE
            _write(out, x + lefts[i], MARGIN, header.split("\n"), room)
        for row, height in zip(rows[first : first + length], heights[first : first + length], strict=True):
            for left, cell in zip(lefts, row, strict=True):
                _put(out, x + left, y, cell)
            y += height
    return out


def _put(out: Image.Image, x: int, y: int, cell: Cell) -> None:
    w, h = cell.picture.size
    if cell.frame:
        ImageDraw.Draw(out).rectangle((x - FRAME, y - FRAME, x + w + FRAME - 1, y + h + FRAME - 1), fill=cell.frame)
    out.paste(cell.picture, (x, y))
    _write(out, x, y + h + CLOSE, cell.caption, w + CLOSE, cell.frame or INK)


def _write(out: Image.Image, x: int, y: int, lines: Sequence[str], room: int, color: Color = INK) -> None:
    """Lines one below the other, cut to `room` pixels; the first in `color`, the others soft."""
    draw = ImageDraw.Draw(out)
    for i, line in enumerate(lines):
        shown = line
        while len(shown) > 1 and draw.textlength(shown, _font()) > room:
            shown = shown.removesuffix("…")[:-1] + "…"
        draw.text((x, y + i * LINE), shown, SOFT if i else color, _font())


@cache
def _font() -> ImageFont.FreeTypeFont:
    """DejaVu Sans comes with matplotlib, and has the letters of most alphabets."""
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), TEXT)


def _images(pictures: Tensor, scale: float) -> list[Image.Image]:
    """Float `(N, 3, S, S)` in 0..1, enlarged: pixel by pixel where the scale is whole."""
    if scale == int(scale):
        shown = pictures.repeat_interleave(int(scale), 2).repeat_interleave(int(scale), 3)
    else:
        side = round(pictures.shape[-1] * scale)
        shown = F.interpolate(pictures, size=(side, side), mode="bicubic", antialias=True).clamp(0, 1)
    return [Image.fromarray((255 * x.nan_to_num()).round().byte().permute(1, 2, 0).numpy()) for x in shown]


def write_png(image: Image.Image, path: Path) -> None:
    """Whole or not at all: a reader never sees half a picture. The folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    image.save(partial, "PNG")
    partial.replace(path)
