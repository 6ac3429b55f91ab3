"""How good are the encoders that ship? k-NN and linear probe on four labelled data sets, beside what needs no learning.

    python benchmarks/encoders.py --quick    # 20,000 in the gallery, 2,000 queries at most: the README's table
    python benchmarks/encoders.py            # all images, into its own results

Protocols: DINO's k-NN, as `patchsight-knn`, and the linear heads of `patchsight-eval`. Rows: each bundle of
`model_repository/` by both of its embeddings, and four that saw no training: raw pixels, their principal components,
histograms of oriented gradients with coarse color, a ViT with random weights. Writes `benchmarks/results/encoders.json`
(`encoders_full.json`), and puts the tables into README and docs.

Nothing is done twice: embeddings are kept in `runs/embeddings` under the hashes of bundle and data, and a row of the
results stands as long as its bundle, its data and its number of images do, with the commit that measured it; a change
of the protocol is a reason to delete the file. So a new bundle costs its own rows.
"""

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from baselines import BASELINES
from measure import DATA, ROOT, commit, publish, save
from rich.console import Console
from rich.progress import track

from patchsight_serve.dataset import Dataset, read_dataset
from patchsight_serve.decode import decode
from patchsight_serve.embedder import batches
from patchsight_serve.manifest import Transform
from patchsight_serve.nearest import normalize
from patchsight_serve.protocol import evaluate, wilson
from patchsight_serve.repository import load_encoders
from patchsight_train.judge.heads import probe_heads

CACHE = ROOT / "runs" / "embeddings"
QUICK = (20_000, 2_000)
DATASETS = {
    "cifar10": ("cifar10/train.parquet", "cifar10/test.parquet"),
    "tiny_imagenet": ("tiny_imagenet/train-*.parquet", "tiny_imagenet/test.parquet"),
    "caltech101": ("caltech101/train.parquet", "caltech101/test.parquet"),
    "clothing10": ("clothing10/train.parquet", "clothing10/test.parquet"),
}
F32 = np.ndarray


class Row(NamedTuple):
    """What was judged, and the hash of all that it depends on. Accuracies, 0..1, by k; the 20-NN's interval; the linear
    probe's accuracy and interval."""

    name: str
    of: str
    commit: str
    knn: dict[str, float]
    knn_interval_95: tuple[float, float]
    linear: float
    linear_interval_95: tuple[float, float]


def pixels_of(dataset: Dataset, size: int, what: str) -> Iterator[np.ndarray]:
    """uint8 `(b, size, size, 3)`, batch by batch, by the decoder that serves."""
    transform = Transform(resize=size, crop=size)
    rows = track(range(len(dataset)), what, console=Console(stderr=True))
    with ThreadPoolExecutor(2) as pool:
        for batch in batches(rows, 64):
            yield np.stack(list(pool.map(lambda i: decode(dataset.read(i), transform), batch)))


def hash_of(pattern: str) -> str:
    """Of the data files' content."""
    files = sorted(DATA.glob(pattern))
    return hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in files)).hexdigest()


def kept(key: str, make: Callable[[], dict[str, F32]]) -> dict[str, F32]:
    """What `make` gives, or gave the last time for this key."""
    path = CACHE / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.npz"
    if not path.is_file():
        CACHE.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial.npz")
        np.savez(partial, **make())  # type: ignore[arg-type]
        partial.replace(path)
    with np.load(path) as found:
        return dict(found)


def embedded(encoder: object, dataset: Dataset, pattern: str, what: str) -> dict[str, F32]:
    """Both embeddings of an encoder, float32 `(N, D)`, of all images of one side."""
    manifest = encoder.manifest  # type: ignore[attr-defined]
    names = [name for name in manifest.outputs if name.endswith("_embedding")]

    def make() -> dict[str, F32]:
        parts = [encoder.run(p, names) for p in pixels_of(dataset, manifest.transform.crop, what)]  # type: ignore[attr-defined]
        return {name: np.concatenate([part[name] for part in parts]) for name in names}

    return kept(f"{manifest.sha256} {hash_of(pattern)} {len(dataset)}", make)


def first(dataset: Dataset, count: int | None) -> Dataset:
    assert dataset.labels is not None
    return Dataset(dataset.names[:count], dataset.labels[:count], dataset.class_names, dataset._content)


def judged(name: str, of: str, gallery: F32, labels: np.ndarray, queries: F32, truth: np.ndarray) -> Row:
    """Both probes of features `(N, ·)` and `(Q, ·)`."""
    unit = normalize(gallery.astype(np.float32)), normalize(queries.astype(np.float32))
    figures = evaluate(unit[0], labels, unit[1], truth)
    x, q = ({"": torch.from_numpy(side.astype(np.float32))} for side in (gallery, queries))
    best = probe_heads(x, torch.tensor(labels), q, torch.tensor(truth)).best
    knn = {str(k): share for k, share in figures.accuracy.items()}
    linear = best.test, wilson(round(best.test * len(truth)), len(truth))
    print(f"  {name}: 20-NN {knn['20']:.4f}, linear {best.test:.4f}", file=sys.stderr, flush=True)
    return Row(name, of, commit(), knn, figures.interval, *linear)


def rows_of(data: str, most: tuple[int | None, int | None], before: dict[str, Row]) -> Iterator[Row]:
    """Every baseline and every shipped encoder on one data set, whole or its first images. before: rows by `of`."""
    print(data, file=sys.stderr)
    patterns = DATASETS[data]
    train, test = (first(read_dataset(DATA / p), n) for p, n in zip(patterns, most, strict=True))
    sides = list(zip((train, test), patterns, strict=True))
    images = " ".join(f"{hash_of(pattern)} {len(dataset)}" for dataset, pattern in sides)

    def row(name: str, what: str, features: Callable[[], Sequence[F32]]) -> Row:
        of = hashlib.sha256(f"{what} {images}".encode()).hexdigest()[:24]
        if of in before:
            return before[of]._replace(name=name)
        assert train.labels is not None
        assert test.labels is not None
        gallery, queries = features()
        return judged(name, of, gallery, train.labels, queries, test.labels)

    def small() -> list[F32]:
        return [
            kept(
                f"32 px {hash_of(p)} {len(d)}",
                lambda d=d: {"pixels": np.concatenate(list(pixels_of(d, 32, f"{data}, 32 px")))},  # type: ignore[misc]
            )["pixels"]
            for d, p in sides
        ]

    for name, baseline in BASELINES.items():
        yield row(name, name, lambda baseline=baseline: baseline(*small()))  # type: ignore[misc]
    for name, encoder in load_encoders(ROOT / "model_repository").items():
        for output in [o for o in encoder.manifest.outputs if o.endswith("_embedding")]:
            kind = output.removesuffix("_embedding")
            star = ", recommended" if kind == encoder.manifest.recommended else ""
            yield row(
                f"{name} ({kind}{star})",
                f"{encoder.manifest.sha256} {output}",
                lambda e=encoder, n=name, o=output: [embedded(e, d, p, f"{data}, {n}")[o] for d, p in sides],  # type: ignore[misc]
            )


def main() -> None:
    quick = "--quick" in sys.argv[1:]
    results, most = ("encoders", QUICK) if quick else ("encoders_full", (None, None))
    found, begun = read(results), time.monotonic()
    before = {row.of: row for rows in found.values() for row in rows}
    for data in DATASETS:
        found[data] = list(rows_of(data, most, before))
        new = sum(row.of not in before for rows in found.values() for row in rows)
        minutes = round((time.monotonic() - begun) / 60, 1)
        rows = {name: [row._asdict() for row in each] for name, each in found.items()}
        save(results, {"last_run": {"minutes": minutes, "rows_measured": new}, **rows})
    for title, text in (("encoders", headline(found)), ("encoders_by_k", by_k(found))):
        print(text)
        if quick:
            publish(title, text)


def read(results: str) -> dict[str, list[Row]]:
    """The rows of each data set that were found so far."""
    path = ROOT / "benchmarks" / "results" / f"{results}.json"
    record = json.loads(path.read_text()) if path.is_file() else {}
    return {data: [Row(**row) for row in record.get(data, [])] for data in DATASETS}


def headline(rows: dict[str, list[Row]]) -> str:
    """20-NN and linear with their intervals: baselines, and each encoder by what it recommends; in the order of the
    first data set, best last."""
    lines = ["| 20-NN · linear, % | " + " | ".join(rows) + " |", "| --- |" + " --- |" * len(rows)]
    first = rows["cifar10"]
    shown = [i for i, row in enumerate(first) if row.name in BASELINES or row.name.endswith("recommended)")]
    for i in sorted(shown, key=lambda i: first[i].knn["20"]):
        cells = [f"{percent(r[i].knn['20'], r[i].knn_interval_95)} · {percent(r[i].linear, r[i].linear_interval_95)}"
                 for r in rows.values()]  # fmt: skip
        lines.append(f"| {first[i].name.replace(', recommended', '')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def percent(share: float, interval: tuple[float, float]) -> str:
    """With half the interval's width: 63.0 ± 0.9."""
    return f"**{100 * share:.1f}** ± {50 * (interval[1] - interval[0]):.1f}"


def by_k(rows: dict[str, list[Row]]) -> str:
    """One table a data set."""
    parts = []
    for data, found in rows.items():
        ks = list(found[0].knn)
        lines = [f"| {data}, k-NN, % | " + " | ".join(f"k = {k}" for k in ks) + " |", "| --- |" + " --- |" * len(ks)]
        lines += [f"| {r.name} | " + " | ".join(f"{100 * r.knn[k]:.1f}" for k in ks) + " |" for r in found]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
