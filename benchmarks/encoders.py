"""How good are the encoders that ship? 20-NN on two labelled data sets, beside what needs no learning.

    python benchmarks/encoders.py            # all of it, about 10 minutes on 2 cores
    python benchmarks/encoders.py --quick    # the first 10,000 and 2,000 images

Protocol: DINO's, as `patchsight-knn`. Rows: each bundle of `model_repository/` by both of its embeddings, and three
that saw no training: raw pixels, gradient histograms with coarse color, and the same ViT with random weights.
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


def raw(pixels: np.ndarray, mean: np.ndarray) -> F32:
    """The picture itself, without the mean picture of the train split."""
    return normalize((pixels - mean).reshape(len(pixels), -1))


def histograms(pixels: np.ndarray, mean: np.ndarray) -> F32:  # noqa: ARG001 - the same call as `raw`
    """Histograms of 8 gradient directions in 8 × 8 cells, each cell normalized, and a 4 × 4 color thumbnail."""
    gray = pixels.mean(axis=3)
    dy, dx = np.gradient(gray, axis=(1, 2))
    strength, bins = np.hypot(dx, dy), ((np.arctan2(dy, dx) + np.pi) / (2 * np.pi) * 8).astype(int) % 8
    N = len(pixels)
    cells = [(strength * (bins == b)).reshape(N, 8, 4, 8, 4).sum(axis=(2, 4)) for b in range(8)]
    gradient = np.sqrt(np.stack(cells, axis=-1))
    gradient /= np.linalg.norm(gradient, axis=-1, keepdims=True) + 0.1
    color = pixels.reshape(N, 4, 8, 4, 8, 3).mean(axis=(2, 4))
    both = [gradient.reshape(N, -1), 2 * (color - color.mean(axis=(0, 1, 2))).reshape(N, -1)]
    return normalize(np.concatenate(both, axis=1).astype(np.float32))


def random_vit(pixels: np.ndarray, mean: np.ndarray) -> F32:  # noqa: ARG001
    """The shipped architecture before its first step, mean of the patch tokens (better than its CLS)."""
    import torch

    from patchsight_train.architecture import ViTConfig
    from patchsight_train.probe import embed
    from patchsight_train.vit import ViT

    torch.manual_seed(0)
    encoder = ViT(ViTConfig(image_size=32, patch_size=4, width=128, depth=4, heads=4, stem="conv"))
    images = torch.from_numpy((pixels * 255).round().astype(np.uint8)).permute(0, 3, 1, 2)
    return normalize(embed(encoder, images, "mean", torch.device("cpu")).numpy())


DATASETS = {
    "cifar10": "CIFAR-10, 50,000 in the gallery, 10,000 queries",
    "clothing10": "clothing10, 700 and 372: photos of clothes, never seen in training",
}
BASELINES: dict[str, Callable[[np.ndarray, np.ndarray], F32]] = {
    "raw pixels, mean removed": raw,
    "gradient histograms + color": histograms,
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
    mean = pixels.mean(axis=0)
    for name, features in BASELINES.items():
        add(name, features(pixels, mean), features(queries, mean))
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
