"""A real server whose process is killed at any moment, or whose disk is full: what it acknowledged is there, whole, and
nothing else is."""

import contextlib
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

EXACT_LIMIT = 20  # images: beyond them an approximate index is built, and lies on the disk
DISK = 12 * 1024**2  # bytes
CLIENTS, IDS = 4, 9  # ids that each client has for itself
RAW = {"Content-Type": "application/octet-stream"}
# What takes long of a start is to import; this process has imported all, and each server is a fork of it.
FORKS = """
    import os, signal, sys
    import patchsight_serve.server, patchsight_serve.ort_encoder
    from patchsight_serve.__main__ import main
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    print("ready", flush=True)
    for line in sys.stdin:
        log, *arguments = line.rstrip("\\n").split("\\t")
        pid = os.fork()
        if pid:
            print(pid, flush=True)
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
        os.dup2(1, 2)
        main(arguments)
        os._exit(0)
"""


@dataclass(frozen=True)
class Server:
    """A process that may be killed. Its output is in `log`."""

    pid: int
    log: Path

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self.gone()

    def stop(self) -> None:
        """As one that may finish what it is at."""
        os.kill(self.pid, signal.SIGTERM)
        self.gone()

    def gone(self) -> None:
        for _ in range(6000):
            if not Path(f"/proc/{self.pid}").exists():
                return
            time.sleep(0.01)
        raise AssertionError(f"{self.pid} goes on:\n{self.log.read_text()}")

    def url(self) -> str:
        """Once it is ready."""
        for _ in range(6000):
            said = re.search(r"running on (http://\S+)", self.log.read_text() if self.log.exists() else "")
            if said and httpx.get(f"{said[1]}/readyz", timeout=30).status_code == 200:
                return said[1]
            assert Path(f"/proc/{self.pid}").exists(), self.log.read_text()
            time.sleep(0.01)
        raise AssertionError(self.log.read_text())


@pytest.fixture(scope="module")
def fork(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """`fork(state folder, *arguments)`: a server of the tiny encoder."""
    code, folder, servers = textwrap.dedent(FORKS), tmp_path_factory.mktemp("servers"), list[Server]()
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder) as forks:
        assert forks.stdin is not None
        assert forks.stdout is not None
        assert forks.stdout.readline() == "ready\n"

        def start(state: Path, *arguments: object) -> Server:
            log = folder / f"{len(servers)}.log"
            line = [
                log, "--port", 0, "--threads", 1, "--engine", "onnxruntime", "--no-sample-gallery", "--drain-delay-s",
                0, "--model-repository", tiny_bundle.parent, "--state-dir", state, *arguments,
            ]  # fmt: skip
            forks.stdin.write("\t".join(map(str, line)) + "\n")
            forks.stdin.flush()
            servers.append(Server(int(forks.stdout.readline()), log))
            return servers[-1]

        yield start
        for server in servers:
            server.kill()


@dataclass(frozen=True)
class Stored:
    """What is known of one image."""

    data: bytes
    label: str | None
    metadata: dict[str, Any]


@dataclass
class Client:
    """Writes to ids of its own, one request after the other, and remembers what was acknowledged.

    doubtful: what the request without an answer would have made of the ids in it, None where it removes them.
    """

    number: int
    rng: random.Random
    encode: Callable[..., bytes]
    known: dict[str, Stored] = field(default_factory=dict)
    doubtful: dict[str, Stored | None] = field(default_factory=dict)
    writes: int = 0

    def work(self, url: str) -> None:
        """Until the server is gone. Any answer but a good one is an error."""
        with httpx.Client(base_url=url, timeout=60, verify=False) as http, contextlib.suppress(httpx.TransportError):
            while True:
                self.doubtful = {}
                self.step(http)
                for id, stored in self.doubtful.items():
                    self.known.pop(id, None)
                    if stored is not None:
                        self.known[id] = stored
                self.writes += bool(self.doubtful)

    def step(self, http: httpx.Client) -> None:
        free = [id for n in range(IDS) if (id := f"{self.number}-{n}") not in self.known]
        taken = sorted(self.known)
        kind = self.rng.choice(["add", "add", "several", "replace", "patch", "delete", "search"])
        if kind == "add" and free:
            id, stored = self.rng.choice(free), self.image()
            self.doubtful = {id: stored}
            self.put(http, id, stored, new=True)
        elif kind == "several" and len(free) > 2:
            made = {id: self.image() for id in self.rng.sample(free, 3)}
            self.doubtful = dict(made)
            items = [{"id": id, "label": s.label, "metadata": s.metadata} for id, s in made.items()]
            files = [("images", s.data) for s in made.values()]
            reply = http.post("/gallery/images", files=files, data={"items": json.dumps(items)})
            assert [result.get("created") for result in reply.json()["results"]] == [True] * 3, reply.text
        elif kind == "replace" and taken:
            id, stored = self.rng.choice(taken), self.image()
            self.doubtful = {id: stored}
            self.put(http, id, stored, new=False)
        elif kind == "patch" and taken:
            id = self.rng.choice(taken)
            stored = Stored(self.known[id].data, self.label(), {"patched": self.rng.random()})
            self.doubtful = {id: stored}
            changes = {"label": stored.label, "metadata": stored.metadata}
            assert http.patch(f"/gallery/images/{id}", json=changes).status_code == 200
        elif kind == "delete" and taken:
            id = self.rng.choice(taken)
            self.doubtful = {id: None}
            assert http.delete(f"/gallery/images/{id}").status_code == 204
        elif taken:
            id = self.rng.choice(taken)
            assert itself(http, self.known[id].data).get(id) == pytest.approx(1, abs=1e-6)

    def put(self, http: httpx.Client, id: str, stored: Stored, new: bool) -> None:
        query = {"id": id, "metadata": json.dumps(stored.metadata), "replace": not new}
        query |= {"label": stored.label} if stored.label else {}
        reply = http.post("/gallery/images", params=query, content=stored.data, headers=RAW)
        assert reply.json() == {"results": [{"index": 0, "id": id, "created": new}]}

    def label(self) -> str | None:
        return self.rng.choice(["shirt", "hat", None])

    def image(self) -> Stored:
        """A picture that no other is like."""
        pixels = np.frombuffer(self.rng.randbytes(16 * 16 * 3), np.uint8).reshape(16, 16, 3)
        return Stored(self.encode(pixels), self.label(), {"n": self.rng.random(), "long": "ü" * 500})

    def settle(self, there: dict[str, Stored]) -> None:
        """What is there is what was acknowledged; of the request without an answer all or nothing."""
        mine = {id: stored for id, stored in there.items() if id.startswith(f"{self.number}-")}
        done = {id: stored for id, stored in (self.known | self.doubtful).items() if stored is not None}
        assert mine in (self.known, done)
        self.known, self.doubtful = mine, {}


def itself(http: httpx.Client, data: bytes) -> dict[str, float]:
    """The most similar of the gallery, and its score."""
    reply = http.post("/neighbors", params={"k": 1}, content=data, headers=RAW)
    assert reply.status_code == 200, reply.text
    return {n["id"]: n["score"] for n in reply.json()["neighbors"]}


def look_over(url: str, before: dict[str, Stored]) -> dict[str, Stored]:
    """All that the gallery holds, where each image has its own bytes, and is found by them, and nothing else is."""
    there: dict[str, Stored] = {}
    with httpx.Client(base_url=url, timeout=60, verify=False) as http:
        told = http.get("/gallery").json()
        for image in http.get("/gallery/images", params={"limit": 1000}).json()["images"]:
            id = image["id"]
            data = http.get(f"/gallery/images/{id}/image").raise_for_status().content
            assert hashlib.sha256(data).hexdigest() == image["sha256"]
            there[id] = Stored(data, image["label"], image["metadata"])
            if before.get(id) != there[id] or len(there) % 4 == 0:  # the others are found as often, in the next rounds
                assert http.get(f"/gallery/images/{id}/thumbnail").content.startswith(b"\xff\xd8")
                assert itself(http, data).get(id) == pytest.approx(1, abs=1e-6)
        everything = http.post("/neighbors", params={"k": 1000}, json={"vectors": [[1.0] * 8]}).json()["neighbors"]
    assert told["damaged"] == []
    assert told["count"] == len(there)
    assert sorted(n["id"] for n in everything) == sorted(there)
    return there


def killed_at_work(server: Server, url: str, clients: list[Client], rng: random.Random) -> float:
    """Kill it soon after some of the clients' writes. Returns how many seconds after."""
    wrong: list[BaseException] = []

    def work(client: Client) -> None:
        try:
            client.work(url)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(client,)) for client in clients]
    enough, moment = sum(client.writes for client in clients) + rng.randrange(40), rng.uniform(0, 0.05)
    for thread in threads:
        thread.start()
    while sum(client.writes for client in clients) < enough and not wrong:
        time.sleep(0.001)
    time.sleep(moment)
    server.kill()
    for thread in threads:
        thread.join()
    assert wrong == [], wrong
    return moment


@pytest.mark.parametrize("kills", [10, pytest.param(200, marks=[pytest.mark.acceptance, pytest.mark.timeout(1800)])])
def test_random_kills(fork: Callable[..., Server], encode: Callable[..., bytes], tmp_path: Path, kills: int) -> None:
    """While clients add, replace, describe, remove and search; now and then while it starts."""
    rng, moments, there = random.Random(kills), [], dict[str, Stored]()
    clients = [Client(number, random.Random(number), encode) for number in range(CLIENTS)]
    while True:
        server = fork(tmp_path, "--exact-limit", EXACT_LIMIT)
        if len(moments) % 4 == 2:
            moments.append(rng.uniform(0, 0.6))
            time.sleep(moments[-1])
            server.kill()
            continue
        url = server.url()
        there = look_over(url, there)
        for client in clients:
            client.settle(there)
        assert {id[:2] for id in there} <= {f"{client.number}-" for client in clients}
        if len(moments) >= kills:
            break
        moments.append(killed_at_work(server, url, clients, rng))
        assert not re.search("Traceback|damaged", server.log.read_text())
    assert "have come since it was written" in server.log.read_text()
    server.stop()
    writes = sum(client.writes for client in clients)
    print(f"seconds from a write, or from the start, to each kill: {moments}; acknowledged writes: {writes}")
    assert writes > 5 * kills


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"a small disk cannot be mounted here: {done.stderr}"
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(path: Path) -> None:
    """To the last byte of the disk, by a file."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def test_a_full_disk(fork: Callable[..., Server], encode: Callable[..., bytes], disk: Path) -> None:
    """Writes are 507 and store nothing, all else goes on; also after a kill; and once there is space, writes do."""
    rng, there = np.random.default_rng(0), dict[str, Stored]()

    def pictures(count: int) -> dict[str, Stored]:
        made = [encode(rng.integers(0, 256, (100, 100, 3), dtype=np.uint8)) for _ in range(count)]
        return {hashlib.sha256(data).hexdigest()[:32]: Stored(data, None, {}) for data in made}

    def add(count: int) -> int:
        more = pictures(count)
        reply = httpx.post(f"{url}/gallery/images", files=[("images", s.data) for s in more.values()], timeout=60)
        if reply.status_code == 200:
            assert all(result["created"] for result in reply.json()["results"])
            there.update(more)
        else:
            error = reply.json()["error"]
            assert (reply.status_code, error["code"]) == (507, "storage_full"), reply.text
            assert "no space left for gallery 'default'; nothing of this request was stored" in error["message"]
        return reply.status_code

    (disk / "other").write_bytes(bytes(DISK // 3))
    server = fork(disk, "--exact-limit", EXACT_LIMIT)
    url = server.url()
    while add(16) == 200:
        pass
    assert len(there) > 64
    fill(disk / "rest")
    assert [add(1), add(3)] == [507, 507]
    some, changes = min(there), {"label": "label", "metadata": {"long": "x" * 16_000}}
    reply = httpx.patch(f"{url}/gallery/images/{some}", json=changes)
    assert (reply.status_code, reply.json()["error"]["code"]) == (507, "storage_full")
    assert look_over(url, there) == there
    server.kill()

    server = fork(disk, "--exact-limit", EXACT_LIMIT)
    url = server.url()
    assert look_over(url, there) == there
    assert add(16) == 507
    (disk / "other").unlink()
    for id in list(there)[:40]:
        assert httpx.delete(f"{url}/gallery/images/{id}").status_code == 204
        del there[id]
    assert add(16) == 200
    assert look_over(url, there) == there
    server.stop()
    assert "Traceback" not in server.log.read_text()

    server = fork(disk, "--exact-limit", EXACT_LIMIT)
    assert look_over(server.url(), {}) == there
