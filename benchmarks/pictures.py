"""The README's pictures of attention and neighbors, by the encoder that answers by default.

    python benchmarks/pictures.py      # writes docs/images/attention.png and neighbors.png

Attention: photos, and over each the map of every head, as `/attention` draws them. Neighbors: the first test photo of
each of six classes of clothing10, in the order of the file, and the six most similar of its training photos.

The page's screenshots are made by its browser tests: `PATCHSIGHT_SCREENSHOTS=docs/images pytest tests/browser`.
"""

import io

import numpy as np
import torch
from measure import DATA, ROOT
from PIL import Image, ImageDraw, ImageFont

from patchsight_serve.dataset import Dataset
from patchsight_serve.decode import decode, fit, open_rgb
from patchsight_serve.embedder import LocalEmbedder
from patchsight_serve.encoder import Encoder, default_name
from patchsight_serve.heatmap import overlay, shown_crop
from patchsight_serve.labelled import embed_labelled, read_labelled
from patchsight_serve.manifest import Transform
from patchsight_serve.protocol import Rows
from patchsight_serve.repository import load_encoders
from patchsight_train.judge.sheets import one_of_each
from patchsight_train.pictures import neighbor_sheet

PHOTOS = ("shoes", "dress")
TILE, GAP, LABEL = 224, 12, 28  # pixels
SHOWN = 6  # neighbors


def main() -> None:
    encoders = load_encoders(ROOT / "model_repository")
    encoder = encoders[default_name(encoders)]
    attention(encoder)
    neighbors(encoder)


def neighbors(encoder: Encoder) -> None:
    train, test = (read_labelled(str(DATA / "clothing10" / f"{side}.parquet")) for side in ("train", "test"))
    gallery, queries = (embed_labelled(side, LocalEmbedder(encoder)) for side in (train, test))
    chosen = one_of_each(torch.tensor(queries.labels), torch.arange(len(queries.labels)))
    similarity, rows = Rows(gallery.vectors).search(queries.vectors[chosen], SHOWN)
    names = train.class_names or []
    sheet = neighbor_sheet(
        thumbnails(test, chosen), torch.stack([thumbnails(train, row.tolist()) for row in rows]),
        torch.from_numpy(similarity), [names[queries.labels[i]] for i in chosen],
        [[names[gallery.labels[i]] for i in row] for row in rows],
    )  # fmt: skip
    sheet.save(ROOT / "docs" / "images" / "neighbors.png", optimize=True)


def thumbnails(dataset: Dataset, rows: list[int]) -> torch.Tensor:
    """float32 `(n, 3, 128, 128)` in 0..1. No photo of this set fails to decode, so rows are those of the vectors."""
    pixels = [decode(dataset.read(i), Transform(resize=128, crop=128)) for i in rows]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 255


def attention(encoder: Encoder) -> None:
    transform, grid = encoder.manifest.transform, encoder.manifest.outputs["attention"][-1]
    heads = encoder.manifest.num_heads or 0
    names = ["what it sees", "mean", *(f"head {i}" for i in range(heads))]
    rows: list[list[Image.Image]] = []
    for photo in PHOTOS:
        picture = open_rgb((ROOT / "docs" / "images" / f"{photo}.jpg").read_bytes())
        seen = fit(picture, transform)
        (maps,) = encoder.run(seen[None], ["attention"])["attention"]
        shown = shown_crop(picture, transform, grid)
        drawn = [overlay(shown, m) for m in (maps.mean(axis=0), *maps)]
        rows.append([Image.fromarray(seen), *(Image.open(io.BytesIO(png)) for png in drawn)])
    sheet(rows, names).save(ROOT / "docs" / "images" / "attention.png", optimize=True)


def sheet(rows: list[list[Image.Image]], names: list[str]) -> Image.Image:
    """Pictures in rows, each column under its name; the first column keeps its pixels visible."""
    step = TILE + GAP
    page = Image.new("RGB", (len(names) * step + GAP, len(rows) * step + LABEL + GAP), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=15)
    for column, name in enumerate(names):
        draw.text((GAP + column * step, 8), name, fill=(60, 60, 60), font=font)
        for row, pictures in enumerate(rows):
            resampling = Image.Resampling.NEAREST if column == 0 else Image.Resampling.LANCZOS
            tile = pictures[column].convert("RGB").resize((TILE, TILE), resampling)
            page.paste(tile, (GAP + column * step, LABEL + GAP // 2 + row * step))
    return page


if __name__ == "__main__":
    main()
