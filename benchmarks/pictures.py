"""The README's picture of attention: photos, and over each the map of every head, as `/attention` draws them.

    python benchmarks/pictures.py      # writes docs/images/attention.png

The page's screenshots are made by its browser tests: `PATCHSIGHT_SCREENSHOTS=docs/images pytest tests/browser`.
"""

import io

from measure import ROOT
from PIL import Image, ImageDraw, ImageFont

from patchsight_serve.decode import fit, open_rgb
from patchsight_serve.heatmap import overlay, shown_crop
from patchsight_serve.repository import load_encoders

PHOTOS = ("shoes", "dress")
TILE, GAP, LABEL = 224, 12, 28  # pixels


def main() -> None:
    encoder = next(iter(load_encoders(ROOT / "model_repository").values()))
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
