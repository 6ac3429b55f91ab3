"""How fast, how steady and how polite under overload: patchsight and the same ONNX file behind five other servers.

    python benchmarks/serving.py                  # 18 minutes; needs two cores and nobody else on them
    python benchmarks/serving.py --quick          # 4 minutes, one round
    python benchmarks/serving.py --servers ours fastapi

A server at a time has core 0; the clients have core 1. All get the same photos (photo_mix.py), decode them with the
same code, and run the same graph with one thread (peers/bare_encoder.py); each is written as its own documentation
advises, in an environment of its own (`.peers/`), with the same largest batch and, where it knows such a limit, the
same number of images in work. Rounds go through all servers in turn. docs/serving.md says what each figure means.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import load_generator
import numpy as np
import openvino
import photo_mix
import process_tree
from contenders import APPS, CONTENDERS, Contender, Terms
from load_generator import PATIENCE_S, closed_loop, open_loop, poisson
from measure import ROOT, publish, save
from peer_environment import PACKAGES, version_of
from peers.bare_encoder import BareEncoder
from pinned_server import pinned, running, stand_aside
from serving_record import LIMIT_S, Offered, Record, Saturated
from serving_report import draw, tables
from triton_process import free_port

from patchsight_serve.openvino_encoder import capabilities

OVERLOADS = (2, 10)  # times saturation
BATCH, QUEUE = 4, 16  # most images of a batch, and most in work; one core gains nothing by more
LEAST_COSINE = 0.999
FAILURES = (RuntimeError, OSError, subprocess.SubprocessError)
DISTINCT = 400  # more than are under way at any time: patchsight computes equal files once, and shall not gain by it


@dataclass(frozen=True)
class Plan:
    """Seconds of each part, for each server in each round. own: shares of its saturation that are offered. common: of
    patchsight's."""

    rounds: int
    connections: tuple[int, ...]
    own: tuple[float, ...]
    common: tuple[float, ...]
    closed_s: float
    open_s: float
    overload_s: float


FULL = Plan(2, (1, 8, 32), own=(0.5, 0.8), common=(0.8, 0.95, 1.1), closed_s=3.5, open_s=6.5, overload_s=6.0)
QUICK = Plan(1, (1, 16), own=(0.8,), common=(0.8,), closed_s=2.0, open_s=3.0, overload_s=4.0)


@dataclass(frozen=True)
class Target:
    """A server that runs."""

    url: str
    pid: int
    requests: list[bytes]

    def saturate(self, connections: int, seconds: float) -> Saturated:
        cpu, began = process_tree.cpu_seconds(self.pid), time.perf_counter()
        replies = load_generator.run(closed_loop(self.url, self.requests, connections, seconds))
        took, cpu = time.perf_counter() - began, process_tree.cpu_seconds(self.pid) - cpu
        good = sum(reply.status == 200 for reply in replies)
        return Saturated(good / took, 1000 * cpu / max(good, 1), len(replies) - good)

    def offer(self, rate: float, seconds: float, seed: int) -> Offered:
        due = poisson(rate, seconds, seed)
        with process_tree.MemoryPeak(self.pid) as peak:
            replies = load_generator.run(open_loop(self.url, self.requests, due))
        return Offered(rate, seconds, replies, peak.mb)

    def settle(self) -> None:
        """Wait, a while, until nothing is left of what was asked before."""
        deadline = time.monotonic() + 15
        while time.monotonic() < deadline:
            (reply,) = load_generator.run(open_loop(self.url, self.requests[:1], [0.0]))
            if reply.status == 200 and reply.seconds < 0.3:
                return
            time.sleep(0.3)


def visit(target: Target, plan: Plan, record: Record, ours: Record | None, seed: int) -> None:
    """All parts of one round, with one server."""
    target.saturate(4, 1.5)  # warms up
    for connections in plan.connections:
        record.closed.setdefault(connections, []).append(target.saturate(connections, plan.closed_s))
    loads = {f"{share:.0%} of its own": share * record.first_peak for share in plan.own}
    if ours is not None:
        loads |= {f"{share:.0%} of patchsight's": share * ours.first_peak for share in plan.common}
    for name, rate in loads.items():
        target.settle()
        record.open.setdefault(name, []).append(target.offer(rate, plan.open_s, seed))
    for times in OVERLOADS:
        target.settle()
        offered = target.offer(times * record.first_peak, plan.overload_s, seed)
        record.overload.setdefault(times, []).append(offered)


@contextmanager
def started(
    contender: Contender, terms: Terms, photos: list[bytes], wanted: "np.ndarray[Any, Any]"
) -> Iterator[tuple[Target, float]]:
    """The server, until the block ends, and the cosine of its first embedding with the bare encoder's.

    Raises one of FAILURES where it does not start, or embeds otherwise.
    """
    requests = [contender.request(photo) for photo in photos]
    url, command = f"http://127.0.0.1:{terms.port}", contender.command(terms)
    with running(command, terms.environment(), url, requests[0], terms.scratch / "log") as (pid, answer):
        same = cosine(answer, wanted)
        if same < LEAST_COSINE:
            raise RuntimeError(f"its embedding is another: cosine {same:.4f}")
        yield Target(url, pid, requests), same


def attempt(name: str, contender: Contender, plan: Plan, terms: Terms, record: Record, **rest: Any) -> None:
    """A round with one server; what goes wrong is its record's failure."""
    photos, wanted = rest.pop("photos"), rest.pop("wanted")
    try:
        record.version = version_of(name) if name in PACKAGES else ""
        with started(contender, terms, photos, wanted) as (target, record.cosine):
            visit(target, plan, record, **rest)
    except FAILURES as error:
        record.failure = " ".join(str(error).split())
        print(f"{record.label}: {record.failure}", flush=True)


def bare_embedding(bundle: Path, photo: bytes) -> "np.ndarray[Any, Any]":
    """What every server has to answer to the photo, `(D,)`."""
    encoder = BareEncoder(bundle)
    embedding: np.ndarray[Any, Any] = encoder.embed([encoder.pixels(photo)])[0]
    return embedding


def cosine(answer: bytes, wanted: "np.ndarray[Any, Any]") -> float:
    """Of an answer's numbers, JSON or the last bytes of a binary reply, with the bare encoder's."""
    try:
        numbers = np.ravel(_values(json.loads(answer)))
    except ValueError:
        numbers = np.frombuffer(answer[-4 * wanted.size :], "<f4")
    return float(numbers @ wanted / (np.linalg.norm(numbers) * np.linalg.norm(wanted)))


def _values(content: Any) -> Any:
    return content["embedding"] if isinstance(content, dict) else content


def bound(bundle: Path, photos: list[bytes]) -> dict[int, float]:
    """CPU ms of an image without any server, on the server's core, by batch size."""
    with TemporaryDirectory() as folder:
        for i, photo in enumerate(photos):
            (Path(folder) / f"{i:04}.jpg").write_bytes(photo)
        environment = os.environ | {"PEER_BUNDLE": str(bundle), "PYTHONPATH": str(ROOT / "serve")}
        line = pinned([sys.executable, str(APPS / "bare_encoder.py"), folder])
        out = subprocess.run(line, env=environment, capture_output=True, text=True, check=True).stdout
    return {int(size): ms for size, ms in json.loads(out).items()}


def measure(names: list[str], plan: Plan, bundle: Path, batch: int, queue: int) -> dict[str, Any]:
    """All rounds; the figures."""
    photos = photo_mix.distinct(DISTINCT)
    wanted = bare_embedding(bundle, photos[0])
    records = {name: Record(CONTENDERS[name].label) for name in names}
    bounds: list[dict[int, float]] = []
    for number in range(plan.rounds):
        bounds.append(bound(bundle, photos[: photo_mix.COUNT]))
        print(f"bare encoder, CPU ms by batch size: {bounds[-1]}", flush=True)
        for name, record in records.items():
            if record.failure is not None:
                continue
            with TemporaryDirectory(prefix="s", ignore_cleanup_errors=True) as folder:
                terms = Terms(bundle, batch, queue, free_port(), Path(folder))
                ours = records.get("ours")
                attempt(name, CONTENDERS[name], plan, terms, record, photos=photos, wanted=wanted,
                        ours=None if ours is None or ours.failure else ours, seed=number)  # fmt: skip
            tell(record)
    by_size = {size: round(median(each[size] for each in bounds), 2) for size in bounds[0]}
    return {
        "encoder": bundle.name,
        "plan": vars(plan),
        "terms": {"batch": batch, "queue": queue, "limit_s": LIMIT_S},
        "patience_s": PATIENCE_S,
        "bare_cpu_ms": by_size,
        "bound_cpu_ms": min(by_size.values()),
        "servers": {name: record.figures() for name, record in records.items()},
        "load_average_at_the_end": round(os.getloadavg()[0], 1),
    }


def usual() -> list[str]:
    """All servers; bf16 only where the processor has it."""
    has_bf16 = "BF16" in capabilities(openvino.Core())
    return [name for name in CONTENDERS if name != "bf16" or has_bf16]


def tell(record: Record) -> None:
    if record.failure is None:
        last = record.closed[record.saturation][-1]
        overload = ", ".join(f"{record.figures()['overload'][t]['goodput_of_peak']:.0%} at {t}x" for t in OVERLOADS)
        print(
            f"{record.label}: {last.rate:.1f} images/s, {last.cpu_ms:.1f} CPU ms each; goodput {overload}", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--servers", nargs="+", choices=list(CONTENDERS), default=usual())
    parser.add_argument("--encoder", default="simclr-vit-tiny-photos")
    parser.add_argument("--batch", type=int, default=BATCH, help="most images of a batch")
    parser.add_argument("--queue", type=int, default=QUEUE, help="most images in work, where a server can be told")
    parser.add_argument("--rounds", type=int, default=FULL.rounds, help="of the full plan, 8 minutes each")
    parser.add_argument("--quick", action="store_true", help="one short round, which is neither saved nor published")
    arguments = parser.parse_args()
    stand_aside()
    names = sorted(arguments.servers, key=list(CONTENDERS).index)  # ours first: its rates are loads for the others
    bundle = ROOT / "model_repository" / arguments.encoder
    figures = measure(
        names,
        QUICK if arguments.quick else replace(FULL, rounds=arguments.rounds),
        bundle,
        arguments.batch,
        arguments.queue,
    )
    print(tables(figures))
    if not arguments.quick:
        save("serving", figures)
        publish("serving", tables(figures))
        draw(figures, ROOT / "docs" / "images" / "serving.png")


if __name__ == "__main__":
    main()
