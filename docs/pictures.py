"""The pictures of docs/objectives.md, each made by the code that trains and serves, of the sample photos (CC0).

    python docs/pictures.py [NAME …]      # writes docs/images/objectives-NAME.png; by default all

All but `masking` take seconds. That one trains a small MAE first (3 CPU minutes, kept in runs/lessons), on photos of
PATCHSIGHT_TEST_DATA among which the shown ones are not.
"""

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor

sys.path.insert(0, str(Path(__file__).parent / "lessons"))

from lesson import DATA, trained
from matplotlib.figure import Figure
from rich.console import Console

from patchsight_serve.ort_encoder import OrtEncoder
from patchsight_train.build import build
from patchsight_train.data import Images, load_images
from patchsight_train.dino import DINOHead, sharpen
from patchsight_train.objective import Objective
from patchsight_train.objective_settings import SETTINGS
from patchsight_train.pictures import Cell, overlay, reconstruction_sheet, sheet, view_sheet
from patchsight_train.randomness import Randomness
from patchsight_train.swav import sinkhorn
from patchsight_train.views import denormalize

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = ROOT / "serve" / "patchsight_serve" / "samples" / "clothing.parquet"
SHOWN = [2, 23, 41, 65]  # photos on which something can be seen
QUIET = Console(file=io.StringIO())


def photos(size: int) -> Images:
    return load_images([str(SAMPLES)], size, None, QUIET)


def objective(name: str, **changes: Any) -> Objective:
    torch.manual_seed(0)
    return build(SETTINGS[name](**{"data": ["samples"], "image_size": 96, "patch_size": 8} | changes))


def views(of: Objective, images: Tensor, seed: int) -> list[Tensor]:
    """What the objective sees of pictures, back in 0..1."""
    drawn = of.views(images, Randomness(Generator().manual_seed(seed)))
    return [denormalize(view) for view in drawn if view.ndim == 4]


def two_views() -> Image.Image:
    images = photos(144).pixels[SHOWN]
    made = views(objective("simclr", color_strength=1.0, blur=0.5), images, 8)
    return view_sheet(images / 255, made)


def multi_crop() -> Image.Image:
    images = photos(144).pixels[SHOWN[:3]]
    return view_sheet(images / 255, views(objective("dino", local_crops=6), images, 1))


def masking() -> Image.Image:
    sources = [str(DATA / "caltech101" / "train.parquet"), str(DATA / "clothing10" / "test.parquet")]
    mae, _ = trained(
        load_images(sources, 64, None, QUIET), "mae", image_size=64, patch_size=8, width=96, heads=3, batch_size=64,
        epochs=18, lr=2e-3, decoder_depth=1, decoder_width=64, decoder_heads=2, normalize_pixels=False,
        data=["caltech101", "clothing10"],
    )  # fmt: skip
    images = photos(64).pixels[[2, 23, 41, 65, 87, 121]]
    seen = mae.views(images, Randomness(Generator().manual_seed(2)))
    masked, rebuilt = mae.masked(seen), mae.reconstruct(seen)
    assert masked is not None
    assert rebuilt is not None
    return reconstruction_sheet(denormalize(seen[0]), masked, rebuilt)


def attention() -> Image.Image:
    """The mean over the heads of three encoders that ship, at the size that each sees."""
    large = photos(128).pixels[SHOWN] / 255
    columns = [[Image.fromarray((255 * x).byte().permute(1, 2, 0).numpy()) for x in large]]
    headers = ["picture"]
    for bundle in ("simclr-vit-tiny-photos", "simclr-vit-cifar10", "mae-vit-cifar10", "dino-vit-cifar10"):
        maps = run(bundle, "attention", SHOWN)  # (N, heads, h, w)
        shown = [overlay(p, m) for p, m in zip(columns[0], torch.from_numpy(maps).mean(dim=1), strict=True)]
        columns.append(shown)
        headers.append(bundle.replace("-vit", "\n").replace("\n-", "\n"))
    return sheet(headers, [[Cell(picture) for picture in row] for row in zip(*columns, strict=True)])


def run(bundle: str, output: str, rows: list[int]) -> np.ndarray[Any, Any]:
    encoder = OrtEncoder(ROOT / "model_repository" / bundle, threads=1)
    pixels = photos(encoder.manifest.transform.crop).pixels[rows].permute(0, 2, 3, 1).contiguous().numpy()
    return encoder.run(pixels, [output])[output]


def embeddings(bundle: str) -> Tensor:
    """CLS of all samples as it was trained: `(200, D)`."""
    return torch.from_numpy(run(bundle, "cls_embedding", list(range(200))))


def temperature() -> Figure:
    """How the softmax of NT-Xent weighs the other pictures, those most alike first, at three temperatures."""
    z = torch.nn.functional.normalize(embeddings("simclr-vit-cifar10"), dim=1)
    similarity = (z[SHOWN[0]] @ z.T).sort(descending=True).values[1:]  # without itself
    figure = Figure(figsize=(8.5, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(range(1, 200), similarity, color="#444444")
    left.set(xlabel="other photos, the most alike first", ylabel="cosine to the photo")
    for tau, color in ((0.05, "tab:red"), (0.2, "tab:orange"), (1.0, "tab:blue")):
        right.plot(range(1, 200), (similarity / tau).softmax(dim=0), color=color, label=f"τ = {tau:g}")
    right.set(xlabel="the same photos", ylabel="share of the repulsion", xscale="log", yscale="log")
    right.legend(frameon=False)
    return figure


def centering() -> Figure:
    """DINO's targets with and without its two measures: 200 photos, a fresh head on a shipped encoder."""
    torch.manual_seed(0)
    head = DINOHead(128, 256, 64, K := 64)
    with torch.no_grad():
        logits = head(embeddings("dino-vit-cifar10"))
    center = logits.mean(dim=0, keepdim=True)
    spread = logits - center
    scale = 0.1 / float(spread.std())  # of a head that has been trained for a while; a fresh one hardly differs
    logits = (center / float(center.std()) * 0.25) + spread * scale
    center = logits.mean(dim=0, keepdim=True)
    arms = {
        "neither": sharpen(logits, torch.zeros(1, K), 0.1),
        "sharpened alone": sharpen(logits, torch.zeros(1, K), 0.03),
        "centered alone": sharpen(logits, center, 0.1),
        "both": sharpen(logits, center, 0.03),
    }
    return heatmaps(arms, "200 photos", "64 prototypes")


def codes() -> Figure:
    """SwAV's assignments of 200 photos to prototypes: by softmax, and by Sinkhorn."""
    torch.manual_seed(1)
    z = embeddings("simclr-vit-cifar10")
    z = torch.nn.functional.normalize(z, dim=1)
    prototypes = torch.nn.functional.normalize(torch.randn(32, z.shape[1]), dim=1)
    scores = z @ prototypes.T
    arms = {"softmax of the scores": (scores / 0.05).softmax(dim=1), "Sinkhorn": sinkhorn(scores, 0.05, 3)}
    return heatmaps(arms, "200 photos", "32 prototypes")


def heatmaps(arms: dict[str, Tensor], rows: str, columns: str) -> Figure:
    """Distributions over prototypes, a row for each photo; below, how much each prototype gets in all."""
    figure = Figure(figsize=(8.5, 4), layout="constrained")
    axes = figure.subplots(2, len(arms), sharex="col", height_ratios=(4, 1), squeeze=False)
    for (name, t), top, bottom in zip(arms.items(), axes[0], axes[1], strict=True):
        top.imshow(t.sqrt(), aspect="auto", cmap="magma", vmin=0, vmax=1, interpolation="nearest")
        entropy = float(-torch.special.xlogy(t, t).sum(dim=1).mean())
        top.set_title(f"{name}\nentropy {entropy:.1f} of {np.log(t.shape[1]):.1f}", fontsize=9)
        top.set(xticks=[], yticks=[])
        bottom.bar(range(t.shape[1]), t.mean(dim=0), color="#555555", width=1)
        bottom.axhline(1 / t.shape[1], color="tab:red", linewidth=0.8)
        bottom.set(xlabel=columns, xticks=[], yticks=[])
    axes[0][0].set_ylabel(rows)
    axes[1][0].set_ylabel("in all")
    return figure


PICTURES: dict[str, Callable[[], Image.Image | Figure]] = {
    "views": two_views, "multi-crop": multi_crop, "masking": masking, "attention": attention,
    "temperature": temperature, "centering": centering, "codes": codes,
}  # fmt: skip


def save(picture: Image.Image | Figure, path: Path) -> None:
    if isinstance(picture, Figure):
        picture.savefig(path, dpi=110)
    else:  # a palette: a third of the bytes, and no difference to be seen
        picture.quantize(255, dither=Image.Dither.FLOYDSTEINBERG).save(path, optimize=True)
    print(f"{path.name}: {path.stat().st_size:,} bytes")


def main() -> None:
    for name in sys.argv[1:] or PICTURES:
        save(PICTURES[name](), ROOT / "docs" / "images" / f"objectives-{name}.png")


if __name__ == "__main__":
    main()
