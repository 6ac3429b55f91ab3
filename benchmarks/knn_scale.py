"""k-NN evaluation at ImageNet's size: 1,281,167 embeddings of 384 numbers in the gallery, 50,000 queries.

    python benchmarks/knn_scale.py                 # about 15 minutes on 2 cores, 4 GB; nothing else may run
    python benchmarks/knn_scale.py --share 0.05    # a gallery and queries of a twentieth each

Random unit vectors, with classes planted as directions; `protocol.evaluate` as `patchsight-knn` runs it, all k up to
200, beside what cannot be left out: FAISS's own exact search for 200 neighbors, all queries at once. Each arm in a
process of its own, in turns; memory is the peak of the process less what Python and its libraries take. Writes
`benchmarks/results/knn_scale.json` and the table in the docs.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

import faiss
import numpy as np
from measure import publish, save

from patchsight_serve.nearest import normalize_rows
from patchsight_serve.protocol import evaluate

GALLERY, QUERIES, D, CLASSES, ROUNDS = 1_281_167, 50_000, 384, 1000, 1
SIGNAL = 0.25  # of the planted direction, beside noise of length 1: neither all right nor all wrong


def planted(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit rows `(count, D)` and their classes; made in blocks, so that nothing but the rows takes memory."""
    directions = np.random.default_rng(0).standard_normal((CLASSES, D), np.float32) * np.float32(SIGNAL / D**0.5)
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, count)
    rows = np.empty((count, D), np.float32)
    for start in range(0, count, 65_536):
        part = labels[start : start + 65_536]
        rows[start : start + 65_536] = rng.standard_normal((len(part), D), np.float32) / np.float32(D**0.5)
        rows[start : start + 65_536] += directions[part]
    normalize_rows(rows)
    return rows, labels


def arm(name: str, share: float) -> dict[str, float]:
    """Seconds and peak MiB of one of the two, and what it found."""
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    gallery, labels = planted(int(GALLERY * share), 1)
    queries, truth = planted(int(QUERIES * share), 2)
    start = time.perf_counter()
    if name == "ours":
        figures = evaluate(gallery, labels, queries, truth)
        accuracy = figures.accuracy[20]
    else:
        _, rows = faiss.knn(queries, gallery, 200, metric=faiss.METRIC_INNER_PRODUCT)
        accuracy = float((labels[rows[:, 0]] == truth).mean())
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": seconds, "mib": peak - base, "accuracy": accuracy}


def in_a_process(name: str, share: float) -> dict[str, float]:
    line = [sys.executable, __file__, "--arm", name, "--share", str(share)]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    print(name, found, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=1.0, help="of gallery and queries")
    parser.add_argument("--arm", choices=("ours", "faiss"))
    given = parser.parse_args()
    if given.arm:
        print(json.dumps(arm(given.arm, given.share)))
        return
    rounds = [{name: in_a_process(name, given.share) for name in ("ours", "faiss")} for _ in range(ROUNDS)]
    ratios = sorted(r["ours"]["seconds"] / r["faiss"]["seconds"] for r in rounds)
    print(f"times FAISS: {ratios}")
    if given.share == 1.0:
        save("knn_scale", {"gallery": GALLERY, "queries": QUERIES, "dim": D, "rounds": rounds})
        publish("knn_scale", table(rounds, ratios))


def table(rounds: list[dict[str, Any]], ratios: list[float]) -> str:
    def median(name: str, key: str) -> float:
        return float(statistics.median(r[name][key] for r in rounds))

    return "\n".join(
        [
            "| | seconds | MiB |",
            "| --- | --- | --- |",
            f"| the whole protocol | {median('ours', 'seconds'):.0f} | {median('ours', 'mib'):.0f} |",
            f"| FAISS, the 200 nearest alone | {median('faiss', 'seconds'):.0f} | {median('faiss', 'mib'):.0f} |",
            f"| ratio | **{statistics.median(ratios):.2f}×** ({ratios[0]:.2f} to {ratios[-1]:.2f}) | |",
        ]
    )


if __name__ == "__main__":
    main()
