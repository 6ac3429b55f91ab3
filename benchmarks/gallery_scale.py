"""What a gallery costs as it grows: CPU time, memory and disk for each image, measured at a few sizes.

    python benchmarks/gallery_scale.py                    # about 15 minutes, 5 GB of disk, 3 GB of memory
    python benchmarks/gallery_scale.py --counts 20000     # a trial

Made-up vectors of 384 numbers in 5,000 clusters, without pictures, in batches of 1,000, each durable; then the server's
gallery is opened in a new process, and asked for the neighbors of 200 of its images, by one thread. Seconds are of
CPU. Writes `benchmarks/results/gallery_scale.json` and the table in docs/scale.md, from which the plan there is drawn.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gallery_peers.contender import DIM
from measure import publish, save

from patchsight_serve.embedded_gallery import EmbeddedGallery
from patchsight_serve.item import Identity, Item, NewVector
from patchsight_serve.nearest import normalize

COUNTS = (62_000, 250_000, 1_000_000)
BATCH, CLUSTERS, QUERIES, SPREAD, K = 1000, 5000, 200, 0.7, 10


def batches(count: int) -> Iterator[list[NewVector]]:
    rng = np.random.default_rng(0)
    centers = normalize(rng.standard_normal((CLUSTERS, DIM), np.float32))
    for start in range(0, count, BATCH):
        noise = SPREAD / DIM**0.5 * rng.standard_normal((BATCH, DIM), np.float32)
        vectors = normalize(centers[rng.integers(0, CLUSTERS, BATCH)] + noise)
        yield [NewVector(Item(f"i{start + i:08d}"), None, vector) for i, vector in enumerate(vectors)]


def fill(folder: Path, count: int) -> dict[str, Any]:
    """CPU seconds of adding, with what is built meanwhile; of what is built after it; bytes of the files."""
    gallery = EmbeddedGallery(folder / "g")
    began = time.process_time()
    for batch in batches(count):
        gallery.add_vectors(lambda batch=batch: [batch], Identity("made up", "0" * 64))  # type: ignore[misc]
    added = time.process_time()
    while gallery.index.building:
        time.sleep(0.2)
    built = time.process_time()
    gallery.close()
    sizes = {path.suffix[1:]: path.stat().st_size for path in (folder / "g").iterdir() if path.stat().st_size}
    return {"add_cpu_s": added - began, "rest_cpu_s": built - added, "bytes": sizes}


def ask(folder: Path, count: int) -> dict[str, Any]:
    """CPU seconds of opening, resident bytes that came with it, CPU ms of a search."""
    before, began = _resident(), time.process_time()
    gallery = EmbeddedGallery(folder / "g")
    opened = time.process_time()
    queries = gallery.vectors([f"i{i:08d}" for i in range(0, count, count // QUERIES)])
    begin = time.process_time()
    for query in queries:
        gallery.neighbors(query, K)
    spent = time.process_time() - begin
    state = gallery.index
    return {
        "open_cpu_s": opened - began, "query_ms": 1000 * spent / len(queries), "index": state._asdict(),
        "resident": _resident() - before, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before,
    }  # fmt: skip


def _resident() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmRSS")).split()[1])


def measured(count: int) -> dict[str, Any]:
    """Both, each in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        figures: dict[str, Any] = {"count": count}
        for verb in ("fill", "ask"):
            line = [sys.executable, __file__, "--arm", verb, "--folder", folder, "--counts", str(count)]
            figures |= json.loads(subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True).stdout)
            print(count, verb, figures, flush=True)
    return figures


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| images | adding, CPU µs each | codes, CPU s after the last add | record, bytes each | index file "
        "| memory, bytes each (× vector) | start, CPU µs each | a search, CPU ms | lists visited |",
        "| --- " * 9 + "|",
    ]
    for r in rows:
        n, index = r["count"], r["index"]
        visited = f"{index['probes']} of {index['lists']:,}" if index["kind"] == "ivf" else "all is compared"
        lines.append(
            f"| {n:,} | {1e6 * r['add_cpu_s'] / n:.0f} | {r['rest_cpu_s']:.0f} | {r['bytes']['sqlite'] / n:,.0f} "
            f"| {r['bytes'].get('index', 0) / n:,.0f} | {r['resident'] / n:,.0f} ({r['resident'] / n / DIM / 4:.2f}) "
            f"| {1e6 * r['open_cpu_s'] / n:.0f} | {r['query_ms']:.1f} | {visited} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=list(COUNTS), help="images, a multiple of 1,000")
    parser.add_argument("--dry", action="store_true", help="neither save nor publish")
    parser.add_argument("--arm", choices=("fill", "ask"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.arm:
        print(json.dumps({"fill": fill, "ask": ask}[given.arm](given.folder, given.counts[0])))
        return
    rows = [measured(count) for count in given.counts]
    print(table(rows))
    if not given.dry:
        save("gallery_scale", {"dim": DIM, "rows": rows})
        publish("gallery_scale", table(rows))


if __name__ == "__main__":
    main()
