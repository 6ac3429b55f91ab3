"""How good are the encoders that ship? 20-NN on CIFAR-10's full test split, beside what needs no learning.

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


BASELINES: dict[str, Callable[[np.ndarray, np.ndarray], F32]] = {
    "raw pixels, mean removed": raw,
    "gradient histograms + color": histograms,
    "same ViT, random weights": random_vit,
}


def main() -> None:
    quick = "--quick" in sys.argv[1:]
    train, test = (read_dataset(DATA / "cifar10" / f"{part}.parquet") for part in ("train", "test"))
    gallery_n, query_n = (10_000, 2_000) if quick else (len(train), len(test))
    assert train.labels is not None
    assert test.labels is not None
    gallery_labels, query_labels = train.labels[:gallery_n], test.labels[:query_n]
    rows: list[Row] = []

    def add(name: str, gallery: F32, queries: F32) -> None:
        figures = evaluate(gallery[:gallery_n], gallery_labels, queries[:query_n], query_labels)
        rows.append(Row(name, {str(k): value for k, value in figures.accuracy.items()}, figures.interval))

    pixels, queries = pixels_of(train)[:gallery_n], pixels_of(test)[:query_n]
    mean = pixels.mean(axis=0)
    for name, features in BASELINES.items():
        add(name, features(pixels, mean), features(queries, mean))
    for name, encoder in load_encoders(ROOT / "model_repository").items():
        for output in ("cls", "mean"):
            embedder = LocalEmbedder(encoder, output)
            star = ", recommended" if output == encoder.manifest.recommended else ""
            add(f"{name} ({output}{star})", *(embed_labelled(d, embedder).vectors for d in (train, test)))
    if not quick:
        save(
            "encoders",
            {"data": "cifar10", "gallery": gallery_n, "queries": query_n, "rows": [row._asdict() for row in rows]},
        )
    text = markdown(rows, gallery_n, query_n)
    print(text)
    if not quick:
        publish("encoders", text)


def markdown(rows: list[Row], gallery: int, queries: int) -> str:
    """The rows as a table, best last."""
    head = f"CIFAR-10, {gallery:,} in the gallery, {queries:,} queries"
    lines = [f"| {head} | 1-NN | 20-NN | 95 % interval |", "| --- | --- | --- | --- |"]
    for row in sorted(rows, key=lambda r: r.accuracy["20"]):
        one, twenty = row.accuracy["1"], row.accuracy["20"]
        low, high = row.interval_95
        lines.append(f"| {row.name} | {one:.3f} | **{twenty:.3f}** | {low:.3f} to {high:.3f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
