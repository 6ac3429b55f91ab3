"""A million vectors for `gallery.py`: half made up in clusters, half real embeddings repeated with noise.

Of the made-up half every query has ten planted neighbors. Of the real half the queries are other images than those
that are repeated. Each vector has a number by which filters choose; what is nearest is found by brute force.
"""

import subprocess
import sys
from pathlib import Path

import faiss
import numpy as np
import pyarrow.parquet as pq
from gallery_peers.contender import DIM, SHARES, K
from measure import DATA

from patchsight_serve.nearest import normalize_rows

QUERIES = 250  # of each half
CENTERS, SPREAD = 5000, 0.7  # of the made-up clusters; the length of what is added to a center of length 1
PLANTED, NEAR = 10, 0.2  # of each made-up query, and how far they are
NOISE = 0.2  # on a real embedding of length 1


def prepare(runs: Path, count: int) -> Path:
    """The folder `<runs>/<count>` with `vectors.npy` float32 `(count, DIM)`, `queries.npy` `(2 · QUERIES, DIM)`, the
    made-up ones first, and `truth.npz`: for all, and for each of SHARES, the row numbers of the K nearest, int64
    `(2 · QUERIES, K)`, −1 where there are fewer. count: 2 · QUERIES · PLANTED at least. It takes twice the vectors in
    memory."""
    folder = runs / str(count)
    if (folder / "truth.npz").exists():  # the last that is written
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    vectors = np.empty((count, DIM), np.float32)
    clustered = _clustered(vectors[: count // 2], rng)
    real = _repeated(vectors[count // 2 :], real_embeddings(runs / "real.parquet"), rng)
    order = rng.permutation(count)  # the halves side by side in time, as an archive grows
    vectors = vectors[order]
    queries = np.concatenate([clustered, real])
    np.save(folder / "vectors.npy", vectors)
    np.save(folder / "queries.npy", queries)
    truth = {"all": nearest(vectors, queries, np.arange(count))}
    truth |= {name: nearest(vectors, queries, np.arange(0, count, every)) for name, every in SHARES.items()}
    np.savez(folder / "truth.new.npz", allow_pickle=False, **truth)
    (folder / "truth.new.npz").rename(folder / "truth.npz")
    return folder


def real_embeddings(file: Path) -> np.ndarray:
    """Of Tiny ImageNet's 10,000 test images, by the encoder that ships as the default: unit rows. Ten minutes of CPU
    where the file is not there."""
    if not file.exists():
        command = [str(Path(sys.executable).with_name("patchsight-embed")), "--out", str(file)]
        subprocess.run([*command, str(DATA / "tiny_imagenet" / "test.parquet")], check=True)
    column = pq.read_table(file, columns=["embedding"])["embedding"].combine_chunks()
    rows = np.array(column.flatten(), dtype=np.float32).reshape(len(column), -1)
    assert rows.shape[1] == DIM, f"{file}: embeddings of {rows.shape[1]} numbers, not of {DIM}"
    normalize_rows(rows)
    return rows


def _clustered(out: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Fill `out`; the queries."""
    centers = _unit_noise(CENTERS, rng)
    for start in range(0, len(out), 65_536):
        part = out[start : start + 65_536]
        part[:] = centers[rng.integers(0, CENTERS, len(part))] + SPREAD * _unit_noise(len(part), rng)
    normalize_rows(out)
    queries = out[rng.choice(len(out), QUERIES, replace=False)]
    places = rng.choice(len(out), (QUERIES, PLANTED), replace=False)
    for query, place in zip(queries, places, strict=True):
        out[place] = query + NEAR * _unit_noise(PLANTED, rng)
    normalize_rows(out)
    return queries


def _repeated(out: np.ndarray, real: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Fill `out`; the queries, which are none of what is repeated."""
    order = rng.permutation(len(real))
    queries, repeated = real[order[:QUERIES]], real[order[QUERIES:]]
    for start in range(0, len(out), 65_536):
        part = out[start : start + 65_536]
        part[:] = repeated[np.arange(start, start + len(part)) % len(repeated)] + NOISE * _unit_noise(len(part), rng)
    normalize_rows(out)
    return queries


def _unit_noise(count: int, rng: np.random.Generator) -> np.ndarray:
    noise = rng.standard_normal((count, DIM), np.float32)
    normalize_rows(noise)
    return noise


def nearest(vectors: np.ndarray, queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Of the rows given, the K nearest to each query, best first, by brute force."""
    found = np.full((len(queries), K), -1, np.int64)
    chosen = vectors if len(rows) == len(vectors) else np.ascontiguousarray(vectors[rows])
    _, places = faiss.knn(queries, chosen, min(K, len(rows)), metric=faiss.METRIC_INNER_PRODUCT)
    found[:, : places.shape[1]] = rows[places]
    return found
