"""What does the gateway itself cost? Requests of one small photo, with an encoder that returns zeros.

    python benchmarks/overhead.py                # 2 minutes; needs two cores and nobody else on them

A server at a time has core 0, the 8 clients core 1. The photos have 0.02 megapixels: decoding is a part of every
figure, and larger ones would hide the rest. For comparison two endpoints of FastAPI that decode the same photos and
send the same number of zeros (null_server.py). Rounds go through all ways in turn; figures are medians.
"""

import argparse
import base64
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import load_generator
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


def measure(way: Way, photos: list[bytes], seconds: float) -> tuple[float, float]:
    """Requests a second, and CPU ms of the server for each."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    requests = [way.request(photo) for photo in photos]
    command = [sys.executable, str(Path(__file__).with_name("null_server.py")), way.kind, str(port)]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with running(command, os.environ, url, requests[0], log, expected=way.expected) as (pid, _):
            load_generator.run(closed_loop(url, requests, CONNECTIONS, 1.0))
            cpu, began = process_tree.cpu_seconds(pid), time.perf_counter()
            replies = load_generator.run(closed_loop(url, requests, CONNECTIONS, seconds))
            took, cpu = time.perf_counter() - began, process_tree.cpu_seconds(pid) - cpu
    assert all(reply.status == way.expected for reply in replies), {reply.status for reply in replies}
    return len(replies) / took, 1000 * cpu / len(replies)


def decoding_ms(photos: list[bytes]) -> float:
    """CPU ms to decode one of them, in this process."""
    began = time.process_time()
    for photo in photos * 5:
        decode(photo, MANIFEST.transform)
    return 1000 * (time.process_time() - began) / (5 * len(photos))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--dry", action="store_true", help="neither save nor publish")
    arguments = parser.parse_args()
    stand_aside()
    photos = [photo_mix.resized(photo, 0.02) for photo in photo_mix.photos()]
    seen: dict[str, list[tuple[float, float]]] = {way: [] for way in arguments.ways}
    decoding = []
    for _ in range(arguments.rounds):
        decoding.append(decoding_ms(photos))
        for way, values in seen.items():
            values.append(measure(WAYS[way], photos, arguments.seconds))
            print(f"{WAYS[way].label}: {values[-1][0]:.0f} requests/s, {values[-1][1]:.3f} CPU ms each", flush=True)
    figures = {
        "connections": CONNECTIONS,
        "decode_cpu_ms": round(median(decoding), 3),
        "ways": {way: _figures(values) for way, values in seen.items()},
    }
    print(table(figures))
    if not arguments.dry:
        save("overhead", figures)
        publish("overhead", table(figures))


def _figures(values: list[tuple[float, float]]) -> dict[str, Any]:
    rates, costs = zip(*values, strict=True)
    return {
        "requests_per_s": round(median(rates)),
        "cpu_ms": round(median(costs), 3),
        "cpu_ms_of_rounds": [round(cost, 3) for cost in costs],
    }


def table(figures: dict[str, Any]) -> str:
    ways = figures["ways"]
    least = ways.get("fastapi raw", {}).get("cpu_ms")
    lines = ["| | requests/s | CPU ms per request | × raw FastAPI |", "| --- | --- | --- | --- |"]
    lines.append(f"| *decoding alone* | | {figures['decode_cpu_ms']:.2f} | |")
    for way, found in ways.items():
        ratio = f"{found['cpu_ms'] / least:.2f}" if least else "–"
        lines.append(f"| {WAYS[way].label} | {found['requests_per_s']} | {found['cpu_ms']:.2f} | {ratio} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
