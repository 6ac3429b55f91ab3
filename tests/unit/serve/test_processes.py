"""Several processes on one port, as real processes: all of them answer, one that is killed is replaced, and they leave
without dropping a request."""

import contextlib
import os
import re
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from process_group import PATIENCE_S, Group
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from patchsight_serve.errors import PatchsightError
from patchsight_serve.processes import bind, shares
from patchsight_serve.settings import ServeSettings

PNG = {"Content-Type": "image/png"}


@pytest.fixture
def start(tiny_bundle: Path) -> Iterator[Callable[..., Group]]:
    groups: list[Group] = []

    def start(*flags: str, repository: Path = tiny_bundle.parent) -> Group:
        encoders = ("--threads", "1", "--engine", "onnxruntime", "--model-repository", str(repository))
        groups.append(Group(*encoders, *flags))
        return groups[-1]

    yield start
    for group in groups:
        with contextlib.suppress(ProcessLookupError):
            group.process.kill()
        group.process.wait(10)


def metrics(url: str) -> dict[str, float]:
    """Each sample by its name, summed over its labels."""
    sums: Counter[str] = Counter()
    for family in text_string_to_metric_families(httpx.get(f"{url}/metrics", timeout=30).raise_for_status().text):
        for sample in family.samples:
            sums[sample.name] += sample.value
    return dict(sums)


def until(url: str, name: str, value: float) -> None:
    for _ in range(PATIENCE_S * 5):
        if (now := metrics(url).get(name)) == value:
            return
        time.sleep(0.2)
    raise AssertionError(f"{name} is {now}, not {value}")


def cpu_seconds(pid: int) -> float:
    user, system = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


class Load(threading.Thread):
    """Requests without end, on a new connection each, by several threads; counts what became of them."""

    def __init__(self, url: str, png: bytes) -> None:
        super().__init__()
        self.url, self.png, self.ending = url, png, threading.Event()
        self.counts: Counter[str] = Counter()

    def run(self) -> None:
        workers = [threading.Thread(target=self.ask) for _ in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    def ask(self) -> None:
        while not self.ending.is_set():
            try:
                reply = httpx.post(f"{self.url}/embed", content=self.png, headers=PNG, timeout=60)
                self.counts[str(reply.status_code)] += 1
            except httpx.HTTPError as error:
                self.counts[type(error).__name__] += 1

    def end(self) -> Counter[str]:
        self.ending.set()
        self.join()
        return self.counts


def test_all_answer_are_counted_replaced_and_leave(start: Callable[..., Group], png: bytes) -> None:
    group = start()
    url, (first, second) = group.ready(), group.pids()
    began = {pid: cpu_seconds(pid) for pid in (first, second)}
    load = Load(url, png)
    load.start()
    while load.counts["200"] < 300:
        assert load.is_alive()
        time.sleep(0.05)
    spent = {pid: cpu_seconds(pid) - before for pid, before in began.items()}
    assert min(spent.values()) > 0.02 * sum(spent.values()), spent  # both work

    os.kill(first, signal.SIGKILL)
    before = load.counts["200"]
    group.said(rf"process {first} died with status -9; another takes its place in 0 s")
    (*_, third) = [int(pid) for pid in group.said(r"process (\d+) answers", 3)]
    assert third not in (first, second)
    while load.counts["200"] < before + 100:
        assert load.is_alive()
        time.sleep(0.05)
    counts = load.end()
    broken = sum(count for what, count in counts.items() if what != "200")
    assert broken <= 4, counts  # those that the killed process had in work

    until(url, "patchsight_processes", 2)
    sums = metrics(url)
    assert sums["patchsight_process_starts_total"] == 3
    # The killed process had told of all but its last second.
    assert 0.3 * counts["200"] < sums["patchsight_images_total"] <= counts["200"] + broken
    until(url, "patchsight_admitted_images", 0)
    time.sleep(3)  # each tells the other once a second what it has counted
    known = metrics(url)["patchsight_images_total"]
    for _ in range(20):
        assert httpx.post(f"{url}/embed", content=png, headers=PNG).status_code == 200
    until(url, "patchsight_images_total", known + 20)

    group.process.send_signal(signal.SIGTERM)
    assert group.process.wait(PATIENCE_S) == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/livez")
    assert "Traceback" not in group.log.read_text()
    for pid in (second, third):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_term_drops_no_request(start: Callable[..., Group], png: bytes) -> None:
    """A body is half sent when TERM comes; it is still answered."""
    group = start()
    url = group.ready()
    address = (httpx.URL(url).host, httpx.URL(url).port or 0)
    head = f"POST /embed HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: {len(png)}\r\n\r\n"
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(socket.create_connection(address, 30)) for _ in range(6)]
        for connection in connections:
            connection.sendall(head.encode() + png[:50])
        until(url, "patchsight_connections", 6 + 1)
        group.process.send_signal(signal.SIGINT)
        group.said("Shutting down", 2)
        for connection in connections:
            connection.sendall(png[50:])
            assert connection.recv(20).startswith(b"HTTP/1.1 200 ")
    assert group.process.wait(PATIENCE_S) == 0


def test_a_supervisor_that_is_killed_leaves_nobody_behind(start: Callable[..., Group]) -> None:
    group = start()
    url, pids = group.ready(), group.pids()
    group.process.kill()
    group.process.wait(10)
    for pid in pids:
        for _ in range(PATIENCE_S * 20):
            if not Path(f"/proc/{pid}").exists() or "Z (zombie)" in Path(f"/proc/{pid}/status").read_text():
                break
            time.sleep(0.05)
        else:
            raise AssertionError(f"{pid} goes on")
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/livez")


def test_what_cannot_start_ends_with_1(start: Callable[..., Group], tmp_path: Path) -> None:
    group = start(repository=tmp_path)
    assert group.process.wait(PATIENCE_S) == 1
    assert re.search(r"process \d+ could not start: status 1", group.log.read_text())
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PatchsightError, match=f"cannot listen on 127.0.0.1:{port}: "):
            bind("127.0.0.1", port)
        group = start("--port", str(port))
        assert group.process.wait(PATIENCE_S) == 1
        assert "cannot listen" in group.log.read_text()


def test_a_name_with_two_addresses_has_one_port() -> None:
    sockets = bind("localhost", 0)
    try:
        assert len({opened.getsockname()[1] for opened in sockets}) == 1
    finally:
        for opened in sockets:
            opened.close()


def test_threads_are_divided_unless_they_are_given() -> None:
    cores = len(os.sched_getaffinity(0))
    assert shares(ServeSettings(processes=2)).threads == max(1, cores // 2)
    assert shares(ServeSettings(processes=2)).decode_threads == max(1, cores // 2)
    assert shares(ServeSettings(processes=10_000)).threads == 1
    given = shares(ServeSettings(processes=2, threads=7, decode_threads=5))
    assert (given.threads, given.decode_threads) == (7, 5)


@pytest.mark.parametrize(
    ("method", "path", "content"),
    [
        ("GET", "/gallery", b""),
        ("GET", "/gallery/images", b""),
        ("POST", "/gallery/images", b"<png>"),
        ("GET", "/gallery/images/a", b""),
        ("PATCH", "/gallery/images/a", b'{"label": "x"}'),
        ("DELETE", "/gallery/images/a", b""),
        ("GET", "/gallery/images/a/thumbnail", b""),
        ("GET", "/gallery/images/a/image", b""),
        ("GET", "/neighbors?id=a", b""),
        ("POST", "/neighbors", b"<png>"),
        ("GET", "/neighbors?id=a&gallery=other", b""),
        ("GET", "/gallery/duplicates", b""),
        ("GET", "/gallery/clusters", b""),
        ("GET", "/gallery/map", b""),
    ],
)
def test_galleries_are_refused(
    method: str, path: str, content: bytes, serving: Callable[..., TestClient], png: bytes, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"processes": 2, "sample_gallery": True, "state_dir": tmp_path / "state"}
    client = serving(**settings)
    headers = {"Content-Type": "image/png" if content == b"<png>" else "application/json"}
    reply = client.request(method, path, content=png if content == b"<png>" else content, headers=headers)
    assert reply.status_code == 404
    assert "start it with --processes 1" in reply.json()["error"]["message"]
    assert client.post("/embed", content=png, headers=PNG).status_code == 200
    assert not (tmp_path / "state").exists()


def test_a_process_that_stands_still_is_replaced(start: Callable[..., Group], png: bytes) -> None:
    group = start("--batch-timeout-s", "1")
    url, (first, second) = group.ready(), group.pids()
    os.kill(second, signal.SIGSTOP)
    for _ in range(3):
        assert httpx.post(f"{url}/embed", content=png, headers=PNG, timeout=60).status_code == 200
    group.said(rf"process {second} has been silent for 20 s: killed")
    third = int(group.said(r"process (\d+) answers", 3)[2])
    assert third not in (first, second)
    until(url, "patchsight_processes", 2)
    group.process.send_signal(signal.SIGTERM)
    assert group.process.wait(PATIENCE_S) == 0


def test_a_hangup_has_every_process_reload(
    start: Callable[..., Group], make_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    repository = tmp_path / "repository"
    make_bundle(repository / "a")
    group = start(repository=repository)
    (url,) = group.said(r"processes running on (http://\S+)")
    make_bundle(repository / "b", license="mine")
    group.process.send_signal(signal.SIGHUP)
    group.said("reloaded: added b", times=2)
    for _ in range(8):
        reply = httpx.get(f"{url}/encoders", timeout=PATIENCE_S).json()
        assert [e["name"] for e in reply["encoders"]] == ["a", "b"]
    group.process.send_signal(signal.SIGTERM)
    assert group.process.wait(PATIENCE_S) == 0
