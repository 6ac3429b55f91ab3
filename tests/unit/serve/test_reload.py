"""Encoders that come, change and go: what requests see of it."""

import asyncio
import concurrent.futures
import gc
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import httpx
import numpy as np
import pytest
from starlette.testclient import TestClient

from patchsight_serve import triton_discovery
from patchsight_serve.app import create_app
from patchsight_serve.decode import decode
from patchsight_serve.encoder import Encoder, RemoteEncoder
from patchsight_serve.errors import BundleError, PatchsightError
from patchsight_serve.fake_encoder import FakeEncoder
from patchsight_serve.manifest import Manifest
from patchsight_serve.reload import Reloader
from patchsight_serve.settings import ServeSettings

IMAGE = {"Content-Type": "image/png"}
RAW = IMAGE | {"Accept": "application/octet-stream"}


class Version(FakeEncoder):
    """Version n of an encoder gives n times the numbers of version 1. Waits for its gate, if it has one."""

    def __init__(self, name: str, version: int, gate: threading.Event | None = None, **shape: Any) -> None:
        super().__init__(name, **shape)
        self.manifest = self.manifest.model_copy(update={"sha256": f"{version:064x}"})
        self.version, self.gate, self.inside = version, gate, threading.Event()

    def run(self, images: np.ndarray, outputs: Sequence[str]) -> dict[str, np.ndarray]:
        self.inside.set()
        assert self.gate is None or self.gate.wait(60)
        return {name: value * self.version for name, value in super().run(images, outputs).items()}


class Broken(Version):
    def run(self, *_: object) -> dict[str, np.ndarray]:
        raise RuntimeError("no such kernel")


class Shelf:
    """What a reload finds."""

    def __init__(self) -> None:
        self.holds: dict[str, Encoder | PatchsightError] = {}
        self.looks = 0
        self.error: Exception | None = None
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, known: Mapping[str, Manifest]) -> dict[str, Encoder | PatchsightError | None]:
        self.looks += 1
        assert self.gate.wait(60)
        if self.error:
            raise self.error
        return {
            name: entry if isinstance(entry, PatchsightError) or entry.manifest != known.get(name) else None
            for name, entry in self.holds.items()
        }


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


@pytest.fixture
def begin(shelf: Shelf) -> Iterator[Callable[..., TestClient]]:
    """`begin(encoder, …, **settings)`: a client of an application that reloads from the shelf."""
    clients: list[TestClient] = []

    def begin(*encoders: Encoder, **settings: Any) -> TestClient:
        shelf.holds = {e.manifest.name: e for e in encoders}
        loaded = {e.manifest.name: e for e in encoders}
        app = create_app(loaded, ServeSettings(sample_gallery=False, **settings), shelf)
        clients.append(TestClient(app, raise_server_exceptions=False))
        clients[-1].__enter__()
        return clients[-1]

    yield begin
    for client in clients:
        client.__exit__(None, None, None)


@pytest.fixture
def no_collector() -> Iterator[None]:
    """An encoder must go when nobody holds it, not minutes later, with the next round of the garbage collector."""
    gc.disable()
    yield
    gc.enable()


def reload(client: TestClient) -> None:
    """Ask for it, and wait until it is done."""
    reloader: Reloader = client.app.state.reloader  # type: ignore[attr-defined]

    async def work() -> None:
        reloader.request()
        while reloader._task is not None and not reloader._task.done():
            await asyncio.sleep(0.005)

    assert client.portal is not None
    client.portal.call(work)


def names(client: TestClient) -> dict[str, int]:
    """Of what is loaded, with the versions."""
    return {e["name"]: int(e["sha256"], 16) for e in client.get("/encoders").json()["encoders"]}


def embed(client: TestClient, png: bytes, encoder: str) -> tuple[int, float]:
    """The version that the reply names, and the one that its numbers are of."""
    reply = client.post("/embed", content=png, headers=RAW, params={"encoder": encoder, "normalize": False})
    assert reply.status_code == 200, reply.text
    pixels = decode(png, FakeEncoder().manifest.transform)[None]
    first = FakeEncoder(encoder).run(pixels, ["cls_embedding"])["cls_embedding"][0]
    numbers = np.frombuffer(reply.content, "<f4")
    version = float((numbers / first).mean())
    np.testing.assert_allclose(numbers, version * first, rtol=1e-5)
    return int(reply.headers["X-Encoder-Sha256"], 16), round(version, 3)


def test_encoders_come_change_and_go(begin: Callable[..., TestClient], shelf: Shelf, png: bytes) -> None:
    client = begin(Version("a", 1), Version("b", 1), Version("c", 1))
    shelf.holds = {"a": Version("a", 2), "c": shelf.holds["c"], "d": Version("d", 7)}
    reload(client)
    assert names(client) == {"a": 2, "c": 1, "d": 7}
    assert [embed(client, png, name) for name in "acd"] == [(2, 2.0), (1, 1.0), (7, 7.0)]
    gone = client.post("/embed", content=png, headers=IMAGE, params={"encoder": "b"})
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "not_found")
    metrics = client.get("/metrics").text
    assert 'patchsight_admitted_images{encoder="d"} 0.0' in metrics
    assert 'patchsight_admitted_images{encoder="b"}' not in metrics
    assert 'patchsight_reloads_total{result="done"} 1.0' in metrics
    assert client.get("/readyz").status_code == 200


def test_what_is_unchanged_stays_as_it_is(begin: Callable[..., TestClient], shelf: Shelf) -> None:
    client = begin(Version("a", 1))
    before = client.app.state.service.loaded["a"]  # type: ignore[attr-defined]
    shelf.holds = {"a": Version("a", 1)}
    reload(client)
    assert client.app.state.service.loaded["a"] is before  # type: ignore[attr-defined]


@pytest.mark.parametrize("bad", [BundleError("a: the file was changed"), Broken("a", 2)])
def test_one_that_cannot_be_loaded_leaves_the_old_one(
    begin: Callable[..., TestClient], shelf: Shelf, png: bytes, bad: Any, caplog: pytest.LogCaptureFixture
) -> None:
    client = begin(Version("a", 1), Version("b", 1))
    shelf.holds = {"a": bad, "b": Version("b", 2), "new": BundleError("new: no such thing")}
    reload(client)
    assert names(client) == {"a": 1, "b": 2}
    assert [embed(client, png, name) for name in "ab"] == [(1, 1.0), (2, 2.0)]
    failed = client.get("/encoders").json()["failed"]
    assert failed.keys() == {"a", "new"}
    assert failed["a"] in ("a: the file was changed", "the encoder failed on this image")
    assert "encoder new was not reloaded: new: no such thing" in caplog.text
    assert 'patchsight_reloads_total{result="failed"} 1.0' in client.get("/metrics").text
    shelf.holds = {"a": Version("a", 3), "b": shelf.holds["b"]}
    reload(client)
    assert names(client) == {"a": 3, "b": 2}
    assert client.get("/encoders").json()["failed"] == {}


@pytest.mark.parametrize("error", [BundleError("--model-repository x has no encoder in it"), ZeroDivisionError()])
def test_where_nothing_can_be_said_everything_stays(
    begin: Callable[..., TestClient], shelf: Shelf, png: bytes, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    client = begin(Version("a", 1))
    shelf.error = error
    reload(client)
    assert embed(client, png, "a") == (1, 1.0)
    assert "nothing was reloaded" in caplog.text
    shelf.error, shelf.holds = None, {"a": Version("a", 2)}
    reload(client)
    assert embed(client, png, "a") == (2, 2.0)


def test_if_all_that_there_is_fails_what_was_stays(begin: Callable[..., TestClient], shelf: Shelf) -> None:
    client = begin(Version("a", 1))
    shelf.holds = {"b": BundleError("b: half of a copy")}
    reload(client)
    assert names(client) == {"a": 1}


def test_the_encoder_that_the_settings_name_stays(begin: Callable[..., TestClient], shelf: Shelf) -> None:
    client = begin(Version("a", 1), Version("b", 1), encoder="a")
    shelf.holds = {"b": shelf.holds["b"]}
    reload(client)
    assert names(client) == {"a": 1, "b": 1}
    assert "--encoder" in client.get("/encoders").json()["failed"]["a"]


@pytest.mark.usefixtures("no_collector")
def test_a_request_ends_on_what_it_began_with_and_then_that_is_given_back(
    begin: Callable[..., TestClient], shelf: Shelf, png: bytes, until: Callable[..., None]
) -> None:
    gate = threading.Event()
    gate.set()
    old = Version("a", 1, gate)
    client = begin(old)
    gate.clear()
    old.inside.clear()
    dead, inside = weakref.ref(old), old.inside
    thread = client.app.state.service.loaded["a"].engine._thread  # type: ignore[attr-defined]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        slow = pool.submit(embed, client, png, "a")
        assert inside.wait(60)
        shelf.holds = {"a": Version("a", 2)}
        del old
        reload(client)
        assert embed(client, png, "a") == (2, 2.0)  # no wait for the slow one, and not its numbers though equal bytes
        assert thread.is_alive()
        assert not slow.done()
        gate.set()
        assert slow.result(60) == (1, 1.0)
    until(lambda: not thread.is_alive())
    until(lambda: dead() is None)


def test_a_request_whose_body_is_on_its_way_keeps_its_encoder(
    begin: Callable[..., TestClient], shelf: Shelf, png: bytes, until: Callable[..., None]
) -> None:
    """Its size and outputs were checked against the old one; the new one may have neither."""
    client = begin(Version("a", 1))
    started, go = threading.Event(), threading.Event()

    def body() -> Iterator[bytes]:
        yield png[:10]
        started.set()
        assert go.wait(60)
        yield png[10:]

    async def post() -> httpx.Response:
        """On the application's own loop, as a TestClient hands over a body when it is complete."""
        parts = body()

        async def receive() -> dict[str, Any]:
            part = await asyncio.to_thread(next, parts, b"")
            return {"type": "http.request", "body": part, "more_body": bool(part)}

        sent: list[dict[str, Any]] = []

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {
            "type": "http", "method": "POST", "path": "/embed", "raw_path": b"/embed", "query_string": b"normalize=0",
            "headers": [(k.lower().encode(), v.encode()) for k, v in RAW.items()], "http_version": "1.1",
            "scheme": "http", "server": ("x", 80), "client": ("x", 1), "root_path": "",
        }  # fmt: skip
        await client.app(scope, receive, send)
        headers = {k.decode(): v.decode() for k, v in sent[0]["headers"]}
        return httpx.Response(sent[0]["status"], headers=headers, content=sent[1]["body"])

    assert client.portal is not None
    with concurrent.futures.ThreadPoolExecutor() as pool:
        slow = pool.submit(client.portal.call, post)
        assert started.wait(60)
        thread = client.app.state.service.loaded["a"].engine._thread  # type: ignore[attr-defined]
        shelf.holds = {"a": Version("a", 2, image_size=16)}
        reload(client)
        assert names(client) == {"a": 2}
        assert thread.is_alive()
        go.set()
        reply = slow.result(60)
    assert (reply.status_code, int(reply.headers["X-Encoder-Sha256"], 16)) == (200, 1)
    pixels = decode(png, FakeEncoder().manifest.transform)[None]
    expected = FakeEncoder("a").run(pixels, ["cls_embedding"])["cls_embedding"][0]
    np.testing.assert_allclose(np.frombuffer(reply.content, "<f4"), expected, rtol=1e-5)
    until(lambda: not thread.is_alive())


def test_a_wish_during_a_reload_makes_one_more_and_no_request_waits(
    begin: Callable[..., TestClient], shelf: Shelf, png: bytes, until: Callable[..., None]
) -> None:
    client = begin(Version("a", 1))
    shelf.gate.clear()
    reloader: Reloader = client.app.state.reloader  # type: ignore[attr-defined]
    assert client.portal is not None
    client.portal.call(reloader.request)
    until(lambda: shelf.looks == 1)
    for _ in range(3):
        client.portal.call(reloader.request)
    assert embed(client, png, "a") == (1, 1.0)
    shelf.holds = {"a": Version("a", 2)}
    shelf.gate.set()
    until(lambda: reloader._task is not None and reloader._task.done())
    assert shelf.looks == 2
    assert names(client) == {"a": 2}


def test_a_gallery_of_the_old_version_says_so(begin: Callable[..., TestClient], shelf: Shelf, png: bytes) -> None:
    client = begin(Version("a", 1))
    assert client.post("/gallery/images", content=png, headers=IMAGE).status_code == 200
    shelf.holds = {"a": Version("a", 2)}
    reload(client)
    for path in ("/gallery/images", "/neighbors"):
        reply = client.post(path, content=png, headers=IMAGE)
        assert (reply.status_code, reply.json()["error"]["code"]) == (409, "conflict")


def test_of_triton_s_encoders_those_are_new_whose_manifest_is(monkeypatch: pytest.MonkeyPatch) -> None:
    served = {name: RemoteEncoder(Version(name, 2).manifest, "grpc://x:1") for name in ("a", "b", "c")}
    monkeypatch.setattr(triton_discovery, "find_encoders", lambda *_: served)
    known = {"a": served["a"].manifest, "b": Version("b", 1).manifest, "gone": Version("gone", 1).manifest}
    assert triton_discovery.changes("grpc://x:1", known) == {"a": None, "b": served["b"], "c": served["c"]}


def test_without_a_source_nothing_happens(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    reload(client)
    assert "nothing to reload from" in caplog.text
