"""A gallery as a whole over HTTP: removed at once, and nothing left of what a client began and did not finish."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.requests import ClientDisconnect
from starlette.testclient import TestClient

from patchsight_serve import file_reply
from patchsight_serve.fake_encoder import FakeEncoder
from patchsight_serve.file_reply import FileReply

RAW = {"Content-Type": "application/octet-stream"}


@pytest.fixture
def photos(encode: Callable[..., bytes]) -> list[bytes]:
    """Three different PNGs of 32 x 32."""
    rng = np.random.default_rng(0)
    return [encode(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(3)]


def add(client: TestClient, photo: bytes, **query: Any):
    reply = client.post("/gallery/images", content=photo, headers=RAW, params=query)
    assert reply.status_code == 200, reply.text
    return reply


def scratch_files(client: TestClient) -> list[Path]:
    folder = client.app.state.galleries._folder / ".scratch"
    return [path for path in folder.rglob("*") if path.is_file()]


def test_a_removed_gallery_is_404_and_its_name_is_free(serving, photos: list[bytes], tmp_path: Path) -> None:
    client = serving(FakeEncoder("alpha"), FakeEncoder("beta", embedding_dim=8), state_dir=tmp_path)
    add(client, photos[0], gallery="mine", id="a", encoder="beta")
    add(client, photos[1], gallery="other", id="b")
    assert client.delete("/gallery", params={"gallery": "mine"}).status_code == 204
    assert not (tmp_path / "galleries" / "mine").exists()
    assert scratch_files(client) == []
    for method, path in [
        ("DELETE", "/gallery"), ("GET", "/gallery"), ("GET", "/gallery/images"), ("GET", "/gallery/images/a"),
        ("GET", "/gallery/backup"), ("GET", "/gallery/export"), ("GET", "/neighbors?id=a"),
    ]:  # fmt: skip
        query = {"gallery": "mine", **({"id": "a"} if "?" in path else {})}
        reply = client.request(method, path.partition("?")[0], params=query)
        assert (reply.status_code, reply.json()["error"]["param"]) == (404, "gallery")
    assert client.get("/gallery").json()["galleries"] == ["default", "other"]
    add(client, photos[0], gallery="mine", id="c", encoder="alpha")
    assert client.get("/gallery", params={"gallery": "mine"}).json()["encoder"]["name"] == "alpha"
    for name in ("..", "../other", ".scratch", ""):
        assert client.delete("/gallery", params={"gallery": name}).status_code == 404
    assert client.get("/gallery", params={"gallery": "other"}).json()["count"] == 1


def test_the_default_gallery_is_emptied_and_takes_another_encoder(serving, photos: list[bytes]) -> None:
    client = serving(FakeEncoder("alpha"), FakeEncoder("beta", embedding_dim=8))
    add(client, photos[0], encoder="beta")
    assert client.delete("/gallery").status_code == 204
    info = client.get("/gallery").json()
    assert (info["count"], info["encoder"], info["galleries"]) == (0, None, ["default"])
    assert client.post("/neighbors", content=photos[0]).json()["neighbors"] == []
    add(client, photos[0], encoder="alpha")
    assert client.get("/gallery").json()["encoder"]["name"] == "alpha"


def test_the_sample_photos_do_not_come_back(serving, tmp_path: Path, until: Callable[..., None]) -> None:
    client = serving(state_dir=tmp_path, sample_gallery=True)
    until(lambda: client.get("/gallery").json()["count"] >= 8)
    assert client.delete("/gallery").status_code == 204
    client.__exit__(None, None, None)
    again = serving(state_dir=tmp_path, sample_gallery=True)
    state = again.app.state
    from patchsight_serve.sample_gallery import index_samples

    again.portal.call(index_samples, state.service, state.galleries)
    assert again.get("/gallery").json()["count"] == 0


def test_what_a_killed_server_left_is_removed_at_the_start(serving, tmp_path: Path) -> None:
    left = tmp_path / "galleries" / ".scratch" / "0123" / "4567"
    left.mkdir(parents=True)
    (left / "gallery.sqlite").write_bytes(b"x")
    client = serving(state_dir=tmp_path)
    assert scratch_files(client) == []
    assert client.get("/gallery").json()["galleries"] == ["default"]


def scope(method: str, path: str, query: str) -> dict[str, Any]:
    return {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": method,
        "path": path, "raw_path": path.encode(), "query_string": query.encode(), "headers": [], "scheme": "http",
        "client": None, "server": ("testserver", 80), "root_path": "", "state": {},
    }  # fmt: skip


def ask(client: TestClient, method: str, path: str, query: str, receive: Any) -> list[dict[str, Any]]:
    """What the application sends to a client that is not as it should be."""
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async def run() -> None:
        await client.app(scope(method, path, query), receive, send)

    client.portal.call(run)
    return sent


@pytest.mark.parametrize("path", ["/gallery/restore", "/gallery/import"])
def test_of_a_body_that_is_not_finished_nothing_is_left(serving, path: str) -> None:
    client = serving()
    parts = [{"type": "http.request", "body": bytes(3_000_000), "more_body": True}, {"type": "http.disconnect"}]

    async def leaves() -> dict[str, Any]:
        return parts.pop(0)

    assert ask(client, "POST", path, "gallery=x", leaves) == []
    assert scratch_files(client) == []
    assert client.get("/gallery").json()["galleries"] == ["default"]


def test_a_body_that_stops_to_arrive_is_504_and_a_slow_one_is_not(serving) -> None:
    client = serving(timeout_s=0.5)

    async def stops() -> dict[str, Any]:
        await asyncio.sleep(60)
        raise AssertionError

    start, body = ask(client, "POST", "/gallery/restore", "gallery=x", stops)
    assert start["status"] == 504
    assert "less than 1,048,576 bytes arrived within 0.5 s" in json.loads(body["body"])["error"]["message"]
    left = [2_000_000] * 4

    async def slow() -> dict[str, Any]:  # longer than timeout_s in all
        await asyncio.sleep(0.2)
        return {"type": "http.request", "body": bytes(left.pop()), "more_body": bool(left)}

    start, body = ask(client, "POST", "/gallery/restore", "gallery=x", slow)
    assert start["status"] == 400  # zeros are no gallery, but all of them arrived
    assert scratch_files(client) == []


@pytest.mark.parametrize("path", ["/gallery/backup", "/gallery/export"])
def test_a_download_is_whole_and_leaves_nothing(
    client: TestClient, photos: list[bytes], monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    for i, photo in enumerate(photos):
        add(client, photo, id=f"i{i}")
    whole = client.get(path).content
    monkeypatch.setattr(file_reply, "CHUNK", 1000)
    assert client.get(path).content == whole
    assert len(whole) > 3000
    assert scratch_files(client) == []
    messages = [{"type": "http.request", "body": b"", "more_body": False}]

    async def leaves() -> dict[str, Any]:
        return messages.pop() if messages else {"type": "http.disconnect"}

    sent = ask(client, "GET", path, "", leaves)
    assert sum(len(message.get("body", b"")) for message in sent) < len(whole)
    assert scratch_files(client) == []


def test_a_reply_to_somebody_who_left_ends_and_closes_its_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(5 * file_reply.CHUNK))
    file = (tmp_path / "f").open("rb")
    sent: list[int] = []

    async def receive() -> dict[str, Any]:
        while len(sent) < 3:
            await asyncio.sleep(0)
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(len(message.get("body", b"")))
        await asyncio.sleep(0.01)

    with pytest.raises(ClientDisconnect):
        asyncio.run(FileReply(file, "x/y", "f")({}, receive, send))
    assert file.closed
    assert sum(sent) < 5 * file_reply.CHUNK


def test_every_route_is_documented(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert "delete" in paths["/gallery"]
    names = {
        path: {parameter["name"] for parameter in operation.get("parameters", [])}
        for path in ("backup", "restore", "export", "import")
        for operation in paths[f"/gallery/{path}"].values()
    }
    assert names == {
        "backup": {"gallery"}, "restore": {"gallery", "replace", "skip_damaged"}, "export": {"gallery"},
        "import": {"gallery", "replace"},
    }  # fmt: skip


def test_a_server_of_several_processes_has_none_of_this(serving, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    client = serving(processes=2)
    for method, path in [
        ("DELETE", "/gallery"), ("GET", "/gallery/backup"), ("GET", "/gallery/export"), ("POST", "/gallery/restore"),
        ("POST", "/gallery/import"),
    ]:  # fmt: skip
        reply = client.request(method, path)
        assert (reply.status_code, "--processes 1" in reply.text) == (404, True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("path", "name"), [("/gallery/backup", "gallery.sqlite"), ("/gallery/export", "gallery.parquet")]
)
def test_a_disk_that_is_full_is_507_and_reads_go_on(
    client: TestClient, photos: list[bytes], monkeypatch: pytest.MonkeyPatch, path: str, name: str
) -> None:
    for i, photo in enumerate(photos):
        add(client, photo, id=f"i{i}")
    scratch = client.app.state.galleries.scratch
    make = scratch.make

    def full() -> Path:
        folder: Path = make()
        (folder / name).symlink_to("/dev/full")
        return folder

    monkeypatch.setattr(scratch, "make", full)
    reply = client.get(path)
    assert (reply.status_code, reply.json()["error"]["code"]) == (507, "storage_full"), reply.text
    assert client.get("/neighbors?id=i0").status_code == 200
    assert scratch_files(client) == []
