"""How the process ends: told to under load, and by itself once an encoder hangs."""

import concurrent.futures
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

# The real command, but for its encoder: one that takes 20 ms a batch, and hangs on a picture whose first pixel is red.
SERVER = """
import sys, threading, time
from patchsight_serve import server
from patchsight_serve.__main__ import main
from patchsight_serve.fake_encoder import FakeEncoder

class Slow(FakeEncoder):
    def run(self, images, outputs):
        if (images[:, 0, 0] == (255, 0, 0)).all(axis=1).any():
            threading.Event().wait()
        time.sleep(0.02)
        for _, client, number in images[:, 0, 0].tolist():
            print(f"encoded {client} {number}\\n", end="", flush=True)  # one piece: the log's lines come between others
        return super().run(images, outputs)

server._encoders = lambda settings: {"fake": Slow()}
main(["--port", "0", "--no-sample-gallery", *sys.argv[1:]])
"""
IMAGE = {"Content-Type": "image/png"}
Start = Callable[..., tuple["subprocess.Popen[bytes]", str]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """`start(*flags)`: the process, ready, and its address. Its output goes to `log` in the test's folder."""
    processes: list[subprocess.Popen[bytes]] = []

    def start(*flags: str) -> tuple["subprocess.Popen[bytes]", str]:
        log = tmp_path / "log"
        with log.open("w") as file:
            command = [sys.executable, "-c", SERVER, "--state-dir", str(tmp_path / "state"), *flags]
            processes.append(subprocess.Popen(command, stdout=file, stderr=file, env=os.environ))
        for _ in range(1200):
            if found := re.search(r"running on (http://\S+)", log.read_text()):
                return processes[-1], found[1]
            assert processes[-1].poll() is None, log.read_text()
            time.sleep(0.05)
        raise AssertionError(log.read_text())

    yield start
    for process in processes:
        process.kill()
        process.wait(10)


def test_term_under_load_loses_no_request(start: Start, encode: Callable[..., bytes], tmp_path: Path) -> None:
    """Sixteen clients post pictures as fast as they can while the server is told to leave. It answers whatever
    it began to read, on connections that end with the answer, then listens no more, and has left with status 0."""
    process, url = start("--drain-delay-s", "2")

    def client(number: int) -> tuple[set[tuple[int, int]], int]:
        answered, late = set(), 0
        with httpx.Client(base_url=url, timeout=60) as http:
            for i in range(100_000):
                picture = np.full((8, 8, 3), (0, number, i % 256), np.uint8)
                try:
                    reply = http.post("/embed", content=encode(picture), headers=IMAGE)
                except httpx.TransportError:  # nobody listens any more, or did not read it
                    break
                assert reply.status_code == 200, reply.text
                answered.add((number, i % 256))
                late += reply.headers.get("Connection") == "close"
        return answered, late

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        clients = [pool.submit(client, i) for i in range(16)]
        time.sleep(1.5)
        process.send_signal(signal.SIGTERM)
        counts = [each.result(60) for each in clients]
    assert process.wait(60) == 0
    answered, late = set().union(*(some for some, _ in counts)), sum(late for _, late in counts)
    log = (tmp_path / "log").read_text()
    encoded = {(int(client), int(i)) for client, i in re.findall(r"encoded (\d+) (\d+)", log)} - {
        (128, 128)
    }  # the proof
    assert encoded == answered
    assert late > 0
    assert "Traceback" not in log


def test_an_encoder_that_hangs_ends_the_process(start: Start, encode: Callable[..., bytes], tmp_path: Path) -> None:
    """The batch's requests get 504, /readyz turns 503 within a second of the time-out, and the exit status says why."""
    process, url = start("--batch-timeout-s", "1", "--ready-age-s", "60")
    blue, red = (encode(np.full((8, 8, 3), color, np.uint8)) for color in ((0, 0, 255), (255, 0, 0)))
    assert httpx.post(f"{url}/embed", content=blue, headers=IMAGE).status_code == 200
    with concurrent.futures.ThreadPoolExecutor() as pool:
        began = time.monotonic()
        inside = pool.submit(httpx.post, f"{url}/embed", content=red, headers=IMAGE, timeout=60)
        time.sleep(0.2)
        behind = pool.submit(httpx.post, f"{url}/embed", content=blue, headers=IMAGE, timeout=60)
        while httpx.get(f"{url}/readyz").status_code == 200:
            time.sleep(0.02)
        assert time.monotonic() - began < 1 + 1 + 1  # the last one for a busy machine
        assert httpx.get(f"{url}/livez").status_code == 200
        assert inside.result(60).status_code == 504
        assert behind.result(60).status_code == 503
    assert process.wait(60) == 70
    assert "encoder 'fake' hangs: a batch of 1 is not done after 1 s" in (tmp_path / "log").read_text()
