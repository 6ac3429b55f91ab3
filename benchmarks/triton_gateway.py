"""What does Triton cost and give? The same server with its encoder in this process, and on a real Triton beside it.

    python benchmarks/triton_gateway.py

On one machine, Triton's python backend, a server at a time: requests of one photo by 1 and by 32 clients; CPU time of
the gateway for a call of 64 photos with all outputs, over gRPC and shared memory; and ten kills of the worker under
load: until /readyz says no, and until it says yes again. Rounds alternate between the two; load average is noted.
"""

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from measure import DATA, ROOT, publish, save
from triton_clients import under_load
from triton_process import TritonProcess

from patchsight_serve.dataset import read_dataset
from patchsight_serve.encoder import RemoteEncoder
from patchsight_serve.triton_discovery import find_encoders
from patchsight_serve.triton_engine import TritonEngine
from patchsight_serve.triton_models import write_triton_models

ENCODER = "simclr-vit-tiny-cifar10-long"
QUICK = "dino-vit-cifar10"  # whose worker is killed
CLIENTS = (1, 32)
SECONDS = 6.0
CALLS = 12


@contextmanager
def server(*arguments: str) -> Iterator[str]:
    """patchsight-serve on a free port; its address."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        line = [sys.executable, "-m", "patchsight_serve", "--port", "0", "--no-sample-gallery", *arguments]
        with log.open("wb") as file:
            process = subprocess.Popen([*line, "--state-dir", folder], stdout=file, stderr=file)
        try:
            while not (said := [w for w in log.read_text().split() if w.startswith("http://127.0.0.1:")]):
                assert process.poll() is None, log.read_text()
                time.sleep(0.1)
            yield said[0].rstrip("/")
        finally:
            process.terminate()
            process.wait()


async def rate(url: str, photos: list[bytes], clients: int) -> float:
    """Requests a second."""
    done, ends = 0, time.perf_counter() + SECONDS
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:

        async def ask(i: int) -> None:
            nonlocal done
            while time.perf_counter() < ends:
                i = (i + 1) % len(photos)
                reply = await client.post("/embed", params={"encoder": ENCODER}, content=photos[i])
                assert reply.status_code == 200, reply.text
                done += 1

        began = time.perf_counter()
        await asyncio.gather(*(ask(i) for i in range(clients)))
        return done / (time.perf_counter() - began)


async def calls(remote: RemoteEncoder) -> dict[str, float]:
    """CPU ms of the gateway's process for 64 photos with all outputs, median, by way."""
    side = remote.manifest.transform.crop
    pixels = list(np.random.default_rng(0).integers(0, 256, (64, side, side, 3), np.uint8))
    spent: dict[str, list[float]] = {"gRPC": [], "shared memory": []}
    async with (
        TritonEngine(remote, memory=False, probe_s=60) as over_grpc,
        TritonEngine(remote, memory=True, probe_s=60) as over_memory,
    ):
        for _ in range(CALLS):
            for way, engine in zip(spent, (over_grpc, over_memory), strict=True):
                began = time.process_time()
                await engine.run(pixels, list(remote.manifest.outputs))
                spent[way].append(1000 * (time.process_time() - began))
    return {way: round(statistics.median(values[1:]), 2) for way, values in spent.items()}


def kills(url: str, triton: TritonProcess, photos: list[bytes], count: int) -> dict[str, Any]:
    async def harm() -> float:
        triton.kill_worker(QUICK)
        return time.monotonic()

    unready, healed, wrong, statuses = [], [], 0, set()
    for _ in range(count):
        seen, harmed = asyncio.run(under_load(url, photos, harm))
        unready.append(round(seen.unready() - harmed, 2))
        healed.append(round(seen.ready_again() - harmed, 2))
        wrong += seen.wrong
        statuses |= {status for _, _, status in seen.replies}
        print(f"killed: unready after {unready[-1]} s, healed after {healed[-1]} s", flush=True)
    return {"unready_s": unready, "healed_s": healed, "wrong_answers": wrong, "statuses": sorted(statuses)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kills", type=int, default=10)
    arguments = parser.parse_args()
    dataset = read_dataset(DATA / "cifar10" / "test.parquet")
    photos = [dataset.read(i) for i in range(64)]
    with tempfile.TemporaryDirectory() as folder:
        models = [ROOT / "model_repository" / name for name in (ENCODER, QUICK)]
        write_triton_models(models, Path(folder) / "models", "python")
        triton = TritonProcess(Path(folder) / "models", Path(folder) / "log")
        triton.start()
        ways = {
            "in process": ("--model-repository", str(ROOT / "model_repository"), "--encoder", ENCODER),
            "on Triton": ("--triton", triton.address, "--encoder", ENCODER),
        }
        rates: dict[str, dict[str, list[float]]] = {way: {str(n): [] for n in CLIENTS} for way in ways}
        for _ in range(arguments.rounds):
            for way, flags in ways.items():
                with server(*flags) as url:
                    for clients in CLIENTS:
                        asyncio.run(rate(url, photos[:4], 1))
                        rates[way][str(clients)].append(round(asyncio.run(rate(url, photos, clients)), 1))
                        print(f"{way}, {clients} clients: {rates[way][str(clients)][-1]} requests/s", flush=True)
        spent = asyncio.run(calls(find_encoders(triton.address, wait_s=5.0)[ENCODER]))
        print(f"CPU ms of the gateway, 64 photos, all outputs: {spent}", flush=True)
        with server("--triton", triton.address, "--encoder", QUICK) as url:
            killed = kills(url, triton, photos[:16], arguments.kills)
        triton.kill()
    load = round(os.getloadavg()[0], 1)
    figures = {"requests_per_s": rates, "gateway_cpu_ms": spent, "kills": killed, "load_average_at_the_end": load}
    save("triton_gateway", figures)
    publish("triton_gateway", table(figures))


def table(figures: dict[str, Any]) -> str:
    rates, spent, killed = figures["requests_per_s"], figures["gateway_cpu_ms"], figures["kills"]
    lines = ["| | in process | on Triton |", "| --- | --- | --- |"]
    for clients in CLIENTS:
        here, there = (statistics.median(rates[way][str(clients)]) for way in ("in process", "on Triton"))
        lines.append(f"| requests/s, {clients} client{'s' * (clients > 1)} | {here:.0f} | {there:.0f} |")
    cpu = f"{spent['gRPC']} ms over gRPC, {spent['shared memory']} ms over shared memory"
    lines.append(f"| gateway's CPU for 64 photos, all outputs | – | {cpu} |")
    for key, what in (("unready_s", "/readyz turns 503"), ("healed_s", "well again")):
        values = killed[key]
        spread = f"{statistics.median(values):.1f} s ({max(values):.1f} s at most, of {len(values)})"
        lines.append(f"| worker killed under load: {what} | – | {spread} |")
    lines.append(f"| wrong answers meanwhile | – | {killed['wrong_answers']} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
