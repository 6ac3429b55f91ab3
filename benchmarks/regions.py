"""Which way of searching finds the images that contain a region: whole images, the region's surroundings, or patches.

    python benchmarks/regions.py           # about 10 minutes on 2 busy cores
    python benchmarks/regions.py --quick   # 12 queries among 100 images

A region of each of 60 photos of clothes is pasted into two of 600 photos of Caltech-101, at a random place of their
central square, at 0.25 to 0.55 of its side, and saved as JPEG again. It is looked for among all of them: by the
embedding of the whole query, by that of the region's surroundings, and by patch tokens in several ways, also as the
server does it, of the 200 nearest alone. Writes `benchmarks/results/regions.json`, the table in docs/search.md, and
docs/images/regions.jpg, a sheet of photos of clothes alone, as the server ranks them.
"""

import io
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from measure import DATA, ROOT, publish, save
from PIL import Image, ImageDraw

from patchsight_serve.dataset import read_dataset
from patchsight_serve.decode import fit, open_rgb
from patchsight_serve.encoder import Encoder, Pixels, Values
from patchsight_serve.nearest import F32, normalize
from patchsight_serve.outputs import to_unit_length
from patchsight_serve.region import CONTEXT, Box, match, seen, tokens_in, view, where
from patchsight_serve.repository import load_encoders

ENCODERS = ("simclr-vit-tiny-photos", "simclr-vit-photos", "dino-vit-cifar10", "mae-vit-cifar10")
SHIPPED = f"patches, context {CONTEXT:g}"
COPIES, CANDIDATES, BATCH = 2, 200, 16
ALL_OF_IT = 100.0  # sides of the region: more than any picture has
TILE, GAP = 160, 8  # pixels


@dataclass(frozen=True)
class Planted:
    """queries: pictures with a region. gallery: pictures, of which number i has that of query `owner[i]` (-1: none) at
    `truth[i]`."""

    queries: list[tuple[Image.Image, Box]]
    gallery: list[Image.Image]
    owner: list[int]
    truth: list[Box | None]


def plant(queries: Sequence[Image.Image], hosts: Sequence[Image.Image], rng: np.random.Generator) -> Planted:
    chosen, gallery, owner, truth = [], list(hosts), [-1] * len(hosts), list[Box | None]([None] * len(hosts))
    for q, picture in enumerate(queries):
        square = _square(picture)
        sides = rng.uniform(0.25, 0.6, 2)
        x, y = rng.uniform(0, 1 - sides)
        box = Box(x, y, x + sides[0], y + sides[1]).within(square)
        chosen.append((picture, box))
        for host in range(q, len(queries) * COPIES, len(queries)):
            gallery[host], truth[host] = _paste(picture, box, hosts[host], rng)
            owner[host] = q
    return Planted(chosen, gallery, owner, truth)


def _square(picture: Image.Image) -> Box:
    width, height = picture.size
    x, y = (1 - min(picture.size) / width) / 2, (1 - min(picture.size) / height) / 2
    return Box(x, y, 1 - x, 1 - y)


def _pixels(box: Box, picture: Image.Image) -> tuple[float, float, float, float]:
    width, height = picture.size
    return box.x0 * width, box.y0 * height, box.x1 * width, box.y1 * height


def _paste(picture: Image.Image, box: Box, host: Image.Image, rng: np.random.Generator) -> tuple[Image.Image, Box]:
    edges = _pixels(box, picture)
    wide, high = edges[2] - edges[0], edges[3] - edges[1]
    left, top, right, bottom = map(round, _pixels(_square(host), host))
    scale = rng.uniform(0.25, 0.55) * (right - left) / max(wide, high)
    size = max(round(wide * scale), 1), max(round(high * scale), 1)
    x, y = int(rng.integers(left, right - size[0] + 1)), int(rng.integers(top, bottom - size[1] + 1))
    made = host.copy()
    made.paste(picture.resize(size, Image.Resampling.BICUBIC, box=edges), (x, y))
    file = io.BytesIO()
    made.save(file, "JPEG", quality=85)
    width, height = host.size
    return open_rgb(file.getvalue()), Box(x / width, y / height, (x + size[0]) / width, (y + size[1]) / height)


class Encoded:
    """What an encoder makes of the planted pictures."""

    def __init__(self, encoder: Encoder, planted: Planted) -> None:
        self._encoder = encoder
        transform = encoder.manifest.transform
        self.gallery, self.tokens = self.run([fit(picture, transform) for picture in planted.gallery])
        self.whole, _ = self.run([fit(picture, transform) for picture, _ in planted.queries])
        self.around: dict[float, F32] = {}
        self.regions: dict[float, list[tuple[Values, Box]]] = {}
        for context in (1.0, CONTEXT, ALL_OF_IT):
            views = [view(picture, box, transform, context) for picture, box in planted.queries]
            self.around[context], tokens = self.run([shown.pixels for shown in views])
            self.regions[context] = [(t, shown.box) for t, shown in zip(tokens, views, strict=True)]
        clean = self.tokens[[owner < 0 for owner in planted.owner]]
        self.mean: Values = clean.mean(axis=(0, 1, 2))

    def run(self, pixels: Sequence[Pixels]) -> tuple[F32, Values]:
        name = f"{self._encoder.manifest.recommended}_embedding"
        parts = [
            self._encoder.run(np.stack(pixels[i : i + BATCH]), [name, "patch_tokens"])
            for i in range(0, len(pixels), BATCH)
        ]
        return normalize(np.concatenate([p[name] for p in parts])), np.concatenate([p["patch_tokens"] for p in parts])

    def by_patches(self, context: float, mean: Values | float = 0.0) -> F32:
        """Scores `(Q, N)` as `match` gives them, of tokens less their mean."""
        centered = self.tokens - mean
        return np.array([
            [match(tokens_in(tokens - mean, box), other)[0] for other in centered]
            for tokens, box in self.regions[context]
        ], np.float32)  # fmt: skip

    def by_windows(self, context: float) -> F32:
        """The cosine of the mean token of the region to the best mean token of a window of its shape, of 4 sizes."""
        unit = to_unit_length(self.tokens)
        N, n, _, D = unit.shape
        sums = np.zeros((N, n + 1, n + 1, D), np.float32)
        sums[:, 1:, 1:] = unit.cumsum(axis=1).cumsum(axis=2)
        scores = np.full((len(self.whole), N), -1, np.float32)
        for q, (tokens, box) in enumerate(self.regions[context]):
            mean = to_unit_length(tokens_in(tokens, box).mean(axis=0))
            width, height = box.x1 - box.x0, box.y1 - box.y0
            for share in (0.25, 0.375, 0.5, 0.625):
                w = max(round(share * n * width / max(width, height)), 1)
                h = max(round(share * n * height / max(width, height)), 1)
                windows = sums[:, h:, w:] - sums[:, :-h, w:] - sums[:, h:, :-w] + sums[:, :-h, :-w]
                cosines = (windows @ mean) / np.sqrt(np.einsum("nhwd,nhwd->nhw", windows, windows)).clip(1e-9)
                scores[q] = np.maximum(scores[q], cosines.reshape(N, -1).max(axis=1))
        return scores


def recall(scores: F32, owner: Sequence[int]) -> dict[str, float]:
    """at 1: the best image has the region. at 10: the share of the images with it that are among the best 10."""
    order = np.argsort(-scores, axis=1, kind="stable")
    owners = np.array(owner)[order]
    mine = owners == np.arange(len(scores))[:, None]
    return {"recall_1": float(mine[:, 0].mean()), "recall_10": float(mine[:, :10].sum(axis=1).mean() / COPIES)}


def nearest(encoded: Encoded, count: int) -> np.ndarray:
    """Which images the server looks at: bool `(Q, N)`."""
    looked = np.zeros((len(encoded.whole), len(encoded.gallery)), bool)
    rankings = [np.argsort(-(v @ encoded.gallery.T), axis=1) for v in (encoded.whole, encoded.around[CONTEXT])]
    for q in range(len(looked)):
        in_turn = dict.fromkeys(i for pair in zip(*(ranking[q] for ranking in rankings), strict=True) for i in pair)
        looked[q, list(in_turn)[:count]] = True
    return looked


def overlaps(encoded: Encoded, planted: Planted, encoder: Encoder) -> list[float]:
    """Of each image with a region: intersection over union of where it is and where it is found."""
    found = []
    for i, (q, truth) in enumerate(zip(planted.owner, planted.truth, strict=True)):
        if truth is None:
            continue
        _, likeness = match(tokens_in(*encoded.regions[CONTEXT][q]), encoded.tokens[i])
        box = where(likeness).within(seen(planted.gallery[i].size, encoder.manifest.transform))
        wide = max(min(box.x1, truth.x1) - max(box.x0, truth.x0), 0.0)
        high = max(min(box.y1, truth.y1) - max(box.y0, truth.y0), 0.0)
        areas = sum((b.x1 - b.x0) * (b.y1 - b.y0) for b in (box, truth))
        found.append(wide * high / (areas - wide * high))
    return found


def judge(encoder: Encoder, planted: Planted) -> dict[str, object]:
    encoded = Encoded(encoder, planted)
    looked = nearest(encoded, CANDIDATES)
    patches = encoded.by_patches(CONTEXT)
    ways: dict[str, Callable[[], F32]] = {
        "whole image": lambda: encoded.whole @ encoded.gallery.T,
        "region's embedding": lambda: encoded.around[1.0] @ encoded.gallery.T,
        "its surroundings' embedding": lambda: encoded.around[CONTEXT] @ encoded.gallery.T,
        "patches, context 1": lambda: encoded.by_patches(1.0),
        SHIPPED: lambda: patches,
        "patches, all of the picture": lambda: encoded.by_patches(ALL_OF_IT),
        f"{SHIPPED}, centered": lambda: encoded.by_patches(CONTEXT, encoded.mean),
        f"windows, context {CONTEXT:g}": lambda: encoded.by_windows(CONTEXT),
        f"{SHIPPED}, of the {CANDIDATES} nearest": lambda: np.where(looked, patches, -2).astype(np.float32),
    }
    mine = np.array(planted.owner) == np.arange(len(looked))[:, None]
    return {
        "ways": {name: recall(way(), planted.owner) for name, way in ways.items()},
        "among_candidates": float(looked[mine].mean()),
        "iou_median": float(np.median(overlaps(encoded, planted, encoder))),
    }


def table(figures: dict[str, dict[str, object]]) -> str:
    names = list(figures)
    rows = [f"| recall at 1 / at 10 | {' | '.join(f'`{n}`' for n in names)} |", "| --- " * (len(names) + 1) + "|"]
    for way in figures[names[0]]["ways"]:  # type: ignore[attr-defined]
        found = [figures[n]["ways"][way] for n in names]  # type: ignore[index]
        rows.append(f"| {way} | " + " | ".join(f"{r['recall_1']:.2f} / {r['recall_10']:.2f}" for r in found) + " |")
    candidates = [f"{figures[n]['among_candidates']:.2f}" for n in names]
    return "\n".join([*rows, f"| planted images among the {CANDIDATES} nearest | {' | '.join(candidates)} |"])


def sheet(encoder: Encoder, queries: Sequence[Image.Image], hosts: Sequence[Image.Image]) -> Image.Image:
    """A row for each query: the region in it, then the five best images with the box that was found."""
    planted = plant(queries, hosts, np.random.default_rng(1))
    encoded = Encoded(encoder, planted)
    scores = encoded.by_patches(CONTEXT)
    page = Image.new("RGB", (6 * (TILE + GAP) + GAP, len(queries) * (TILE + GAP) + GAP), "white")
    for q, (picture, box) in enumerate(planted.queries):
        row = [_framed(picture, box, "black")]
        for i in np.argsort(-scores[q], kind="stable")[:5]:
            _, likeness = match(tokens_in(*encoded.regions[CONTEXT][q]), encoded.tokens[i])
            found = where(likeness).within(seen(planted.gallery[i].size, encoder.manifest.transform))
            row.append(_framed(planted.gallery[i], found, "#00a040" if planted.owner[i] == q else "#d03030"))
        for column, tile in enumerate(row):
            page.paste(tile, (GAP + column * (TILE + GAP), GAP + q * (TILE + GAP)))
    return page


def _framed(picture: Image.Image, box: Box, color: str) -> Image.Image:
    drawn = picture.copy()
    ImageDraw.Draw(drawn).rectangle(_pixels(box, drawn), outline=color, width=3)
    drawn.thumbnail((TILE, TILE), Image.Resampling.LANCZOS)
    tile = Image.new("RGB", (TILE, TILE), "white")
    tile.paste(drawn, ((TILE - drawn.width) // 2, (TILE - drawn.height) // 2))
    return tile


def photos(path: str, count: int, seed: int) -> list[Image.Image]:
    dataset = read_dataset(str(DATA / path))
    return [open_rgb(dataset.read(int(i))) for i in np.random.default_rng(seed).permutation(len(dataset))[:count]]


def main() -> None:
    quick = "--quick" in sys.argv
    queries, images = (12, 100) if quick else (60, 600)
    clothes = photos("clothing10/test.parquet", queries, 0)
    planted = plant(clothes, photos("caltech101/train.parquet", images, 1), np.random.default_rng(0))
    encoders = load_encoders(ROOT / "model_repository")
    figures = {}
    for name in ENCODERS:
        figures[name] = judge(encoders[name], planted)
        print(name, figures[name], flush=True)
    print(table(figures))
    if not quick:
        setting = {"queries": queries, "images": images, "copies": COPIES, "candidates": CANDIDATES}
        save("regions", {"setting": setting, "encoders": figures})
        publish("regions", table(figures))
        page = sheet(encoders[ENCODERS[0]], clothes[:4], photos("clothing10/train.parquet", 200, 2))
        page.save(ROOT / "docs" / "images" / "regions.jpg", quality=88)


if __name__ == "__main__":
    main()
