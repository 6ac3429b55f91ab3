"""What does the gateway itself cost? Requests of one small photo, with an encoder that returns zeros.

    python benchmarks/overhead.py                # 2 minutes; needs two cores and nobody else on them

The servers share core 0, and are asked one at a time; the 8 clients have core 1. The photos have 0.02 megapixels:
decoding is a part of every figure, and larger ones would hide the rest. For comparison two endpoints of FastAPI that
decode the same photos and send the same number of zeros (null_server.py). Rounds of a second each go through all ways
in turn, and a ratio is taken within its round: a processor that others use changes its speed from one to the next.
"""

import argparse
import base64
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import load_generator
import numpy as np
import photo_mix
import process_tree
from contenders import form_request
from load_generator import closed_loop, http_request
from measure import publish, save
from null_server import MANIFEST
from pinned_server import running, stand_aside
from triton_process import free_port

from patchsight_serve.decode import decode

CONNECTIONS = 8
LEAST = "fastapi raw"
JPEG, JSON, BINARY = "image/jpeg", "application/json", "application/octet-stream"


def as_raw(photo: bytes) -> bytes:
    return http_request("/embed", {"Content-Type": JPEG, "Accept": BINARY}, photo)


def as_json(photo: bytes) -> bytes:
    body = b'{"images": ["' + base64.b64encode(photo) + b'"]}'
    return http_request("/embed", {"Content-Type": JSON, "Accept": JSON}, body)


@dataclass(frozen=True)
class Way:
    """kind: of server. expected: status of the replies that count."""

    label: str
    kind: str
    request: Callable[[bytes], bytes]
    expected: int = 200


WAYS = {
    "raw": Way("patchsight, raw JPEG → binary", "ours", as_raw),
    "json": Way("patchsight, base64 in JSON → JSON", "ours", as_json),
    "multipart": Way("patchsight, multipart → JSON", "ours", form_request("images")),
    "refusal": Way("patchsight, raw JPEG → 429", "full", as_raw, 429),
    "fastapi raw": Way("FastAPI, raw JPEG → binary", "raw", as_raw),
    "fastapi upload": Way("FastAPI, `UploadFile` → binary", "upload", form_request("images")),
}


@dataclass(frozen=True)
class Target:
    """A server that runs."""

    url: str
    pid: int

    def ask(self, way: Way, requests: list[bytes], seconds: float) -> tuple[float, float]:
        """Requests a second, and CPU ms of the server for each."""
        cpu, began = process_tree.cpu_seconds(self.pid), time.perf_counter()
        replies = load_generator.run(closed_loop(self.url, requests, CONNECTIONS, seconds))
        took, cpu = time.perf_counter() - began, process_tree.cpu_seconds(self.pid) - cpu
        assert all(reply.status == way.expected for reply in replies), {reply.status for reply in replies}
        return len(replies) / took, 1000 * cpu / len(replies)


@contextmanager
def targets(ways: list[Way], photos: list[bytes]) -> Iterator[dict[str, Target]]:
    """A server of each kind; all of them wait while one is asked."""
    found: dict[str, Target] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for way in ways:
            if way.kind in found:
                continue
            port = free_port()
            url = f"http://127.0.0.1:{port}"
            command = [sys.executable, str(Path(__file__).with_name("null_server.py")), way.kind, str(port)]
            server = running(command, os.environ, url, way.request(photos[0]), folder / way.kind, way.expected)
            pid, _ = stack.enter_context(server)
            found[way.kind] = Target(url, pid)
        yield found


def decoding_ms(photos: list[bytes]) -> float:
    """CPU ms to decode one of them, in this process."""
    began = time.process_time()
    for photo in photos * 5:
        decode(photo, MANIFEST.transform)
    return 1000 * (time.process_time() - began) / (5 * len(photos))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--dry", action="store_true", help="neither save nor publish")
    arguments = parser.parse_args()
    stand_aside()
    photos = [photo_mix.resized(photo, 0.02) for photo in photo_mix.photos()]
    ways = {name: WAYS[name] for name in arguments.ways}
    requests = {name: [way.request(photo) for photo in photos] for name, way in ways.items()}
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    decoding = []
    with targets(list(ways.values()), photos) as servers:
        for number in range(arguments.rounds + 1):
            decoding.append(decoding_ms(photos))
            for name, way in ways.items():
                values = servers[way.kind].ask(way, requests[name], arguments.seconds)
                if number:  # the first round warms up
                    seen[name].append(values)
            costs = ", ".join(f"{name} {values[-1][1]:.2f}" for name, values in seen.items() if values)
            print(f"round {number} of {arguments.rounds}, CPU ms: {costs}", flush=True)
    figures = {
        "connections": CONNECTIONS,
        "rounds": arguments.rounds,
        "decode_cpu_ms": round(median(decoding), 3),
        "ways": {name: _figures(values, seen.get(LEAST)) for name, values in seen.items()},
    }
    print(table(figures))
    if not arguments.dry:
        save("overhead", figures)
        publish("overhead", table(figures))


def _figures(values: list[tuple[float, float]], least: list[tuple[float, float]] | None) -> dict[str, Any]:
    """Medians; the ratio to the shortest endpoint is taken within each round, with its quartiles."""
    rates, costs = zip(*values, strict=True)
    figures: dict[str, Any] = {"requests_per_s": round(median(rates)), "cpu_ms": round(median(costs), 3)}
    if least:
        ratios = [cost / other for cost, (_, other) in zip(costs, least, strict=True)]
        figures["ratio"] = [round(float(q), 3) for q in np.percentile(ratios, [25, 50, 75])]
    return figures


def table(figures: dict[str, Any]) -> str:
    lines = ["| | requests/s | CPU ms per request | × raw FastAPI |", "| --- | --- | --- | --- |"]
    lines.append(f"| *decoding alone* | | {figures['decode_cpu_ms']:.2f} | |")
    for name, found in figures["ways"].items():
        ratio = "{1:.2f} ({0:.2f}–{2:.2f})".format(*found["ratio"]) if "ratio" in found else "–"
        lines.append(f"| {WAYS[name].label} | {found['requests_per_s']} | {found['cpu_ms']:.2f} | {ratio} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
