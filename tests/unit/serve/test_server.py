"""The whole process over a real socket: starts, says what it serves, answers, and leaves without dropping a request."""

import concurrent.futures
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import httpx
import numpy as np
import pytest

from patchsight_serve.app import create_app
from patchsight_serve.decode import decode
from patchsight_serve.fake_encoder import FakeEncoder
from patchsight_serve.ort_encoder import OrtEncoder
from patchsight_serve.server import Server
from patchsight_serve.settings import ServeSettings

Start = Callable[..., tuple["subprocess.Popen[str]", str]]


@pytest.fixture
def start(tiny_bundle: Path) -> Iterator[Start]:
    """`start(*flags, **environment)`: the process, ready, and its address. Its output goes to `log` beside it."""
    processes: list[subprocess.Popen[str]] = []

    def start(*flags: str, **environment: str) -> tuple["subprocess.Popen[str]", str]:
        command = [sys.executable, "-m", "patchsight_serve", "--port", "0", "--threads", "1", "--no-sample-gallery"]
        command += ["--model-repository", str(tiny_bundle.parent), *flags]
        with Path("log").open("w") as log:
            process = subprocess.Popen(command, stderr=log, stdout=log, text=True, env={**os.environ, **environment})
        processes.append(process)
        for _ in range(1200):
            if found := re.search(r"running on (http://\S+)", Path("log").read_text()):
                return process, found[1]
            assert process.poll() is None, Path("log").read_text()
            time.sleep(0.05)
        raise AssertionError(Path("log").read_text())

    yield start
    for process in processes:
        process.kill()
        process.wait(10)


def test_a_process_serves_and_leaves(start: Start, tiny_bundle: Path, png: bytes) -> None:
    process, url = start("--drain-delay-s", "0", PATCHSIGHT_API_KEYS="very-secret")
    with httpx.Client(base_url=url, headers={"Authorization": "Bearer very-secret"}) as client:
        assert client.get("/readyz").status_code == 200
        embedding = client.post("/embed", content=png, headers={"Content-Type": "image/png"}).json()["results"][0]
    encoder = OrtEncoder(tiny_bundle, threads=1)
    raw = encoder.run(decode(png, encoder.manifest.transform)[None], ["cls_embedding"])["cls_embedding"][0]
    np.testing.assert_allclose(embedding["embedding"], raw / np.linalg.norm(raw), rtol=1e-5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    log = Path("log").read_text()
    assert "very-secret" not in log
    assert "max_queue = 256" in log
    assert f"encoder tiny: none tiny, embeddings of 8 numbers, sha256 {encoder.manifest.sha256[:12]}" in log
    assert "license: CC0-1.0" in log
    assert "Traceback" not in log


def test_bad_bytes_on_the_wire_do_no_harm(start: Start, png: bytes) -> None:
    _, url = start()
    address = (httpx.URL(url).host, httpx.URL(url).port or 0)
    head = b"POST /embed HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"
    for wire in (
        b"\x16\x03\x01 not http\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n",
        head + b"Content-Length: 99999999999999\r\n\r\n",
        head + b"Content-Length: -1\r\n\r\n",
        head + b"Content-Length: 1000\r\n\r\n" + png[:50],  # and hangs up
        head + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n",
    ):
        with socket.create_connection(address, 5) as connection:
            connection.sendall(wire)
            connection.settimeout(0.2)
            with contextlib.suppress(TimeoutError, ConnectionError):
                reply = connection.recv(1000)
                assert not reply or reply.startswith(b"HTTP/1.1 4"), reply
    reply = httpx.post(f"{url}/embed", content=png, headers={"Content-Type": "image/png"})
    assert reply.status_code == 200
    assert "Traceback" not in Path("log").read_text()


class Gated(FakeEncoder):
    def __init__(self) -> None:
        super().__init__()
        self.images = 0
        self.gate, self.inside = threading.Event(), threading.Event()
        self.gate.set()

    def run(self, images: np.ndarray, outputs: Sequence[str]) -> dict[str, np.ndarray]:
        self.inside.set()
        assert self.gate.wait(60)
        self.images += len(images)
        return super().run(images, outputs)


@contextlib.contextmanager
def in_thread(encoder: Gated) -> Iterator[tuple[Server, str]]:
    """A server in this process, and its address; at the end it has left."""
    settings = ServeSettings(port=0, drain_delay_s=600, sample_gallery=False)
    server = Server(create_app({"fake": encoder}, settings), settings)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield server, f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        encoder.gate.set()
        server.should_exit = True
        thread.join(60)
    assert not thread.is_alive()


def test_requests_in_work_are_answered_after_term(png: bytes) -> None:
    """/readyz turns 503 while the door is still open; then the door closes; then the last request is answered."""
    encoder = Gated()
    with in_thread(encoder) as (server, url), concurrent.futures.ThreadPoolExecutor() as pool:
        encoder.gate.clear()
        encoder.inside.clear()
        waiting = pool.submit(
            httpx.post, f"{url}/embed", content=png, headers={"Content-Type": "image/png"}, timeout=60
        )
        assert encoder.inside.wait(60)
        server.handle_exit(signal.SIGTERM, None)
        assert httpx.get(f"{url}/readyz").status_code == 503
        assert httpx.get(f"{url}/encoders").status_code == 200
        server.handle_exit(signal.SIGTERM, None)  # a second one ends the delay
        while server.servers[0].is_serving():
            time.sleep(0.01)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/livez")
        assert not waiting.done()
        encoder.gate.set()
        assert waiting.result(60).status_code == 200


def test_a_client_that_leaves_costs_no_inference(png: bytes) -> None:
    encoder = Gated()
    with in_thread(encoder) as (_, url), concurrent.futures.ThreadPoolExecutor() as pool:
        encoder.gate.clear()
        encoder.inside.clear()
        before = encoder.images
        stays = pool.submit(httpx.post, f"{url}/embed", content=png, headers={"Content-Type": "image/png"}, timeout=60)
        assert encoder.inside.wait(60)
        for path in ("/embed", "/attention", "/neighbors"):
            head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: {len(png)}\r\n\r\n"
            address = (httpx.URL(url).host, httpx.URL(url).port or 0)
            with socket.create_connection(address, 5) as connection:
                connection.sendall(head.encode() + png)
                wait_for(url, "patchsight_admitted_images", 2)
            wait_for(url, "patchsight_admitted_images", 1)
        encoder.gate.set()
        assert stays.result(60).status_code == 200
        assert encoder.images == before + 1


def wait_for(url: str, metric: str, value: float) -> None:
    """Until a gauge of /metrics has this value."""
    for _ in range(600):
        found = re.search(rf"^{metric}{{.*}} (\S+)$", httpx.get(f"{url}/metrics").text, re.MULTILINE)
        assert found, metric
        if float(found[1]) == value:
            return
        time.sleep(0.05)
    raise AssertionError(f"{metric} is {found[1]}, not {value}")
