"""One contender of `gallery.py`, filled or asked, in a process and an environment of its own: needs numpy and itself.

    python benchmarks/gallery_arm.py faiss_lists fill runs/gallery/20000/faiss_lists runs/gallery/20000 15

The last is the seconds that each measurement takes. Prints one line of JSON.
"""

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import process_tree
from gallery_load import Load, ask_on, ask_once, cpu_s, memory_mb
from gallery_peers.contender import BATCH, SHARES, Contender, tier_of, tiers

ENOUGH = 0.99  # recall at 10
HALVES = ("made up", "real")  # of the queries
LADDER = 4  # times as long as another measurement may each half take at each effort; then the queries so far count


class Arm(NamedTuple):
    """place: module and class. environment: a peer's, of peer_environment.py; None: ours. filled: by which arm."""

    label: str
    place: str
    environment: str | None = None
    filled: str | None = None

    def load(self) -> Callable[[Path, int], Contender]:
        module, _, name = self.place.partition(":")
        found: Callable[[Path, int], Contender] = getattr(importlib.import_module(f"gallery_peers.{module}"), name)
        return found


ARMS = {
    "patchsight": Arm("patchsight", "patchsight_gallery:Patchsight"),
    "patchsight_exact": Arm("patchsight, exact", "patchsight_gallery:PatchsightExact", filled="patchsight"),
    "faiss_lists": Arm("FAISS, lists", "bare_faiss:FaissLists"),
    "faiss_codes": Arm("FAISS, lists of codes", "bare_faiss:FaissCodes"),
    "faiss_flat": Arm("FAISS, exact", "bare_faiss:BareFaiss"),
    "usearch": Arm("usearch", "usearch_hnsw:Usearch", "usearch"),
    "milvus_lite": Arm("milvus-lite", "milvus_lite_hnsw:MilvusLite", "milvus_lite"),
    "pgvector": Arm("pgvector", "pgvector_hnsw:Pgvector", "pgvector"),
}


def fill(kind: Callable[[Path, int], Contender], folder: Path, data: Path) -> dict[str, Any]:
    """Seconds, CPU seconds and bytes of the disk, of an empty folder."""
    folder.mkdir(parents=True)
    vectors = np.load(data / "vectors.npy", mmap_mode="r")
    contender = kind(folder, len(vectors))
    began, cpu = time.perf_counter(), cpu_s(contender)
    for start in range(0, len(vectors), BATCH):
        part = np.array(vectors[start : start + BATCH])
        keys = np.arange(start, start + len(part))
        contender.add(keys, part, tiers(keys))
    added, added_cpu = time.perf_counter(), cpu_s(contender)
    contender.finish()
    figures = {
        "kept": contender.kept,
        "version": contender.version(),
        "add_s": round(added - began, 2),
        "add_cpu_s": round(added_cpu - cpu, 2),
        "finish_s": round(time.perf_counter() - added, 2),
        "finish_cpu_s": round(cpu_s(contender) - added_cpu, 2),
    }
    contender.close()
    figures["bytes"] = sum(file.stat().st_blocks * 512 for file in folder.rglob("*") if file.is_file())
    return figures


def ask(kind: Callable[[Path, int], Contender], folder: Path, data: Path, seconds: float) -> dict[str, Any]:
    """Cold start, memory, what each effort finds, latency without and with a writer, filters. The writer comes last:
    all else is of the vectors that were filled in."""
    queries, truth = np.load(data / "queries.npy"), dict(np.load(data / "truth.npz"))
    count = len(np.load(data / "vectors.npy", mmap_mode="r"))
    before, began = process_tree.memory_mb(os.getpid()), time.perf_counter()
    contender = kind(folder, count)
    with contender.client(contender.efforts[0], None, "") as search:
        search(queries[0])
        cold_s = time.perf_counter() - began
        contender.settle()
        search(queries[0])
    figures: dict[str, Any] = {"cold_s": round(cold_s, 2), "ready_s": round(time.perf_counter() - began, 2)}
    figures["ladder"] = ladder(contender, queries, truth["all"], LADDER * seconds)
    figures["memory_mb"] = round(memory_mb(contender) - before)
    figures["efforts"] = {half: enough(figures["ladder"], half) for half in HALVES}
    load = Load(figures["efforts"]["real"])
    figures["alone"] = {
        half: ask_on(contender, load, some, 1, seconds) for half, some in zip(HALVES, np.split(queries, 2), strict=True)
    }
    figures["filters"] = {by: filtered(contender, load.effort, by, queries, truth, seconds) for by in contender.filters}
    figures["writes"] = contender.writes
    for clients in (1, 16):
        figures[f"clients_{clients}"] = ask_on(contender, load, queries, clients, seconds, contender.writes)
    contender.close()
    return figures


def ladder(contender: Contender, queries: np.ndarray, truth: np.ndarray, seconds: float) -> list[dict[str, Any]]:
    """Efforts from the least on, until both halves find enough."""
    steps: list[dict[str, Any]] = []
    for effort in contender.efforts:
        halves = zip(HALVES, np.split(queries, 2), np.split(truth, 2), strict=True)
        found = {name: ask_once(contender, Load(effort), some, true, seconds) for name, some, true in halves}
        steps.append({"effort": effort, **found})
        print(steps[-1], file=sys.stderr, flush=True)
        if all(half["recall"] >= ENOUGH for half in found.values()):
            break
    return steps


def enough(steps: list[dict[str, Any]], half: str) -> int:
    """The least effort that finds enough of a half; where none does, the one that finds most."""
    well = [step for step in steps if step[half]["recall"] >= ENOUGH]
    return int(well[0]["effort"] if well else max(steps, key=lambda step: float(step[half]["recall"]))["effort"])


def filtered(
    contender: Contender, effort: int, by: str, queries: np.ndarray, truth: dict[str, np.ndarray], seconds: float
) -> dict[str, Any]:
    """For each share, of both halves in turn, as many as the time allows."""
    mixed = np.arange(len(queries)).reshape(2, -1).T.ravel()
    return {
        share: ask_once(contender, Load(effort, tier_of(share), by), queries[mixed], truth[share][mixed], seconds)
        for share in SHARES
    }


def main() -> None:
    name, verb, folder, data, seconds = sys.argv[1:]
    kind, places = ARMS[name].load(), (Path(folder), Path(data))
    print(json.dumps(fill(kind, *places) if verb == "fill" else ask(kind, *places, float(seconds))))


if __name__ == "__main__":
    main()
