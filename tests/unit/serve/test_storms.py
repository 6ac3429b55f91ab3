"""Hundreds of clients that behave badly at once: whoever behaves well is served all the while, and nothing is left."""

import contextlib
import re
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

import httpx
import numpy as np
import pytest

HEADER_TIMEOUT, TIMEOUT, MOST = 1, 4, 600
PATIENCE = 30  # seconds for what should take about one of the two, on a busy machine
UPLOAD = b"POST /embed HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 1000000\r\n\r\n"
LARGE = b"GET /static/swagger/swagger-ui-bundle.js HTTP/1.1\r\nHost: x\r\n\r\n"
RST = struct.pack("ii", 1, 0)  # SO_LINGER: close by a reset


@pytest.fixture(scope="module")
def url(strict_serve: Callable[[int, int, int], str]) -> str:
    return strict_serve(HEADER_TIMEOUT, TIMEOUT, MOST)


class Steady(threading.Thread):
    """A client that behaves, on one connection: embeds the same image, and asks whether the server is ready."""

    def __init__(self, client: httpx.Client, png: bytes) -> None:
        super().__init__()
        self.client = client
        self.png = png
        self.expected = self.embed()
        self.answers = 0
        self.failure: BaseException | None = None
        self.end = threading.Event()

    def embed(self) -> list[float]:
        reply = self.client.post("/embed", content=self.png, headers={"Content-Type": "image/png"})
        assert reply.status_code == 200, reply.text
        embedding: list[float] = reply.json()["results"][0]["embedding"]
        return embedding

    def run(self) -> None:
        try:
            while not self.end.wait(0.02):
                np.testing.assert_array_equal(self.embed(), self.expected)
                ready = self.client.get("/readyz")
                assert ready.status_code == 200, ready.text
                self.answers += 1
        except BaseException as error:
            self.failure = error

    def metric(self, name: str) -> float:
        found = re.search(rf"^{name} (\S+)$", self.client.get("/metrics").text, re.MULTILINE)
        assert found, name
        return float(found[1])


@pytest.fixture
def storm(url: str, png: bytes) -> Iterator[Callable[[], list[socket.socket]]]:
    """`storm(n)`: that many connections. Around the test, a steady client is answered; after it, the server has as many
    open files and connections as before, and no more memory than a storm's own."""
    sockets: list[socket.socket] = []

    def storm(count: int) -> list[socket.socket]:
        address = (httpx.URL(url).host, httpx.URL(url).port or 0)
        new = [socket.create_connection(address, PATIENCE) for _ in range(count)]
        sockets.extend(new)
        return new

    with httpx.Client(base_url=url, timeout=PATIENCE) as client:
        steady = Steady(client, png)
        before = {name: steady.metric(name) for name in ("process_open_fds", "patchsight_connections")}
        memory = steady.metric("process_resident_memory_bytes")
        steady.start()
        yield storm
        answers, deadline = steady.answers, time.monotonic() + PATIENCE
        while steady.is_alive() and steady.answers < answers + 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        steady.end.set()
        steady.join(2 * PATIENCE)
        for one in sockets:
            one.close()
        assert steady.failure is None, steady.failure
        assert steady.answers >= answers + 3
        while (after := {name: steady.metric(name) for name in before}) != before:
            assert time.monotonic() < deadline, (before, after)
            time.sleep(0.1)
        assert before["patchsight_connections"] == 1
        assert steady.metric("process_resident_memory_bytes") - memory < 150e6


def drip(sockets: list[socket.socket], text: bytes, pause_s: float = 0.2) -> dict[socket.socket, bytes]:
    """Send `text` to all of them byte by byte until each is closed; what each has said."""
    said = dict.fromkeys(sockets, b"")
    deadline = time.monotonic() + PATIENCE
    with selectors.DefaultSelector() as selector:
        for one in sockets:
            one.setblocking(False)
            selector.register(one, selectors.EVENT_READ)
        at = 0
        while selector.get_map():
            assert time.monotonic() < deadline, f"{len(selector.get_map())} are still open"
            for key in list(selector.get_map().values()):
                with contextlib.suppress(OSError):
                    key.fileobj.send(text[at : at + 1])  # type: ignore[union-attr]
            at = min(at + 1, len(text) - 1)
            until = time.monotonic() + pause_s
            while (left := until - time.monotonic()) > 0:
                for key, _ in selector.select(left):
                    one = key.fileobj
                    assert isinstance(one, socket.socket)
                    try:
                        data = one.recv(65536)
                    except ConnectionResetError:
                        data = b""
                    said[one] += data
                    if not data:
                        selector.unregister(one)
    return said


def test_dropped_in_mid_upload(storm: Callable[[int], list[socket.socket]]) -> None:
    for _ in range(5):
        for number, one in enumerate(storm(500)):
            one.sendall(UPLOAD + b"\x89PNG" * 500)
            if number % 2:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RST)
            one.close()


def test_heads_byte_by_byte(storm: Callable[[int], list[socket.socket]]) -> None:
    said = drip(storm(500), b"GET /livez HTTP/1.1\r\nX: " + b"x" * 1000)
    assert all(s.startswith(b"HTTP/1.1 408 ") for s in said.values())


def test_bodies_byte_by_byte(storm: Callable[[int], list[socket.socket]]) -> None:
    sockets = storm(500)
    for one in sockets:
        one.sendall(UPLOAD)
    said = drip(sockets, b"x" * 1000)
    assert all(s.startswith(b"HTTP/1.1 504 ") for s in said.values())


def test_half_closed(storm: Callable[[int], list[socket.socket]], png: bytes) -> None:
    whole = UPLOAD.replace(b"1000000", str(len(png)).encode()) + png
    for number, one in enumerate(sockets := storm(500)):
        one.sendall((b"", b"GET /li", UPLOAD + b"x", whole, LARGE)[number % 5])
        one.shutdown(socket.SHUT_WR)
    deadline = time.monotonic() + PATIENCE
    for one in sockets:
        with contextlib.suppress(ConnectionResetError):
            while one.recv(65536):
                assert time.monotonic() < deadline


def test_more_than_may_connect(storm: Callable[[int], list[socket.socket]]) -> None:
    said = drip(storm(MOST + 100), b"\r\n")
    assert sum(s.startswith(b"HTTP/1.1 503 ") for s in said.values()) == 101  # the steady client has a place, too


def test_replies_that_nobody_reads(storm: Callable[[int], list[socket.socket]], url: str) -> None:
    sockets = storm(30)
    for one in sockets:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        one.sendall(LARGE * 16)
    dropped = r'^patchsight_rejected_requests_total{reason="reply_not_read"} 30.0$'
    with httpx.Client(base_url=url) as client:
        for _ in range(10 * PATIENCE):
            if re.search(dropped, client.get("/metrics").text, re.MULTILINE):
                return
            time.sleep(0.1)
    raise AssertionError("the server still waits for them to read")
