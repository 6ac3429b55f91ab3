"""Galleries to and from the disk by both clients, against a real server; the oracle is the same asked raw. What goes
wrong on the way leaves what was there."""

import errno
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pandas
import pyarrow.parquet as pq
import pytest
from in_loop import both
from on_socket import on_socket

from patchsight_serve import client_files
from patchsight_serve.app import create_app
from patchsight_serve.dataset import read_dataset
from patchsight_serve.errors import Conflict, DamagedFile, InvalidRequest, NotFound, PatchsightError, TooLarge
from patchsight_serve.fake_encoder import FakeEncoder
from patchsight_serve.sample_gallery import SAMPLES
from patchsight_serve.settings import ServeSettings

MIB = 1024 * 1024


class Watched:
    """An application, and what is asked of it below /gallery/; `instead` answers in its place while it has any."""

    def __init__(self, app: Any) -> None:
        self.app, self.asked, self.instead = app, [], []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"].startswith("/gallery/"):
            self.asked.append(scope)
            if self.instead:
                return await self.instead.pop(0)(scope, receive, send)
        return await self.app(scope, receive, send)


@contextmanager
def listening(folder: Path, **settings: Any) -> Iterator[tuple[str, Watched]]:
    encoders = {name: FakeEncoder(name, embedding_dim=dim) for name, dim in (("alpha", 8), ("beta", 12))}
    app = Watched(create_app(encoders, ServeSettings(sample_gallery=False, state_dir=folder, **settings)))
    with on_socket(app, "critical") as url:
        yield url, app


def fill(client: Any, count: int = 6, **query: Any) -> None:
    samples = read_dataset(SAMPLES)
    images = [(samples.read(i), {"id": f"{i}", "label": "ab"[i % 2], "metadata": {"n": i}}) for i in range(count)]
    assert all(added.created for added in client.add_each(images, **query))


def everything(client: Any, name: str) -> Any:
    images = list(client.gallery_images(gallery=name))
    return images, [client.neighbors_of(image["id"], gallery=name, k=5) for image in images]


@both
def test_a_gallery_goes_to_a_file_and_comes_back_as_another(kind: Any, tmp_path: Path) -> None:
    file, late = tmp_path / "mine.sqlite", tmp_path / "late.sqlite"
    with listening(tmp_path / "state") as (url, app), kind(url) as client:
        fill(client, gallery="mine")
        client.backup(file, gallery="mine")
        assert file.read_bytes()[:16] == b"SQLite format 3\x00"
        told = client.restore(str(file), gallery="twin")
        assert (told["gallery"], told["count"], told["left_out"]) == ("twin", 6, [])
        assert everything(client, "twin") == everything(client, "mine")
        (request,) = [scope for scope in app.asked if scope["path"] == "/gallery/restore"]
        assert dict(request["headers"])[b"content-length"] == str(file.stat().st_size).encode()
        with pytest.raises(Conflict, match="twin"):
            client.restore(file, gallery="twin")
        client.remove_gallery(gallery="twin")
        with pytest.raises(NotFound, match="twin"):
            client.backup(late, gallery="twin")
        with pytest.raises(NotFound, match="twin"):
            client.remove_gallery(gallery="twin")
        assert client.restore(file, gallery="mine", replace=True)["count"] == 6
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["mine.sqlite"]


@both
def test_vectors_go_to_parquet_and_come_back(kind: Any, tmp_path: Path) -> None:
    file = tmp_path / "mine.parquet"
    file.write_text("what was there before")
    with listening(tmp_path / "state") as (url, _), kind(url, encoder="beta") as client:
        fill(client, gallery="mine", encoder="beta")
        client.export(file, gallery="mine")
        assert file.read_bytes() == httpx.get(f"{url}/gallery/export", params={"gallery": "mine"}).content
        told = client.import_file(file, gallery="twin")
        assert (told["created"], told["unchanged"], told["encoder"]["name"]) == (6, 0, "beta")
        assert client.import_file(file, gallery="twin")["unchanged"] == 6
        assert everything(client, "twin") == everything(client, "mine")
        fill(client, 1, gallery="other", encoder="alpha")
        with pytest.raises(Conflict, match="beta"):
            client.import_file(file, gallery="other")


def test_what_docs_say_of_the_columns(tmp_path: Path) -> None:
    with listening(tmp_path / "state") as (url, _), httpx.Client(base_url=url) as http:
        photo = read_dataset(SAMPLES).read(0)
        http.post('/gallery/images?id=a&label=x&metadata={"n": 1}', content=photo)
        http.post("/gallery/images?id=b", content=read_dataset(SAMPLES).read(1))
        (tmp_path / "g.parquet").write_bytes(http.get("/gallery/export").content)
    schema = pq.read_schema(tmp_path / "g.parquet")
    types = {name: str(schema.field(name).type) for name in schema.names}
    assert types == {
        "id": "string", "label": "string", "metadata": "string", "sha256": "string",
        "embedding": "fixed_size_list<element: float>[8]",
    }  # fmt: skip
    frame = pandas.read_parquet(tmp_path / "g.parquet").set_index("id")
    vectors = np.stack(frame["embedding"])
    assert (vectors.dtype, vectors.shape) == (np.float32, (2, 8))
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)
    assert frame["metadata"].to_dict() == {"a": '{"n":1}', "b": "{}"}
    assert frame["label"].isna().to_dict() == {"a": False, "b": True}


@both
def test_another_encoder_takes_a_gallery_over(kind: Any, tmp_path: Path) -> None:
    with listening(tmp_path / "state") as (url, _), kind(url) as client:
        fill(client)
        assert client.reembed("beta")["total"] == 6
        for _ in range(600):
            if client.gallery()["reembedding"] is None:
                break
            time.sleep(0.05)
        assert client.gallery()["encoder"]["name"] == "beta"
        with pytest.raises(Conflict, match="beta"):
            client.reembed("beta")
        with pytest.raises(NotFound, match="gamma"):
            client.reembed("gamma")


@both
def test_what_is_wrong_with_a_file_names_it(kind: Any, tmp_path: Path) -> None:
    with listening(tmp_path / "state", max_restore_bytes=200_000) as (url, app), kind(url) as client:
        fill(client, gallery="mine")
        text, large, damaged = tmp_path / "text.sqlite", tmp_path / "large.parquet", tmp_path / "damaged.sqlite"
        text.write_text("a text")
        large.write_bytes(bytes(200_001))
        client.backup(damaged, gallery="mine")
        pages = bytearray(damaged.read_bytes())
        assert len(pages) <= 200_000
        vector = pages.index(b'{"n":3}')
        pages[vector + 5] ^= 1
        damaged.write_bytes(pages)
        for call, error, file in [
            (client.restore, InvalidRequest, text), (client.import_file, InvalidRequest, text),
            (client.restore, TooLarge, large), (client.import_file, TooLarge, large),
            (client.restore, DamagedFile, damaged),
        ]:  # fmt: skip
            with pytest.raises(error, match=str(file)) as caught:
                call(file, gallery="new")
            assert str(caught.value) == caught.value.message
        asked = len(app.asked)
        for call, file, says in [
            (client.restore, tmp_path / "none", "No such file"), (client.import_file, tmp_path, "Is a directory"),
            (client.export, tmp_path / "none" / "a.parquet", "No such file"), (client.backup, tmp_path, "is a folder"),
        ]:  # fmt: skip
            with pytest.raises(PatchsightError, match=f"^{file}: {says}"):
                call(file, gallery="mine")
        assert len(app.asked) == asked  # the server was not troubled
        assert client.restore(damaged, gallery="new", skip_damaged=True)["left_out"] == ["3"]


async def breaks_off(_: Any, receive: Any, send: Any) -> None:
    while (await receive()).get("more_body"):
        pass
    headers = [(b"content-length", b"100"), (b"content-type", b"application/vnd.sqlite3")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"half"})


@both
def test_a_broken_connection_leaves_what_was_there(kind: Any, tmp_path: Path) -> None:
    file = tmp_path / "mine.sqlite"
    with listening(tmp_path / "state") as (url, app), kind(url) as client:
        fill(client, gallery="mine")
        file.write_text("before")
        app.asked.clear()
        app.instead[:] = [breaks_off, breaks_off]
        with pytest.raises(PatchsightError, match=url):
            client.backup(file, gallery="mine")
        assert (len(app.asked), file.read_text()) == (2, "before")  # it was asked for once more
        app.instead[:] = [breaks_off]
        client.backup(file, gallery="mine")
        assert client.restore(file, gallery="twin")["count"] == 6
        app.asked.clear()
        app.instead[:] = [breaks_off]
        with pytest.raises(PatchsightError, match=url):
            client.restore(file, gallery="third")  # whether that was done nobody knows, and it is not done again
        assert len(app.asked) == 1
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["mine.sqlite"]


@both
def test_a_disk_that_is_full_leaves_what_was_there(kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    file = tmp_path / "mine.parquet"
    file.write_text("before")
    with listening(tmp_path / "state") as (url, _), kind(url) as client:
        fill(client)
        monkeypatch.setattr(client_files, "sync", full)
        with pytest.raises(PatchsightError, match=f"^{file}: No space left"):
            client.export(file)
    assert file.read_text() == "before"
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["mine.parquet"]


@both
def test_what_comes_in_place_of_a_file_is_not_kept(kind: Any, tmp_path: Path) -> None:
    async def login(_: Any, __: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/html")]})
        await send({"type": "http.response.body", "body": b"<form>"})

    with listening(tmp_path / "state") as (url, app), kind(url) as client:
        app.instead[:] = [login]
        with pytest.raises(PatchsightError, match="text/html"):
            client.export(tmp_path / "a.parquet")
    assert not (tmp_path / "a.parquet").exists()


@both
def test_a_large_file_is_never_in_memory_as_a_whole(kind: Any, tmp_path: Path) -> None:
    count, seen = 32, 0

    async def sends(_: Any, __: Any, send: Any) -> None:
        headers = [(b"content-type", b"application/vnd.sqlite3")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for i in range(count):
            await send({"type": "http.response.body", "body": bytes([i]) * MIB, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def takes(_: Any, receive: Any, send: Any) -> None:
        nonlocal seen
        more = True
        while more:
            part = await receive()
            seen, more = seen + len(part["body"]), part["more_body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    file = tmp_path / "large"
    with listening(tmp_path / "state") as (url, app), kind(url) as client:
        tracemalloc.start()
        try:
            app.instead[:] = [sends, takes]
            client.backup(file)
            client.restore(file)
            _, most = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert (file.stat().st_size, seen) == (count * MIB, count * MIB)
    assert file.read_bytes()[::MIB] == bytes(range(count))
    assert most < 16 * MIB  # of the server's and the client's buffers together
