"""A backup holds a prefix of what was acknowledged; what comes back from it gives the same answers, or is refused."""

import json
import re
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from patchsight_serve import backup
from patchsight_serve.embedded_galleries import EmbeddedGalleries as Galleries
from patchsight_serve.errors import PatchsightError
from patchsight_serve.fake_encoder import FakeEncoder
from patchsight_serve.item import Identity, Item, NewImage
from patchsight_serve.nearest import normalize
from patchsight_serve.row import row_checksum

ENCODER = Identity("vit", "a" * 64)


@pytest.fixture
def photos(encode: Callable[..., bytes]) -> list[bytes]:
    """Twelve different PNGs of 32 x 32."""
    rng = np.random.default_rng(0)
    return [encode(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(12)]


def add(client: TestClient, photos: list[bytes], gallery: str) -> None:
    items = [{"id": f"i{i:02d}", "label": "abc"[i % 3], "metadata": {"n": i, "ü": [1]}} for i in range(len(photos))]
    files = [("images", (f"{i}.png", photo)) for i, photo in enumerate(photos)]
    reply = client.post("/gallery/images", files=files, data={"items": json.dumps(items)}, params={"gallery": gallery})
    assert reply.status_code == 200


def everything(client: TestClient, gallery: str, photo: bytes) -> dict[str, Any]:
    """All that a gallery can be asked for, but its name."""
    query = {"gallery": gallery}
    info = client.get("/gallery", params=query).json()
    images = client.get("/gallery/images", params={**query, "limit": 1000}).json()
    seen: dict[str, Any] = {"count": info["count"], "encoder": info["encoder"], "images": images}
    for image in images["images"]:
        id = image["id"]
        seen[id] = [
            client.get("/neighbors", params={**query, "id": id, "k": 1000, "vote": True}).json(),
            client.get("/neighbors", params={**query, "id": id, "label": "a"}).json(),
            client.get(f"/gallery/images/{id}/thumbnail", params=query).content,
            client.get(f"/gallery/images/{id}/image", params=query).content,
        ]
    seen["uploaded"] = client.post("/neighbors", content=photo, params=query).json()
    return seen


def post(client: TestClient, body: Any, **query: Any):
    headers = {"Content-Type": "application/vnd.sqlite3"}
    return client.post("/gallery/restore", content=body, params=query, headers=headers)


def backed_up(client: TestClient, gallery: str = "mine") -> bytes:
    reply = client.get("/gallery/backup", params={"gallery": gallery})
    assert reply.status_code == 200, reply.text
    return reply.content


def scratch_files(client: TestClient) -> list[Path]:
    folder = client.app.state.galleries._folder / ".scratch"
    return [path for path in folder.rglob("*") if path.is_file()]


def error(reply) -> tuple[int, str]:
    return reply.status_code, reply.json()["error"]["message"]


def test_a_restored_gallery_gives_the_same_answers(client: TestClient, photos: list[bytes]) -> None:
    add(client, photos, "mine")
    client.delete("/gallery/images/i03", params={"gallery": "mine"})
    client.patch("/gallery/images/i04", params={"gallery": "mine"}, json={"label": None})
    client.post("/gallery/images", content=photos[3], params={"gallery": "mine", "id": "i05", "replace": True})
    before = everything(client, "mine", photos[0])
    assert before["count"] == 11
    reply = client.get("/gallery/backup", params={"gallery": "mine"})
    assert reply.headers["content-type"] == "application/vnd.sqlite3"
    assert reply.headers["content-disposition"] == 'attachment; filename="mine.sqlite"'
    assert int(reply.headers["content-length"]) == len(reply.content)
    told = post(client, reply.content, gallery="twin")
    assert told.status_code == 200, told.text
    assert told.json() == {"gallery": "twin", "count": 11, "encoder": before["encoder"], "left_out": []}
    assert everything(client, "twin", photos[0]) == before
    assert everything(client, "mine", photos[0]) == before
    client.delete("/gallery/images/i00", params={"gallery": "twin"})  # they are two from now on
    assert everything(client, "mine", photos[0]) == before
    assert scratch_files(client) == []


def test_any_sqlite_reads_a_backup(client: TestClient, photos: list[bytes], tmp_path: Path) -> None:
    add(client, photos, "mine")
    (tmp_path / "b.sqlite").write_bytes(backed_up(client))
    with sqlite3.connect(tmp_path / "b.sqlite") as alone:
        assert alone.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert alone.execute("SELECT id FROM images ORDER BY id").fetchall() == [(f"i{i:02d}",) for i in range(12)]
        originals = "SELECT original FROM images JOIN pictures USING (key) ORDER BY id"
        assert [original for (original,) in alone.execute(originals)] == photos
    alone.close()


def test_a_backup_survives_the_server_and_its_encoder(serving, photos: list[bytes], tmp_path: Path) -> None:
    first = serving(FakeEncoder("old"), state_dir=tmp_path / "a")
    add(first, photos, "mine")
    body = backed_up(first)
    neighbors = first.get("/neighbors", params={"gallery": "mine", "id": "i00"}).json()
    second = serving(FakeEncoder("new"), state_dir=tmp_path / "b")
    assert post(second, body, gallery="mine").status_code == 200
    assert second.get("/neighbors", params={"gallery": "mine", "id": "i00"}).json() == neighbors
    assert second.post("/neighbors", content=photos[0], params={"gallery": "mine"}).status_code == 409


def test_an_empty_gallery_can_be_carried_away_too(client: TestClient) -> None:
    body = backed_up(client, "default")
    assert post(client, body, gallery="twin").json()["count"] == 0


def test_what_exists_is_409_unless_replaced(client: TestClient, photos: list[bytes]) -> None:
    add(client, photos, "mine")
    body = backed_up(client)
    add(client, photos[:2], "default")
    for name in ("mine", "default"):
        assert error(post(client, body, gallery=name)) == (
            409, f"there is a gallery {name!r}; replace=true replaces it",
        )  # fmt: skip
    assert client.get("/gallery").json()["count"] == 2
    assert post(client, body, gallery="default", replace=True).json()["count"] == 12
    assert everything(client, "default", photos[0]) == everything(client, "mine", photos[0])
    assert error(post(client, body, gallery="../x"))[0] == 404
    assert error(client.get("/gallery/backup", params={"gallery": "nobody"}))[0] == 404


def test_a_backup_holds_just_a_prefix_of_the_acknowledged_writes(tmp_path: Path) -> None:
    """The oracle: what is there after each number of writes. A writer goes on all the time."""
    galleries = Galleries(tmp_path / "g")
    gallery = galleries.get("mine", create=True)
    rng = np.random.default_rng(0)

    def new(id: str) -> NewImage:
        vector = normalize(rng.standard_normal(16).astype(np.float32))
        return NewImage(Item(id), bytes(5_000), b"thumb", vector)

    gallery.add([new(f"b{i}") for i in range(1500)], ENCODER)
    states: list[frozenset[str]] = [frozenset(f"b{i}" for i in range(1500))]  # after so many writes
    acknowledged, stop = [0], threading.Event()

    def write() -> None:
        i = 0
        while not stop.is_set():
            if i % 3 == 2:
                states.append(states[-1] - {f"w{i - 1}"})
                gallery.delete(f"w{i - 1}")
            else:
                states.append(states[-1] | {f"w{i}"})
                gallery.add([new(f"w{i}")], ENCODER)
            acknowledged[0] += 1
            i += 1

    writer = threading.Thread(target=write)
    writer.start()
    lengths = []
    try:
        for _ in range(6):
            before = acknowledged[0]
            with backup.copy(gallery, galleries.scratch, threading.Event()) as file:
                after = acknowledged[0] + 1  # one may be on the disk and not yet acknowledged
                (tmp_path / "b.sqlite").write_bytes(file.read())
            with sqlite3.connect(tmp_path / "b.sqlite") as copy:
                held = frozenset(id for (id,) in copy.execute("SELECT id FROM images"))
                assert copy.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
                assert copy.execute("SELECT count(*) FROM pictures").fetchone() == (len(held),)
            copy.close()
            assert held in states[before : after + 1]
            lengths.append((before, after))
    finally:
        stop.set()
        writer.join()
    assert lengths[-1][0] > lengths[0][0]  # it did go on
    assert backup.check(tmp_path / "b.sqlite", False, threading.Event()) == []
    galleries.close()


def test_readers_and_writers_go_on_during_a_backup(tmp_path: Path) -> None:
    """It has begun, and stands still."""
    galleries = Galleries(tmp_path / "g")
    gallery = galleries.get("mine", create=True)
    vector = normalize(np.ones(4, np.float32))
    gallery.add([NewImage(Item("a"), b"a", b"thumb", vector)], ENCODER)
    with gallery.long_read(threading.Event()) as connection:
        connection.execute("BEGIN")
        assert connection.execute("SELECT count(*) FROM images").fetchone() == (1,)
        assert gallery.add([NewImage(Item("b"), b"b", b"thumb", vector)], ENCODER) == [True]
        assert [n.id for n in gallery.neighbors(vector)] == ["a", "b"]
        assert connection.execute("SELECT count(*) FROM images").fetchone() == (1,)
    galleries.close()


@pytest.mark.parametrize("how", ["left", "removed", "closed"])
def test_a_backup_that_nobody_wants_ends(tmp_path: Path, how: str) -> None:
    galleries = Galleries(tmp_path / "g")
    gallery = galleries.get("mine", create=True)
    rng = np.random.default_rng(0)
    images = [
        NewImage(Item(f"i{i}"), bytes(9), b"thumb", normalize(rng.standard_normal(8).astype(np.float32)))
        for i in range(4000)
    ]
    gallery.add(images, ENCODER)
    left, begun, failed = threading.Event(), threading.Event(), []

    def read() -> None:
        try:
            with gallery.long_read(left) as connection:
                begun.set()
                while True:  # as a copy of a gallery without end
                    connection.execute("SELECT max(a.key * b.key) FROM images a, images b").fetchone()
        except PatchsightError as error:
            failed.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    assert begun.wait(60)
    if how == "left":
        left.set()
    elif how == "removed":
        galleries.delete("mine")
        assert galleries.names() == []
    galleries.close()
    reader.join(60)
    assert not reader.is_alive()
    assert [error.status for error in failed] == [404 if how == "removed" else 500]


def test_a_damaged_row_is_refused_or_left_out(client: TestClient, photos: list[bytes]) -> None:
    add(client, photos, "mine")
    body = bytearray(backed_up(client))
    vector = client.app.state.galleries.get("mine").vectors(["i07"])[0].tobytes()
    at = body.index(vector) + 5
    body[at] ^= 0x10
    before = client.get("/gallery").json()["galleries"]
    status, message = error(post(client, bytes(body), gallery="twin"))
    assert (status, message) == (
        422, "1 of 12 rows are damaged, among them i07; skip_damaged=true leaves them out",
    )  # fmt: skip
    assert client.get("/gallery").json()["galleries"] == before
    told = post(client, bytes(body), gallery="twin", skip_damaged=True).json()
    assert (told["count"], told["left_out"]) == (11, ["i07"])
    assert client.get("/gallery", params={"gallery": "twin"}).json()["damaged"] == []
    assert client.get("/gallery/images/i07", params={"gallery": "twin"}).status_code == 404
    assert scratch_files(client) == []


def test_damage_anywhere_is_refused_or_does_no_harm(client: TestClient, photos: list[bytes]) -> None:
    """Bytes flipped all over the file: it is refused, or every answer is right; never a 500, never half a gallery."""
    add(client, photos[:3], "mine")
    good, truth = backed_up(client), everything(client, "mine", photos[0])
    rng = np.random.default_rng(1)
    refused = 0
    for _ in range(50):
        body = bytearray(good)
        for at in rng.integers(0, len(body) if rng.random() < 0.5 else 4096, 3):
            body[at] ^= 1 << int(rng.integers(8))
        reply = post(client, bytes(body), gallery="twin", replace=True)
        assert reply.status_code in (200, 400, 422), reply.text
        if reply.status_code != 200:
            refused += 1
            continue
        now = everything(client, "twin", photos[0])
        pictures = {id: value[2:] for id, value in now.items() if isinstance(value, list)}
        assert {k: v[:2] if k in pictures else v for k, v in now.items()} == {
            k: v[:2] if k in pictures else v for k, v in truth.items()
        }
        for id, (small, original) in pictures.items():  # damage in a picture shows when it is asked for
            assert small == truth[id][2] or b"damaged" in small
            assert original == truth[id][3] or b"damaged" in original
    assert 10 < refused < 50


def test_a_file_that_could_not_be_written_to_is_refused_before_it_is_in_place(
    client: TestClient, photos: list[bytes]
) -> None:
    add(client, photos[:2], "mine")
    body = bytearray(backed_up(client))
    body[18] = 7  # in the header, the version that is needed to write
    assert error(post(client, bytes(body), gallery="mine", replace=True)) == (
        400, "the file cannot be read: attempt to write a readonly database",
    )  # fmt: skip
    assert client.get("/gallery", params={"gallery": "mine"}).json()["count"] == 2


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ("PRAGMA user_version = 7", 400, "format 7, this server reads 1"),
        ("DROP TABLE pictures", 400, "not the backup of a gallery"),
        ("CREATE TABLE more (x)", 400, "table 'more', which no gallery has"),
        ("CREATE TRIGGER t AFTER DELETE ON images BEGIN DELETE FROM facts; END", 400, "trigger 't'"),
        ("CREATE VIEW v AS SELECT * FROM images", 400, "view 'v'"),
        ("CREATE INDEX i ON images (sha256)", 400, "index 'i'"),
        ("DELETE FROM facts", 400, "which encoder made its vectors"),
        ("UPDATE facts SET value = '[1]' WHERE name = 'encoder'", 400, "which encoder made its vectors"),
        ('UPDATE facts SET value = \'{"name": 1, "sha256": "x"}\' WHERE name = \'encoder\'', 400, "which encoder"),
        ("UPDATE pictures SET thumbnail = 'text'", 400, "a picture that is not bytes"),
        ("INSERT INTO pictures VALUES (999, x'00', x'00', NULL)", 400, "a picture of no image"),
        ("UPDATE sqlite_sequence SET seq = 9223372036854775807", 400, "counts its keys"),
        ("UPDATE images SET key = 99 WHERE key = 1", 400, "a picture of no image"),
        ("UPDATE images SET key = -5 WHERE key = 1; UPDATE pictures SET key = -5 WHERE key = 1", 400, "key -5"),
        ("UPDATE images SET label = 5", 422, "12 of 12 rows are damaged"),
        ("UPDATE images SET vector = 5", 422, "12 of 12 rows are damaged"),
        ("UPDATE images SET vector = zeroblob(17000000) WHERE key = 3", 400, "too big"),
    ],
)
def test_a_file_that_no_server_wrote_is_refused(
    client: TestClient, photos: list[bytes], tmp_path: Path, change: str, status: int, message: str
) -> None:
    add(client, photos, "mine")
    (tmp_path / "b.sqlite").write_bytes(backed_up(client))
    with sqlite3.connect(tmp_path / "b.sqlite") as connection:
        connection.executescript(change)
    connection.close()
    found, said = error(post(client, (tmp_path / "b.sqlite").read_bytes(), gallery="twin"))
    assert (found, bool(re.search(message, said))) == (status, True), said
    assert client.get("/gallery").json()["galleries"] == ["default", "mine"]
    assert scratch_files(client) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id": "../../etc"}, "does not match"),
        ({"id": ""}, "does not match"),
        ({"label": "x" * 300}, "300 characters"),
        ({"metadata": "[]"}, "not a JSON object"),
        ({"metadata": "{"}, "not JSON"),
        ({"metadata": json.dumps({"m": "x" * 20_000})}, "the limit is 16,384"),
        ({"sha256": "x"}, "not a sha256"),
        ({"vector": b""}, "0 bytes"),
        ({"vector": b"\0" * 12}, "12 bytes, not of 64"),
        ({"vector": np.full(16, np.nan, "<f4").tobytes()}, "not of length 1"),
        ({"vector": np.full(16, 3e38, "<f4").tobytes()}, "not of length 1"),
        ({"vector": np.zeros(16, "<f4").tobytes()}, "not of length 1"),
    ],
)
def test_a_row_with_a_right_checksum_that_could_not_have_been_added_is_refused(
    client: TestClient, photos: list[bytes], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    add(client, photos, "mine")
    (tmp_path / "b.sqlite").write_bytes(backed_up(client))
    with sqlite3.connect(tmp_path / "b.sqlite") as connection:
        names = ("id", "label", "metadata", "sha256", "vector")
        (values,) = connection.execute(f"SELECT {', '.join(names)} FROM images WHERE key = 2").fetchall()
        row = {**dict(zip(names, values, strict=True)), **changes}
        sets = ", ".join(f"{name} = ?" for name in (*names, "checksum"))
        connection.execute(f"UPDATE images SET {sets} WHERE key = 2", (*row.values(), row_checksum(*row.values())))
    connection.close()
    status, said = error(post(client, (tmp_path / "b.sqlite").read_bytes(), gallery="twin"))
    assert (status, "row 2" in said, message in said) == (400, True, True), said


def test_other_bodies_are_refused(client: TestClient, png: bytes) -> None:
    assert error(post(client, b"", gallery="x")) == (400, "the file is not the backup of a gallery")
    assert error(post(client, png, gallery="x")) == (400, "the body is not a file of SQLite")
    form = client.post("/gallery/restore", params={"gallery": "x"}, files={"file": b"x"})
    assert error(form) == (400, "the file itself has to be the body, not a form with the file in it")
    assert client.get("/gallery").json()["galleries"] == ["default"]


def test_a_body_over_the_limit_is_413_and_a_full_disk_507(
    serving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = serving(max_restore_bytes=50_000, state_dir=tmp_path)
    assert error(post(client, bytes(50_001), gallery="x")) == (
        413, "the body has 50,001 bytes or more, the limit is 50,000",
    )  # fmt: skip
    assert error(post(client, iter([bytes(30_000), bytes(30_000)]), gallery="x"))[0] == 413
    assert scratch_files(client) == []
    scratch = client.app.state.galleries.scratch
    make = scratch.make

    def full() -> Path:
        folder = make()
        (folder / "body").symlink_to("/dev/full")
        return folder

    real = Path.open
    monkeypatch.setattr(scratch, "make", full)
    monkeypatch.setattr(Path, "open", lambda path, mode="r", *rest: real(path, mode.replace("x", "w"), *rest))
    status, message = error(post(client, bytes(30_000), gallery="x"))
    assert (status, message) == (507, "no space left for the body; nothing of this request was stored")
    assert client.get("/gallery").json()["galleries"] == ["default"]
