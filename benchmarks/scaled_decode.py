"""What does decoding a JPEG at a part of its size move, and what does it save?

    python benchmarks/scaled_decode.py     # three minutes on one core

`--scaled-decode` keeps at least twice the pixels that the resizing makes, and 160 of the shorter side. The labelled
photos here have shorter sides of 160, so that by that rule they would be decoded whole; the first table therefore keeps
64 pixels for an encoder of 32, which is the rule's worst case: the cosine of its embeddings to those of whole photos,
and DINO's 20-NN with gallery and queries both decoded the one way, the other, and mixed. The second table is CPU time
of one decode on one thread, of photos enlarged to the megapixels that it names, for an encoder of 64 pixels.
Writes `benchmarks/results/scaled_decode.json` and the tables in docs.
"""

import io
import statistics
import time
from typing import Any

import numpy as np
from measure import DATA, ROOT, publish, save
from PIL import Image

from patchsight_serve.dataset import Dataset, read_dataset
from patchsight_serve.decode import decode, fit, open_rgb
from patchsight_serve.manifest import Transform
from patchsight_serve.nearest import F32, normalize
from patchsight_serve.ort_encoder import OrtEncoder
from patchsight_serve.protocol import evaluate

ENCODER = "simclr-vit-tiny-cifar10-long"
SETS = ("caltech101", "clothing10")
BATCH, K = 64, 20
MEGAPIXELS = (0.2, 2.0, 12.0)
ROUNDS = 5


def embedded(encoder: OrtEncoder, dataset: Dataset, least_side: int | None) -> F32:
    """Recommended embeddings `(N, D)` of length 1, of pictures that keep so much of their shorter side."""
    name, transform = f"{encoder.manifest.recommended}_embedding", encoder.manifest.transform
    rows: list[F32] = []
    for start in range(0, len(dataset), BATCH):
        photos = [dataset.read(i) for i in range(start, min(start + BATCH, len(dataset)))]
        pixels = np.stack([fit(open_rgb(photo, least_side=least_side), transform) for photo in photos])
        rows.append(encoder.run(pixels, [name])[name])
    return normalize(np.concatenate(rows))


def moved(encoder: OrtEncoder, name: str) -> dict[str, Any]:
    gallery, queries = read_dataset(DATA / name / "train.parquet"), read_dataset(DATA / name / "test.parquet")
    labels, truth = gallery.labels, queries.labels
    assert labels is not None
    assert truth is not None
    least = 2 * encoder.manifest.transform.resize
    whole = embedded(encoder, gallery, None), embedded(encoder, queries, None)
    part = embedded(encoder, gallery, least), embedded(encoder, queries, least)
    cosines = (whole[1] * part[1]).sum(axis=1)

    def accuracy(vectors: F32, asked: F32) -> float:
        return evaluate(vectors, labels, asked, truth).accuracy[K]

    return {
        "queries": len(queries),
        "cosine, median": float(np.median(cosines)),
        "cosine, least": float(cosines.min()),
        "20-NN whole": accuracy(*whole),
        "20-NN part": accuracy(*part),
        "20-NN whole gallery, part queries": accuracy(whole[0], part[1]),
    }


def enlarged(photo: bytes, megapixels: float) -> bytes:
    picture, out = open_rgb(photo), io.BytesIO()
    scale = (megapixels * 1e6 / (picture.width * picture.height)) ** 0.5
    size = round(picture.width * scale), round(picture.height * scale)
    picture.resize(size, Image.Resampling.LANCZOS).save(out, "JPEG", quality=90)
    return out.getvalue()


def milliseconds(photos: list[bytes], transform: Transform) -> float:
    """CPU time of one decode: the median over rounds."""
    rounds = []
    for _ in range(ROUNDS):
        start = time.thread_time()
        for photo in photos:
            decode(photo, transform)
        rounds.append(1000 * (time.thread_time() - start) / len(photos))
    return statistics.median(rounds)


def main() -> None:
    encoder = OrtEncoder(ROOT / "model_repository" / ENCODER, threads=1)
    figures = {name: moved(encoder, name) for name in SETS}
    for name, values in figures.items():
        print(name, values, flush=True)
    dataset = read_dataset(DATA / "clothing10" / "test.parquet")
    whole, part = Transform(resize=64, crop=64), Transform(decoder="pillow-scaled", resize=64, crop=64)
    speeds = {}
    for size in MEGAPIXELS:
        photos = [enlarged(dataset.read(i), size) for i in range(8)]
        speeds[f"{size:g}"] = {"whole": milliseconds(photos, whole), "part": milliseconds(photos, part)}
        print(size, speeds[f"{size:g}"], flush=True)
    save("scaled_decode", {"encoder": ENCODER, "moved": figures, "cpu_ms_by_megapixels": speeds})
    head = (
        "| | cosine, median | least | 20-NN, whole | 20-NN, scaled | gallery whole, queries scaled |\n|" + " --- |" * 6
    )
    rows = [
        f"| {name} | {v['cosine, median']:.4f} | {v['cosine, least']:.4f} | {v['20-NN whole']:.3f} | "
        f"{v['20-NN part']:.3f} | {v['20-NN whole gallery, part queries']:.3f} |"
        for name, v in figures.items()
    ]
    times = "| megapixels | CPU ms, whole | CPU ms, scaled | times as fast |\n| --- | --- | --- | --- |"
    cost = [
        f"| {size} | {v['whole']:.1f} | {v['part']:.1f} | {v['whole'] / v['part']:.1f} |" for size, v in speeds.items()
    ]
    publish("scaled_decode", "\n".join([head, *rows, "", times, *cost]))


if __name__ == "__main__":
    main()
