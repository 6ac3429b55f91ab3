"""Queries to a contender of `gallery.py`: one after the other, or by many clients for a while, with a writer beside.

Needs numpy alone, as it runs in the contenders' environments.
"""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import process_tree
from gallery_peers.contender import DIM, F32, I64, TIERS, Contender, K, Search

WARM_UP = 20  # queries that do not count
WRITTEN, PAUSE_S = 10, 0.1  # vectors that a writer adds at once, and how often
NEW_KEYS = 10**12  # beyond all that were filled in; those of two writers differ by the clock


class Load(NamedTuple):
    """How a contender is asked. tier, by: as `Contender.client` has it."""

    effort: int
    tier: int | None = None
    by: str = ""


def recall(found: I64, truth: I64) -> float:
    """The share of the true keys `(N, K)` that was found `(N, K)`, in any order; −1 is no key, on both sides."""
    there = truth >= 0
    hits = (truth[:, :, None] == found[:, None, :]).any(axis=2) & there
    return float(hits.sum() / max(there.sum(), 1))


def percentiles(ms: list[float] | F32) -> dict[str, float]:
    """In three digits."""
    return {f"p{share}_ms": float(f"{np.percentile(ms, share):.3g}") for share in (50, 99)}


def ask(search: Search, queries: F32, seconds: float) -> tuple[I64, list[float]]:
    """Each query once, or as many as the time allows: keys `(n, K)`, −1 where fewer were found, and ms."""
    keys, ms, deadline = np.full((len(queries), K), -1, np.int64), [], time.perf_counter() + seconds
    for number, query in enumerate(queries):
        began = time.perf_counter()
        found = search(query)
        ended = time.perf_counter()
        ms.append(1000 * (ended - began))
        keys[number, : len(found)] = found
        if ended > deadline:
            break
    return keys[: len(ms)], ms


def ask_once(contender: Contender, load: Load, queries: F32, truth: I64, seconds: float) -> dict[str, Any]:
    """recall, p50_ms, p99_ms, and how many were asked."""
    with contender.client(*load) as search:
        ask(search, queries[:WARM_UP], seconds / 4)
        keys, ms = ask(search, queries, seconds)
    return {"recall": round(recall(keys, truth[: len(keys)]), 4), **percentiles(ms), "queries": len(ms)}


def ask_on(
    contender: Contender, load: Load, queries: F32, clients: int, seconds: float, writes: bool = False
) -> dict[str, Any]:
    """So many clients, each with one query after the other. CPU is of all that the contender runs in, clients and
    writer included."""

    def client(number: int) -> list[float]:
        mine, ms = np.roll(queries, -number * len(queries) // clients, axis=0), []
        with contender.client(*load) as search:
            ask(search, mine[:WARM_UP], seconds / 4)
            ready.wait()
            deadline = time.perf_counter() + seconds
            while (left := deadline - time.perf_counter()) > 0:
                ms += ask(search, mine, left)[1]
        return ms

    ready = threading.Barrier(clients + 1)
    with writing(contender) if writes else nullcontext([0]) as written, ThreadPoolExecutor(clients) as pool:
        work = [pool.submit(client, number) for number in range(clients)]
        for each in work:
            each.add_done_callback(lambda done: ready.abort() if done.exception() else None)
        try:
            ready.wait()
        except threading.BrokenBarrierError:
            raise next(error for each in work if (error := each.exception())) from None
        before, cpu, began = written[0], cpu_s(contender), time.perf_counter()
        ms = [one for each in work for one in each.result()]
        cpu, took, added = cpu_s(contender) - cpu, time.perf_counter() - began, written[0] - before
    figures = percentiles(ms) | {"per_s": round(len(ms) / took, 1), "cpu_ms": round(1000 * cpu / len(ms), 3)}
    return figures | {"written_per_s": round(added / took, 1)} if writes else figures


@contextmanager
def writing(contender: Contender) -> Iterator[list[int]]:
    """WRITTEN vectors of random directions are added every PAUSE_S while the block runs; how many so far, in a list of
    one."""
    rng, over, written = np.random.default_rng(), threading.Event(), [0]
    first = NEW_KEYS + int(1000 * time.time()) * 1000

    def write() -> None:
        while not over.wait(max(0.0, began + PAUSE_S * (written[0] // WRITTEN) - time.perf_counter())):
            vectors = rng.standard_normal((WRITTEN, DIM), np.float32)
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
            keys = first + written[0] + np.arange(WRITTEN)
            contender.add(keys, vectors, np.full(WRITTEN, TIERS, np.int64))
            written[0] += WRITTEN

    with ThreadPoolExecutor(1) as pool:
        began = time.perf_counter()
        work = pool.submit(write)
        try:
            yield written
        finally:
            over.set()
        work.result()


def cpu_s(contender: Contender) -> float:
    return sum(map(process_tree.cpu_seconds, contender.pids()))


def memory_mb(contender: Contender) -> float:
    return sum(map(process_tree.memory_mb, contender.pids()))
