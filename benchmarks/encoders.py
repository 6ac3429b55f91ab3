"""How good are the encoders that ship? 20-NN on two labelled data sets, beside what needs no learning.

    python benchmarks/encoders.py            # all of it, about 10 minutes on 2 cores
    python benchmarks/encoders.py --quick    # the first 10,000 and 2,000 images

Protocol: DINO's, as `patchsight-knn`. Rows: each bundle of `model_repository/` by both of its embeddings, and three
that saw no training: raw pixels, histograms of oriented gradients with coarse color, the same ViT with random weights.
Prints the table; the full run also writes `benchmarks/results/encoders.json` and puts the table into README and docs.
"""

import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from measure import DATA, ROOT, publish, save
from rich.console import Console
from rich.progress import track

from patchsight_serve.dataset import Dataset, read_dataset
from patchsight_serve.decode import decode
from patchsight_serve.embedder import LocalEmbedder
from patchsight_serve.labelled import embed_labelled
from patchsight_serve.manifest import Transform
from patchsight_serve.nearest import F32, normalize
from patchsight_serve.protocol import evaluate
from patchsight_serve.repository import load_encoders


class Row(NamedTuple):
    """Accuracies, 0..1, by k; the interval is the 20-NN's."""

    name: str
    accuracy: dict[str, float]
    interval_95: tuple[float, float]


def pixels_of(dataset: Dataset) -> np.ndarray:
    """float32 `(N, 32, 32, 3)` in 0..1, by the decoder that serves."""
    transform = Transform(resize=32, crop=32)
    rows = track(range(len(dataset)), "decode", console=Console(stderr=True))
    return np.stack([decode(dataset.read(i), transform) for i in rows]).astype(np.float32) / 255


def raw(pixels: np.ndarray) -> np.ndarray:
    """The picture itself."""
    return pixels.reshape(len(pixels), -1)


def histograms(pixels: np.ndarray) -> np.ndarray:
    """Histograms of oriented gradients as Dalal and Triggs made them (CVPR 2005): square-root pixels, the strongest of
    the three channels, 9 unsigned directions in cells of 4 × 4, blocks of 2 × 2 cells normalized and clipped at 0.2.
    Beside them a 4 × 4 color thumbnail at a weight of 0.3, the best of three tried."""
    N, cell, bins = len(pixels), 4, 9
    dy, dx = np.gradient(np.sqrt(pixels), axis=(1, 2))
    strongest = np.hypot(dx, dy).argmax(axis=3)[..., None]
    dx, dy = (np.take_along_axis(d, strongest, axis=3)[..., 0] for d in (dx, dy))
    place = np.arctan2(dy, dx) % np.pi / np.pi * bins
    low, high_share = np.floor(place).astype(int), place % 1
    grid = 32 // cell
    cells = np.empty((N, grid, grid, bins), np.float32)
    for b in range(bins):
        share = (low % bins == b) * (1 - high_share) + ((low + 1) % bins == b) * high_share
        cells[..., b] = (np.hypot(dx, dy) * share).reshape(N, grid, cell, grid, cell).sum(axis=(2, 4))
    corners = [cells[:, :-1, :-1], cells[:, 1:, :-1], cells[:, :-1, 1:], cells[:, 1:, 1:]]
    blocks = np.concatenate(corners, axis=-1)
    blocks = np.minimum(blocks / (np.linalg.norm(blocks, axis=-1, keepdims=True) + 0.1), 0.2)
    color = pixels.reshape(N, 4, 8, 4, 8, 3).mean(axis=(2, 4)) - 0.5
    return np.concatenate([unit(blocks.reshape(N, -1)), 0.3 * unit(color.reshape(N, -1))], axis=1)


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows to length 1; a flat picture's stay near 0."""
    directions: np.ndarray = rows / (np.linalg.norm(rows, axis=1, keepdims=True) + 1e-6)
    return directions


def random_vit(pixels: np.ndarray) -> np.ndarray:
    """The shipped architecture before its first step, mean of the patch tokens (better than its CLS)."""
    import torch

    from patchsight_train.architecture import ViTConfig
    from patchsight_train.probe import embed
    from patchsight_train.vit import ViT

    torch.manual_seed(0)
    encoder = ViT(ViTConfig(image_size=32, patch_size=4, width=128, depth=4, heads=4, stem="conv"))
    images = torch.from_numpy((pixels * 255).round().astype(np.uint8)).permute(0, 3, 1, 2)
    return embed(encoder, images, "mean", torch.device("cpu")).numpy()


def centered(gallery: np.ndarray, queries: np.ndarray) -> tuple[F32, F32]:
    """Both without the gallery's mean, to length 1: without it, cosine sees little but what all pictures share."""
    mean = gallery.mean(axis=0)
    return normalize((gallery - mean).astype(np.float32)), normalize((queries - mean).astype(np.float32))


DATASETS = {
    "cifar10": "CIFAR-10, 50,000 in the gallery, 10,000 queries",
    "clothing10": "clothing10, 700 and 372: photos of clothes, never seen in training",
}
BASELINES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "raw pixels": raw,
    "histograms of oriented gradients + color": histograms,
    "same ViT, random weights": random_vit,
}


def rows_of(data: str, gallery_n: int | None, query_n: int | None) -> list[Row]:
    """Every baseline and every shipped encoder on one data set, whole or its first images."""
    train, test = (read_dataset(DATA / data / f"{part}.parquet") for part in ("train", "test"))
    assert train.labels is not None
    assert test.labels is not None
    gallery_labels, query_labels = train.labels[:gallery_n], test.labels[:query_n]
    rows: list[Row] = []

    def add(name: str, gallery: F32, queries: F32) -> None:
        figures = evaluate(gallery[:gallery_n], gallery_labels, queries[:query_n], query_labels)
        rows.append(Row(name, {str(k): value for k, value in figures.accuracy.items()}, figures.interval))
        print(f"{data}: {name}: 20-NN {figures.accuracy[20]:.4f}", file=sys.stderr, flush=True)

    pixels, queries = pixels_of(train)[:gallery_n], pixels_of(test)[:query_n]
    for name, features in BASELINES.items():
        add(name, *centered(features(pixels), features(queries)))
    for name, encoder in load_encoders(ROOT / "model_repository").items():
        for output in ("cls", "mean"):
            embedder = LocalEmbedder(encoder, output)
            star = ", recommended" if output == encoder.manifest.recommended else ""
            add(f"{name} ({output}{star})", *(embed_labelled(d, embedder).vectors for d in (train, test)))
    return rows


def main() -> None:
    quick = "--quick" in sys.argv[1:]
    sizes = (10_000, 2_000) if quick else (None, None)
    rows = {data: rows_of(data, *sizes) for data in DATASETS}
    text = markdown(rows)
    print(text)
    if not quick:
        save("encoders", {data: [row._asdict() for row in figures] for data, figures in rows.items()})
        publish("encoders", text)


def markdown(rows: dict[str, list[Row]]) -> str:
    """Features by data set: 20-NN with its interval, in the order of the first data set, best last."""
    lines = ["| 20-NN (95 % interval) | " + " | ".join(DATASETS.values()) + " |", "| --- |" + " --- |" * len(rows)]
    first = next(iter(rows.values()))
    for i in sorted(range(len(first)), key=lambda i: first[i].accuracy["20"]):
        cells = [
            f"**{r[i].accuracy['20']:.3f}** ({r[i].interval_95[0]:.3f} to {r[i].interval_95[1]:.3f})"
            for r in rows.values()
        ]
        lines.append(f"| {first[i].name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
