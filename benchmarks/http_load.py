"""How many requests a second does `patchsight-serve` answer, and how long does each take, on the CPU and on the GPU?

    python benchmarks/http_load.py --device cpu cuda     # half a minute for each; the clients need cores of their own

64 clients on the same machine, each with one connection and one request under way, post one JPEG of a sample photo
(short side 224) to `/embed` and read the embedding as JSON. The server has its default settings, but for `--max-batch
64`.
Writes `benchmarks/results/http_load.json`.
"""

import argparse
import http.client
import io
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from importlib.resources import as_file, files
from threading import Thread
from typing import Any

from measure import ROOT, paused, save
from PIL import Image

from patchsight_serve.dataset import read_dataset

PROCESSES, CONNECTIONS = 8, 8  # clients: their product
PORT = 8123


def pictures(count: int = 64) -> list[bytes]:
    with as_file(files("patchsight_serve") / "samples" / "clothing.parquet") as path:
        samples = read_dataset(path)
        return [resized(samples.read(i)) for i in range(count)]


def resized(data: bytes, short: int = 224) -> bytes:
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    scale = short / min(picture.size)
    out = io.BytesIO()
    picture.resize([round(side * scale) for side in picture.size]).save(out, "JPEG", quality=90)
    return out.getvalue()


def client(path: str, images: list[bytes], seconds: float, out: Any) -> None:
    """One process: its threads' latencies in seconds, and how many replies were not 200."""
    times: list[float] = []
    failed: list[int] = []

    def one(first: int) -> None:
        connection, i, end = http.client.HTTPConnection("127.0.0.1", PORT), first, time.monotonic() + seconds
        while time.monotonic() < end:
            start = time.perf_counter()
            connection.request("POST", path, images[i % len(images)], {"Content-Type": "image/jpeg"})
            reply = connection.getresponse()
            reply.read()
            times.append(time.perf_counter() - start)
            if reply.status != 200:
                failed.append(reply.status)
            i += 1

    threads = [Thread(target=one, args=(7 * k,)) for k in range(CONNECTIONS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    out.put((times, len(failed)))


def load(path: str, images: list[bytes], seconds: float) -> dict[str, float]:
    out: Any = multiprocessing.Queue()
    clients = [multiprocessing.Process(target=client, args=(path, images, seconds, out)) for _ in range(PROCESSES)]
    begin = time.monotonic()
    for each in clients:
        each.start()
    answers = [out.get() for _ in clients]
    took = time.monotonic() - begin
    for each in clients:
        each.join()
    times = sorted(t for some, _ in answers for t in some)
    return {
        "requests_per_s": round(len(times) / took, 1),
        "p50_ms": round(1000 * statistics.median(times), 1),
        "p99_ms": round(1000 * times[int(0.99 * len(times))], 1),
        "not 200": sum(failed for _, failed in answers),
    }


def start(device: str, repository: str) -> "subprocess.Popen[bytes]":
    command = [
        sys.executable, "-m", "patchsight_serve", "--port", str(PORT), "--device", device, "--max-batch", "64",
        "--model-repository", repository, "--state-dir", f"/tmp/http_load_{os.getpid()}", "--no-sample-gallery",
        "--log-level", "warning",
    ]  # fmt: skip
    server = subprocess.Popen(command)
    end = time.monotonic() + 90
    while True:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=5)
            connection.request("GET", "/readyz")
            if connection.getresponse().status == 200:
                return server
        except OSError:
            pass
        if server.poll() is not None or time.monotonic() > end:
            server.kill()
            raise SystemExit(f"the server does not start on {device}")
        time.sleep(0.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", nargs="+", choices=("cpu", "cuda"), default=["cpu"])
    parser.add_argument("--model-repository", default=str(ROOT / "model_repository"))
    parser.add_argument("--encoder", nargs="+", default=["simclr-vit-tiny-photos"])
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--pause", type=int, help="process that stands still meanwhile")
    arguments = parser.parse_args()
    images, figures = pictures(), {}
    for device in arguments.device:
        server = start(device, arguments.model_repository)
        with ExitStack() as stack:
            stack.callback(server.wait)
            stack.callback(server.send_signal, signal.SIGINT)
            stack.enter_context(paused(arguments.pause))
            for encoder in arguments.encoder:
                path = f"/embed?encoder={encoder}"
                load(path, images, 2.0)  # warms up
                figures[f"{encoder}, {device}"] = load(path, images, arguments.seconds)
                print(encoder, device, figures[f"{encoder}, {device}"], flush=True)
    save("http_load", {"clients": PROCESSES * CONNECTIONS, "results": figures})


if __name__ == "__main__":
    main()
