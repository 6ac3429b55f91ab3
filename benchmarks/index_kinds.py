"""Which approximate index for a large gallery: inverted lists of whole vectors, of quantised ones, or a graph (HNSW).

    python benchmarks/index_kinds.py     # about 5 minutes of one core

100,000 made-up vectors of 384 numbers in 2,000 clusters; 200 queries like them. Each index is searched with as little
work as gives 0.99 of the 10 nearest; what is quantised proposes 40, which are compared again exactly. Milliseconds and
seconds are of CPU, on one thread. Writes `benchmarks/results/index_kinds.json` and the table in docs/decisions.md.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import faiss
import numpy as np
from measure import publish, save

from patchsight_serve.nearest import F32, I64, normalize

LISTS, RECALL = 4, 0.99  # lists: times the square root of the vectors
N, D, CLUSTERS, QUERIES, K, PROPOSED = 100_000, 384, 2_000, 200, 10, 40
SPREAD = 1.0  # of a cluster, against the length of its center: kind to lists; at 2 there is hardly a cluster left


class Kind(NamedTuple):
    """make: an empty index. efforts: what a search may be asked to do, least first. params: for FAISS, of an effort."""

    make: Callable[[], Any]
    efforts: tuple[int, ...]
    params: Callable[[int], Any]
    exact: bool  # its scores are those of the vectors


def _inverted(inner: Callable[[Any, int], Any]) -> Callable[[], Any]:
    lists = int(LISTS * N**0.5)
    return lambda: inner(faiss.IndexFlatIP(D), lists)


def _quantised(kind: Any) -> Callable[[], Any]:
    return _inverted(lambda q, n: faiss.IndexIVFScalarQuantizer(q, D, n, kind, faiss.METRIC_INNER_PRODUCT))


def _probes(effort: int) -> Any:
    return faiss.SearchParametersIVF(nprobe=effort)  # type: ignore[call-arg]


PROBES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024)
EFFORTS = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048)
SQ: Any = faiss.ScalarQuantizer
KINDS = {
    "IVF, whole vectors": Kind(
        _inverted(lambda q, n: faiss.IndexIVFFlat(q, D, n, faiss.METRIC_INNER_PRODUCT)), PROBES, _probes, True
    ),
    "IVF, 16 bits": Kind(_quantised(SQ.QT_fp16), PROBES, _probes, False),
    "IVF, 8 bits": Kind(_quantised(SQ.QT_8bit), PROBES, _probes, False),
    "HNSW, 32 links": Kind(
        lambda: faiss.IndexHNSWFlat(D, 32, faiss.METRIC_INNER_PRODUCT),
        EFFORTS,
        lambda effort: faiss.SearchParametersHNSW(efSearch=effort),  # type: ignore[attr-defined]
        True,
    ),
}


def clustered(rng: np.random.Generator) -> tuple[F32, F32]:
    """Unit vectors `(N, D)` and queries."""
    centers = normalize(rng.standard_normal((CLUSTERS, D)).astype(np.float32))

    def some(count: int) -> F32:
        noise = normalize(rng.standard_normal((count, D)).astype(np.float32))
        return normalize(centers[rng.integers(CLUSTERS, size=count)] + SPREAD * noise)

    return some(N), some(QUERIES)


def found(index: Any, kind: Kind, effort: int, vectors: F32, queries: F32) -> Iterator[I64]:
    """For each query rows of its nearest, as a server would ask: one query at a time."""
    for query in queries:
        _, (rows,) = index.search(query[None], K if kind.exact else PROPOSED, params=kind.params(effort))
        rows = rows[rows >= 0]
        if not kind.exact:
            rows = rows[np.argsort(-(vectors[rows] @ query), kind="stable")[:K]]
        yield rows


def judge(kind: Kind, vectors: F32, queries: F32, truth: I64) -> dict[str, Any]:
    index = kind.make()
    start = time.process_time()
    index.train(vectors[: 50 * int(LISTS * N**0.5)])
    index.add(vectors)
    build_s = time.process_time() - start
    for effort in kind.efforts:
        start = time.process_time()
        rows = list(found(index, kind, effort, vectors, queries))
        spent = time.process_time() - start
        recall = np.mean([np.isin(own, mine).mean() for own, mine in zip(truth, rows, strict=True)])
        if recall >= RECALL:
            break
    return {
        "effort": effort, "recall_10": float(recall), "query_ms": 1000 * spent / len(queries), "build_s": build_s,
        "bytes_per_vector": faiss.serialize_index(index).nbytes / N, "deletes": _deletes(index),
    }  # fmt: skip


def _deletes(index: Any) -> bool:
    try:
        return bool(index.remove_ids(np.array([0], np.int64)) == 1)
    except RuntimeError:  # FAISS: not implemented for this type of index
        return False


def table(figures: dict[str, dict[str, Any]]) -> str:
    rows = ["| 100,000 × 384 | CPU ms a query | recall at 10 | build, CPU s | bytes a vector | deletes |"]
    rows.append("| --- " * 6 + "|")
    for name, f in figures.items():
        rows.append(
            f"| {name} | {f['query_ms']:.2f} | {f['recall_10']:.3f} | {f['build_s']:.0f} | "
            f"{f['bytes_per_vector']:,.0f} | {'yes' if f['deletes'] else 'no'} |"
        )
    return "\n".join(rows)


def main() -> None:
    faiss.omp_set_num_threads(1)
    vectors, queries = clustered(np.random.default_rng(0))
    start = time.process_time()
    truth = np.concatenate([faiss.knn(q[None], vectors, K, metric=faiss.METRIC_INNER_PRODUCT)[1] for q in queries])
    flat = {
        "effort": N, "recall_10": 1.0, "query_ms": 1000 * (time.process_time() - start) / QUERIES, "build_s": 0.0,
        "bytes_per_vector": 4.0 * D, "deletes": True,
    }  # fmt: skip
    figures = {"flat": flat}
    for name, kind in KINDS.items():
        figures[name] = judge(kind, vectors, queries, truth)
        print(name, figures[name], flush=True)
    save("index_kinds", {"vectors": N, "dim": D, "clusters": CLUSTERS, "queries": QUERIES, "kinds": figures})
    publish("index kinds", table(figures))


if __name__ == "__main__":
    main()
