"""What a trained encoder gives for free: centering, whitening, both embeddings at once, the last blocks averaged, the
mirror image besides.

    python benchmarks/free_quality.py          # about 10 minutes on 2 cores
    python benchmarks/free_quality.py --quick  # the first 10,000 and 2,000 images

Of the bundle whose graph does not whiten by itself. Mean and covariance are learned from CIFAR-10's training images
without their labels, the encoder's own data, and used on clothing10 as they are, as they would be in a graph that
ships. Whitening is that of `patchsight-export --whiten`, with its shrinkage s and others. 20-NN by DINO's protocol and
a linear probe. Writes `benchmarks/results/free_quality.json` and the table in docs.
"""

import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from measure import DATA, ROOT, publish, save
from torch import Tensor

from patchsight_serve.dataset import Dataset, read_dataset
from patchsight_serve.decode import decode
from patchsight_serve.embedder import batches
from patchsight_serve.nearest import F32, I64, normalize
from patchsight_serve.protocol import evaluate
from patchsight_train.data import eval_transform
from patchsight_train.encoder import Encoder
from patchsight_train.initial import read_encoder
from patchsight_train.judge.features import features
from patchsight_train.linear import linear_probe
from patchsight_train.whitening import Whitening

DATASETS = ("cifar10", "clothing10")
Map = Callable[[F32], F32]  # embeddings (N, D) to others


class Split(NamedTuple):
    """Embeddings as the encoder gives them, float32 `(N, D)`, of the pictures and of their mirror images; `last` are
    the CLS tokens of the last four blocks, `(N, 4, D)`."""

    cls: F32
    mean: F32
    last: F32
    cls_mirrored: F32
    labels: I64


def split(encoder: Encoder, dataset: Dataset, limit: int | None) -> Split:
    assert dataset.labels is not None
    transform, kinds = eval_transform(encoder.config.image_size), ("cls", "mean", "last 4 blocks", "mirrored")
    outputs: dict[str, list[Tensor]] = {kind: [] for kind in kinds}
    for rows in batches(range(min(len(dataset), limit or len(dataset))), 64):
        pixels = torch.from_numpy(np.stack([decode(dataset.read(i), transform) for i in rows])).permute(0, 3, 1, 2)
        found = features(encoder, pixels, {}) | {"mirrored": features(encoder, pixels.flip(-1), {})["cls"]}
        for kind in kinds:
            outputs[kind].append(found[kind])
    cls, mean, last, mirrored = (torch.cat(outputs[kind]) for kind in kinds)
    blocks = last.reshape(len(cls), -1, cls.shape[1]).numpy()
    return Split(cls.numpy(), mean.numpy(), blocks, mirrored.numpy(), dataset.labels[: len(cls)])


def both(s: Split) -> F32:
    """CLS and mean of the patch tokens, each of length 1, side by side."""
    return normalize(np.concatenate([normalize(s.cls), normalize(s.mean)], axis=1))


def with_mirror(s: Split) -> F32:
    return normalize(normalize(s.cls) + normalize(s.cls_mirrored))


def averaged(s: Split) -> F32:
    """Of the last four blocks' CLS tokens, each of length 1, the mean."""
    return normalize(sum(normalize(s.last[:, i]) for i in range(s.last.shape[1])))  # type: ignore[arg-type]


def plain(learned_from: F32) -> Map:  # noqa: ARG001 - the signature of the others
    return lambda x: x


def centering(learned_from: F32) -> Map:
    mean = learned_from.mean(axis=0)
    return lambda x: x - mean


def whitening(s: float) -> Callable[[F32], Map]:
    def learn(learned_from: F32) -> Map:
        learned = Whitening.learned(torch.from_numpy(learned_from), s)
        return lambda x: learned(torch.from_numpy(x)).numpy()

    return learn


FEATURES: dict[str, Callable[[Split], F32]] = {
    "CLS": lambda s: normalize(s.cls),
    "mean of the patch tokens": lambda s: normalize(s.mean),
    "both side by side": both,
    "CLS of the last 4 blocks, averaged": averaged,
    "CLS of picture + mirror image": with_mirror,
}
MAPS: dict[str, Callable[[F32], Map]] = {
    "as it is": plain,
    "centered": centering,
    "whitened, s = 0.1": whitening(0.1),
    "whitened, s = 0.01": whitening(0.01),
    "whitened": whitening(0.0),
}


ENCODERS = ("simclr-vit-cifar10",)  # those whose graph does not whiten yet


def main() -> None:
    sizes = (10_000, 2_000) if "--quick" in sys.argv[1:] else (None, None)
    results: dict[str, dict[str, float]] = {}
    for name in ENCODERS:
        encoder, _ = read_encoder(ROOT / "model_repository" / name)
        splits = {
            data: [split(encoder, read_dataset(DATA / data / f"{part}.parquet"), n) for part, n in parts(sizes)]
            for data in DATASETS
        }
        for kind, of in FEATURES.items():
            for how, learn in MAPS.items():
                change = learn(of(splits["cifar10"][0]))
                row = {k: v for data in DATASETS for k, v in measured(data, splits[data], of, change).items()}
                results[f"{name}: {kind}, {how}"] = row
                print(kind, how, {k: round(v, 4) for k, v in row.items()}, flush=True)
    print(table(results))
    if sizes[0] is None:
        save("free_quality", {"results": results})
        publish("free_quality", table(results))


def parts(sizes: tuple[int | None, int | None]) -> list[tuple[str, int | None]]:
    return [("train", sizes[0]), ("test", sizes[1])]


def measured(data: str, splits: list[Split], of: Callable[[Split], F32], change: Map) -> dict[str, float]:
    gallery, queries = (normalize(change(of(s))) for s in splits)
    labels, truth = (s.labels for s in splits)
    figures = evaluate(gallery, labels, queries, truth)
    probe = linear_probe(*(torch.tensor(x) for x in (gallery, labels, queries, truth)))
    return {f"{data} 20-NN": figures.accuracy[20], f"{data} linear": probe}


def table(results: dict[str, dict[str, float]]) -> str:
    columns = list(next(iter(results.values())))
    lines = ["| embedding | " + " | ".join(columns) + " |", "| --- |" + " --- |" * len(columns)]
    best = {column: max(row[column] for row in results.values()) for column in columns}
    for name, row in results.items():
        cells = [f"**{row[c]:.3f}**" if row[c] == best[c] else f"{row[c]:.3f}" for c in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
