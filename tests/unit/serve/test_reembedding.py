"""A gallery under another encoder: as if it had been filled with it, and as before until then."""

import json
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from patchsight_serve import reembedding
from patchsight_serve.embedded_galleries import EmbeddedGalleries as Galleries
from patchsight_serve.errors import NotFound, Overloaded, StorageFull, Superseded
from patchsight_serve.fake_encoder import FakeEncoder
from patchsight_serve.item import Identity, Item, NewImage
from patchsight_serve.nearest import normalize
from patchsight_serve.next_vectors import NextVectors

OLD, NEW = Identity("old", "a" * 64), Identity("new", "b" * 64)


@pytest.fixture
def photos(encode: Callable[..., bytes]) -> list[bytes]:
    """Twelve different PNGs of 32 x 32."""
    rng = np.random.default_rng(0)
    return [encode(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(12)]


class Gated(FakeEncoder):
    """Waits at a gate, which can be closed, and counts."""

    def __init__(self) -> None:
        super().__init__("beta", embedding_dim=8)
        self.gate, self.images = threading.Event(), 0
        self.gate.set()
        self.waiting = threading.Event()

    def run(self, images, outputs):
        if not self.gate.is_set():
            self.waiting.set()
            assert self.gate.wait(60)
        self.images += len(images)
        return super().run(images, outputs)


def add(client: TestClient, photos: list[bytes], gallery: str, encoder: str, first: int = 0) -> None:
    items = [{"id": f"i{first + i:02d}", "label": "ab"[i % 2], "metadata": {"n": i}} for i in range(len(photos))]
    files = [("images", (f"{i}.png", photo)) for i, photo in enumerate(photos)]
    query = {"gallery": gallery, "encoder": encoder}
    reply = client.post("/gallery/images", files=files, data={"items": json.dumps(items)}, params=query)
    assert reply.status_code == 200, reply.text
    assert all(result["created"] for result in reply.json()["results"])


def everything(client: TestClient, gallery: str) -> dict[str, Any]:
    query = {"gallery": gallery}
    info = client.get("/gallery", params=query).json()
    images = client.get("/gallery/images", params=query).json()["images"]
    seen: dict[str, Any] = {"count": info["count"], "encoder": info["encoder"], "images": images}
    for image in images:
        id = image["id"]
        seen[id] = [
            client.get("/neighbors", params={**query, "id": id, "k": 100}).json(),
            client.get(f"/gallery/images/{id}/thumbnail", params=query).content,
            client.get(f"/gallery/images/{id}/image", params=query).content,
        ]
    return seen


def begin(client: TestClient, gallery: str = "mine", encoder: str = "beta"):
    return client.post("/gallery/reembed", params={"gallery": gallery, "encoder": encoder})


def progress(client: TestClient, gallery: str = "mine") -> dict[str, Any] | None:
    found: dict[str, Any] | None = client.get("/gallery", params={"gallery": gallery}).json()["reembedding"]
    return found


def test_afterwards_it_is_as_if_the_other_encoder_had_filled_it(
    serving, photos: list[bytes], tmp_path: Path, until: Callable[..., None]
) -> None:
    client = serving(FakeEncoder("alpha"), Gated(), state_dir=tmp_path)
    add(client, photos, "mine", "alpha")
    add(client, photos, "fresh", "beta")
    reply = begin(client)
    assert reply.status_code == 202
    beta = client.get("/gallery", params={"gallery": "fresh"}).json()["encoder"]
    assert reply.json() == {"encoder": beta, "done": 0, "total": 12, "failed": [], "error": None}
    until(lambda: progress(client) is None)
    after = everything(client, "mine")
    assert after == everything(client, "fresh")
    assert after["encoder"] == beta
    assert (
        client.post("/neighbors", content=photos[0], params={"gallery": "mine", "encoder": "alpha"}).status_code == 409
    )
    client.__exit__(None, None, None)
    again = serving(FakeEncoder("alpha"), Gated(), state_dir=tmp_path)
    assert everything(again, "mine") == after


def test_until_then_it_answers_as_before_and_what_changes_meanwhile_is_in_both(
    serving, photos: list[bytes], monkeypatch: pytest.MonkeyPatch, until: Callable[..., None]
) -> None:
    monkeypatch.setattr(reembedding, "BATCH", 3)
    beta = Gated()
    client = serving(FakeEncoder("alpha"), beta)
    add(client, photos[:10], "mine", "alpha")
    before = everything(client, "mine")
    beta.gate.clear()
    assert begin(client).status_code == 202
    assert beta.waiting.wait(60)
    assert everything(client, "mine") == before
    assert begin(client).status_code == 202  # the same once more is the same
    told = progress(client)
    assert told is not None
    assert (told["done"], told["total"], told["failed"]) == (0, 10, [])
    add(client, photos[10:], "mine", "alpha", first=10)
    query = {"gallery": "mine"}
    assert client.delete("/gallery/images/i01", params=query).status_code == 204
    assert client.patch("/gallery/images/i02", params=query, json={"label": "other"}).status_code == 200
    replaced = client.post("/gallery/images", content=photos[1], params={**query, "id": "i03", "replace": True})
    assert replaced.status_code == 200
    meanwhile = everything(client, "mine")
    assert meanwhile["encoder"]["name"] == "alpha"
    beta.gate.set()
    until(lambda: progress(client) is None)
    after = everything(client, "mine")
    assert after["encoder"]["name"] == "beta"
    assert after["images"] == meanwhile["images"]
    for image in meanwhile["images"]:
        item = {"id": image["id"], "label": image["label"], "metadata": image["metadata"]}
        data = {"items": json.dumps([item])}
        files = [("images", ("x.png", meanwhile[image["id"]][2]))]
        client.post("/gallery/images", files=files, data=data, params={"gallery": "fresh", "encoder": "beta"})
    assert after == everything(client, "fresh")


def test_a_server_that_is_stopped_leaves_it_as_it_was_and_goes_on_when_asked_again(
    serving, photos: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, until: Callable[..., None]
) -> None:
    monkeypatch.setattr(reembedding, "BATCH", 4)
    first = Gated()
    client = serving(FakeEncoder("alpha"), first, state_dir=tmp_path)
    add(client, photos, "mine", "alpha")
    before = everything(client, "mine")
    whole = client.app.state.service.embed_images
    calls = []

    async def stopping(*args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) > 2:
            raise Overloaded("busy")  # for ever
        return await whole(*args, **options)

    monkeypatch.setattr(client.app.state.service, "embed_images", stopping)
    begin(client)
    until(lambda: (progress(client) or {}).get("done") == 8)
    client.__exit__(None, None, None)
    second = Gated()
    again = serving(FakeEncoder("alpha"), second, state_dir=tmp_path)
    assert progress(again) is None
    assert everything(again, "mine") == before
    already = second.images
    assert begin(again).status_code == 202
    until(lambda: progress(again) is None)
    assert second.images == already + 4
    assert everything(again, "mine")["encoder"]["name"] == "beta"


def test_a_busy_server_is_waited_for(
    serving, photos: list[bytes], monkeypatch: pytest.MonkeyPatch, until: Callable[..., None]
) -> None:
    monkeypatch.setattr(reembedding, "PAUSE_S", 0.0)
    client = serving(FakeEncoder("alpha"), Gated())
    add(client, photos, "mine", "alpha")
    service = client.app.state.service
    whole, asked = service.embed_images, []

    async def busy_at_first(*args: Any, bulk: bool | None = None) -> Any:
        asked.append(bulk)
        if len(asked) < 4:
            raise Overloaded("the queue is full")
        return await whole(*args, bulk=bulk)

    monkeypatch.setattr(service, "embed_images", busy_at_first)
    begin(client)
    until(lambda: progress(client) is None)
    assert asked == [True] * 4
    assert client.get("/gallery", params={"gallery": "mine"}).json()["encoder"]["name"] == "beta"


def test_an_image_that_cannot_be_embedded_keeps_all_as_it_was(
    serving, photos: list[bytes], until: Callable[..., None]
) -> None:
    class Choosy(FakeEncoder):
        def run(self, images, outputs):
            found = super().run(images, outputs)
            for values in found.values():
                values[(images[:, 0, 0] == bad).all(axis=1)] = np.nan
            return found

    import io

    from PIL import Image

    bad = np.asarray(Image.open(io.BytesIO(photos[5])))[0, 0]
    client = serving(FakeEncoder("alpha"), Choosy("beta", embedding_dim=8))
    add(client, photos, "mine", "alpha")
    before = everything(client, "mine")
    begin(client)
    until(lambda: (progress(client) or {}).get("error"))
    told = progress(client)
    assert told is not None
    assert [entry["id"] for entry in told["failed"]] == ["i05"]
    assert "NaN" in told["failed"][0]["message"]
    assert told["error"] == "1 images cannot be embedded: replace or remove them"
    assert everything(client, "mine") == before
    client.delete("/gallery/images/i05", params={"gallery": "mine"})
    assert begin(client).status_code == 202
    until(lambda: progress(client) is None)
    info = client.get("/gallery", params={"gallery": "mine"}).json()
    assert (info["count"], info["encoder"]["name"]) == (11, "beta")


def test_what_cannot_be_begun_says_why(
    serving, photos: list[bytes], tmp_path: Path, until: Callable[..., None]
) -> None:
    without = serving(FakeEncoder("alpha"), Gated(), state_dir=tmp_path, keep_originals=False)
    add(without, photos[:4], "mine", "alpha")
    without.__exit__(None, None, None)
    beta = Gated()
    client = serving(FakeEncoder("alpha"), beta, FakeEncoder("gamma", embedding_dim=4), state_dir=tmp_path)
    add(client, photos[4:], "mine", "alpha", first=4)
    add(client, photos, "other", "alpha")

    def refused(**query: str) -> tuple[int, str]:
        reply = begin(client, **query)
        return reply.status_code, reply.json()["error"]["message"]

    assert refused() == (
        409,
        "4 of 12 images of gallery 'mine' have no original: add them again with replace=true, or remove them",
    )
    assert refused(encoder="alpha") == (409, "gallery 'mine' holds vectors of encoder 'alpha' already")
    assert refused(encoder="nobody")[0] == 404
    assert refused(gallery="nobody")[0] == 404
    assert refused(gallery="default") == (409, "gallery 'default' is empty: it takes images of any encoder")
    assert client.post("/gallery/reembed").status_code == 400
    beta.gate.clear()
    assert begin(client, gallery="other").status_code == 202
    assert refused(gallery="other", encoder="gamma") == (409, "gallery 'other' is being embedded by 'beta'")
    beta.gate.set()
    until(lambda: progress(client, "other") is None)


def test_a_gallery_that_is_removed_meanwhile_is_gone(serving, photos: list[bytes], until: Callable[..., None]) -> None:
    beta = Gated()
    client = serving(FakeEncoder("alpha"), beta)
    add(client, photos, "mine", "alpha")
    beta.gate.clear()
    begin(client)
    assert beta.waiting.wait(60)
    assert client.delete("/gallery", params={"gallery": "mine"}).status_code == 204
    beta.gate.set()
    until(lambda: not client.app.state.reembeddings._tasks)
    assert client.get("/gallery").json()["galleries"] == ["default"]
    add(client, photos[:2], "mine", "alpha")
    assert progress(client) is None


def test_a_backup_of_the_middle_is_of_the_old_encoder(
    serving, photos: list[bytes], monkeypatch: pytest.MonkeyPatch, until: Callable[..., None]
) -> None:
    monkeypatch.setattr(reembedding, "BATCH", 4)
    beta = Gated()
    client = serving(FakeEncoder("alpha"), beta)
    add(client, photos, "mine", "alpha")
    NextVectors(client.app.state.galleries.get("mine"), NEW).put({1: np.eye(8, dtype=np.float32)[0]})
    body = client.get("/gallery/backup", params={"gallery": "mine"}).content
    reply = client.post("/gallery/restore", content=body, params={"gallery": "twin"})
    assert reply.status_code == 200, reply.text
    assert everything(client, "twin") == everything(client, "mine")
    assert begin(client, gallery="twin").status_code == 202
    until(lambda: progress(client, "twin") is None)
    assert begin(client).status_code == 202  # begun for another encoder: it starts over
    until(lambda: progress(client) is None)
    assert everything(client, "twin") == everything(client, "mine")


def vectors(encoder: Identity, count: int = 60, dim: int = 8) -> np.ndarray:
    rng = np.random.default_rng(ord(encoder.name[0]))
    return normalize(rng.standard_normal((count, dim)).astype(np.float32))


def filled(galleries: Galleries) -> None:
    rows = vectors(OLD)
    images = [NewImage(Item(f"i{i:02d}"), str(i).encode(), b"thumb", row) for i, row in enumerate(rows)]
    galleries.get("mine", create=True).add(images, OLD)


def prepared(galleries: Galleries, encoder: Identity) -> NextVectors:
    gallery = galleries.get("mine")
    waiting = NextVectors(gallery, encoder)
    todo = waiting.todo(0, 1000)
    rows = vectors(encoder)
    waiting.put({entry.row.key: rows[int(entry.row.id[1:])] for entry in todo})
    return waiting


def ranking(encoder: Identity, i: int) -> list[str]:
    rows = vectors(encoder).astype(np.float64)
    order = sorted(range(len(rows)), key=lambda j: (-float(rows[j] @ rows[i]), f"i{j:02d}"))
    return [f"i{j:02d}" for j in order if j != i][:10]


def test_readers_see_the_old_or_the_new_and_never_a_mixture(tmp_path: Path) -> None:
    galleries = Galleries(tmp_path / "g")
    filled(galleries)
    right = {i: {encoder: ranking(encoder, i) for encoder in (OLD, NEW)} for i in range(60)}
    stop, wrong, seen = threading.Event(), [], {OLD: 0, NEW: 0}

    def read(seed: int) -> None:
        rng = np.random.default_rng(seed)
        while not stop.is_set():
            i = int(rng.integers(60))
            gallery = galleries.get("mine")
            try:
                (query,) = gallery.vectors([f"i{i:02d}"])
                found = [n.id for n in gallery.neighbors(query, 10, leave_out=[f"i{i:02d}"])]
            except Superseded:
                continue
            if found != right[i][gallery.encoder]:
                wrong.append((i, gallery.encoder, found))
            seen[gallery.encoder] += 1

    readers = [threading.Thread(target=read, args=(seed,)) for seed in range(3)]
    for reader in readers:
        reader.start()
    try:
        for turn in range(12):
            waiting = prepared(galleries, (NEW, OLD)[turn % 2])
            assert galleries.exchange(galleries.get("mine"), waiting.take_over)
    finally:
        stop.set()
        for reader in readers:
            reader.join()
    assert wrong == []
    assert min(seen.values()) > 0
    galleries.close()


def test_whoever_holds_the_gallery_of_before_is_told(tmp_path: Path) -> None:
    galleries = Galleries(tmp_path / "g")
    filled(galleries)
    old = galleries.get("mine")
    assert galleries.exchange(old, prepared(galleries, NEW).take_over)
    for call in (lambda: old.get("i01"), lambda: old.neighbors(vectors(OLD)[0]), lambda: old.delete("i01")):
        with pytest.raises(Superseded, match="was embedded anew meanwhile; ask again"):
            call()
    new = galleries.get("mine")
    assert new.encoder == NEW
    new.delete("i01")
    assert len(new) == 59
    galleries.delete("mine")
    with pytest.raises(NotFound):
        new.get("i02")
    galleries.close()


def test_it_does_not_take_over_before_all_are_there_and_sound(tmp_path: Path) -> None:
    galleries = Galleries(tmp_path / "g")
    filled(galleries)
    gallery = galleries.get("mine")
    waiting = prepared(galleries, NEW)
    gallery.add([NewImage(Item("late"), b"x", b"thumb", vectors(OLD)[0])], OLD)
    assert waiting.take_over() is None
    (entry,) = waiting.todo(0, 100)
    assert entry.row.id == "late"
    waiting.put({entry.row.key: vectors(NEW)[0], 999: vectors(NEW)[1]})  # of an image that is gone: not kept
    assert waiting.done() == 61
    with gallery.writing() as record, record.transaction():
        record.execute("UPDATE next_vectors SET vector = zeroblob(32) WHERE key = 7")
    assert waiting.take_over() is None
    assert [entry.row.key for entry in waiting.todo(0, 100)] == [7]
    waiting.put({7: vectors(NEW)[6]})
    pages = gallery.record._writer.execute("PRAGMA page_count").fetchone()[0]
    gallery.record._writer.execute(f"PRAGMA max_page_count = {pages}")
    blob = normalize(np.ones(20_000, np.float32))
    with pytest.raises(StorageFull):
        waiting.put(dict.fromkeys(range(1, 30), blob))
    gallery.record._writer.execute("PRAGMA max_page_count = 1000000")
    assert [n.id for n in gallery.neighbors(vectors(OLD)[3], 3)][0] == "i03"
    assert galleries.exchange(gallery, waiting.take_over)
    assert galleries.get("mine").neighbors(vectors(NEW)[6], 1)[0].id == "i06"
    galleries.close()


def test_an_original_that_is_damaged_or_gone_is_not_embedded(tmp_path: Path) -> None:
    galleries = Galleries(tmp_path / "g")
    filled(galleries)
    gallery = galleries.get("mine")
    with gallery.writing() as record, record.transaction():
        record.execute("UPDATE pictures SET original = x'00' WHERE key = 3")
        record.execute("UPDATE pictures SET original = NULL WHERE key = 5")
    todo = {entry.row.id: entry.original for entry in NextVectors(gallery, NEW).todo(0, 1000)}
    assert (str(todo.pop("i02")), str(todo.pop("i04"))) == ("its original is damaged", "its original was not kept")
    assert todo == {f"i{i:02d}": str(i).encode() for i in range(60) if i not in (2, 4)}
    galleries.close()


def test_a_failure_while_it_takes_over_leaves_all_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    galleries = Galleries(tmp_path / "g")
    filled(galleries)
    gallery = galleries.get("mine")
    waiting = prepared(galleries, NEW)
    record = gallery.record

    class Full(Exception):
        pass

    retire = record.retire

    def fail(error: Any) -> None:
        retire(error)
        if error is not None:
            raise Full

    monkeypatch.setattr(record, "retire", fail)
    with pytest.raises(Full):
        galleries.exchange(gallery, waiting.take_over)
    monkeypatch.undo()
    assert galleries.get("mine") is gallery
    assert gallery.encoder == OLD
    assert [n.id for n in gallery.neighbors(gallery.vectors(["i05"])[0], 11)][1:] == ranking(OLD, 5)
    assert galleries.exchange(gallery, waiting.take_over)
    assert galleries.get("mine").encoder == NEW
    galleries.close()


KILLED = """
    import os, signal, sys
    from pathlib import Path
    import numpy as np
    from patchsight_serve.embedded_galleries import EmbeddedGalleries as Galleries
    from patchsight_serve.item import Identity
    from patchsight_serve.next_vectors import NextVectors
    from patchsight_serve.record import Record
    folder, where = sys.argv[1:]
    galleries = Galleries(Path(folder))
    gallery = galleries.get("mine")
    waiting = NextVectors(gallery, Identity("new", "b" * 64))
    todo = waiting.todo(0, 1000)
    rows = np.load(Path(folder).parent / "new.npy")
    count = 20 if where == "half" else 60
    waiting.put({entry.row.key: rows[int(entry.row.id[1:])] for entry in todo[:count]})
    def deadly(*_):
        os.kill(os.getpid(), signal.SIGKILL)
    if where == "half":
        deadly()
    Record.retire = deadly
    galleries.exchange(gallery, waiting.take_over)
"""


@pytest.mark.parametrize("where", ["half", "before commit"])
def test_a_kill_leaves_the_old_state_and_it_can_go_on(tmp_path: Path, where: str) -> None:
    galleries = Galleries(tmp_path / "galleries")
    filled(galleries)
    galleries.close()
    np.save(tmp_path / "new.npy", vectors(NEW))
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path / "galleries"), where]
    assert subprocess.run(command, check=False).returncode == -9
    galleries = Galleries(tmp_path / "galleries")
    gallery = galleries.get("mine")
    assert gallery.encoder == OLD
    assert gallery.damaged == []
    assert [n.id for n in gallery.neighbors(gallery.vectors(["i05"])[0], 11)][1:] == ranking(OLD, 5)
    assert len(NextVectors(gallery, NEW).todo(0, 1000)) == (40 if where == "half" else 0)
    assert galleries.exchange(gallery, prepared(galleries, NEW).take_over)
    gallery = galleries.get("mine")
    assert [n.id for n in gallery.neighbors(gallery.vectors(["i05"])[0], 11)][1:] == ranking(NEW, 5)
    galleries.close()
