"""What is particular to galleries on Milvus: several gateways, and what differs from the embedded one. All that does
not differ is in test_gallery.py, test_filters.py and test_galleries.py, for both."""

import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from milvus_lite import server_manager_instance

from patchsight_serve import milvus_connection
from patchsight_serve.collection import DEFAULT
from patchsight_serve.errors import Conflict, InvalidRequest, NotFound, NotReady, PatchsightError, Superseded
from patchsight_serve.item import Changes, Identity, Item, NewImage, NewVector
from patchsight_serve.milvus_collection import alias_of, between_ids, gallery_of
from patchsight_serve.milvus_filter import _ordered
from patchsight_serve.milvus_galleries import MilvusGalleries
from patchsight_serve.nearest import normalize
from patchsight_serve.settings import PREFIX

ENCODER, OTHER = Identity("vit", "a" * 64), Identity("vit", "b" * 64)
VECTORS = normalize(np.random.default_rng(0).standard_normal((50, 16)).astype(np.float32))

Open = Callable[[], MilvusGalleries]


def new(id: str, vector: np.ndarray, data: bytes | None = None, label: str | None = None) -> NewImage:
    return NewImage(Item(id, label, {"n": 1}), data or id.encode(), b"thumb " + id.encode(), vector)


def ids(gallery) -> list[str]:
    return [image.id for image in gallery.page(limit=1000)[0]]


def test_two_gateways_see_what_the_other_was_told_is_stored(on_milvus: Open) -> None:
    here, there = on_milvus().get("mine", create=True), on_milvus().get("mine", create=True)
    assert (len(there), there.encoder, there.dim, there.neighbors(VECTORS[0])) == (0, None, None, [])
    here.add([new("a", VECTORS[0]), new("b", VECTORS[1])], ENCODER)
    assert (len(there), there.encoder, there.dim) == (2, ENCODER, 16)
    assert [n.id for n in there.neighbors(VECTORS[1], 1)] == ["b"]
    assert there.add([new("a", VECTORS[0]), new("c", VECTORS[2])], ENCODER) == [False, True]
    assert here.holds([("c", here.get("c").sha256 or ""), ("d", "x")]) == [True, False]
    here.patch("c", Changes(label="x"))
    there.delete("a")
    assert [(n.id, n.label) for n in here.neighbors(VECTORS[2], 3)][0] == ("c", "x")
    assert ids(here) == ids(there) == ["b", "c"]
    assert on_milvus().names() == ["mine"]


def test_of_two_encoders_at_once_one_binds_the_gallery(on_milvus: Open) -> None:
    gateways = [on_milvus(), on_milvus()]
    for name in "abcd":
        start = threading.Barrier(2, timeout=60)

        def add(gateway: MilvusGalleries, encoder: Identity, name: str = name, start: threading.Barrier = start):
            gallery = gateway.get(name, create=True)
            start.wait()
            try:
                return gallery.add([new(encoder.sha256[0], VECTORS[0][: 8 if encoder == OTHER else 16])], encoder)
            except (Conflict, InvalidRequest) as error:
                return error

        with ThreadPoolExecutor(2) as pool:
            outcomes = list(pool.map(add, gateways, [ENCODER, OTHER]))
        (winner,) = [e for e, outcome in zip([ENCODER, OTHER], outcomes, strict=True) if outcome == [True]]
        assert [type(outcome) for outcome in outcomes if outcome != [True]] == [Conflict]
        for gateway in gateways:
            gallery = gateway.get(name)
            assert (gallery.encoder, ids(gallery)) == (winner, [winner.sha256[0]])
    collections = [c for c in gateways[0]._connection.client.list_collections() if gateways[0]._prefix in c]
    assert len(collections) == 5  # the four, and the facts: what the losers made is gone


def test_of_one_encoder_at_once_all_images_are_there(on_milvus: Open) -> None:
    start = threading.Barrier(3, timeout=60)

    def add(i: int) -> None:
        gallery = on_milvus().get("mine", create=True)
        start.wait()
        for j in range(4):
            gallery.add([new(f"{i}-{j}", VECTORS[4 * i + j])], ENCODER)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(add, range(3)))
    assert ids(on_milvus().get("mine")) == [f"{i}-{j}" for i in range(3) for j in range(4)]


def test_an_emptied_gallery_keeps_its_encoder_until_it_is_removed(on_milvus: Open) -> None:
    """Other than the embedded one: another gateway may be about to add to it."""
    galleries = on_milvus()
    gallery = galleries.get("mine", create=True)
    gallery.add([new("x", VECTORS[0])], ENCODER)
    gallery.delete("x")
    assert (len(gallery), gallery.encoder) == (0, ENCODER)
    with pytest.raises(Conflict, match="holds vectors of encoder 'vit'"):
        gallery.add([new("x", VECTORS[0])], OTHER)
    galleries.delete("mine")
    assert galleries.get("mine", create=True).add([new("x", VECTORS[0][:8])], OTHER) == [True]


def test_a_removed_gallery_is_gone_for_every_gateway_and_never_the_new_one_of_its_name(on_milvus: Open) -> None:
    here, there = on_milvus(), on_milvus()
    old, theirs = here.get("mine", create=True), there.get("mine", create=True)
    old.add([new("a", VECTORS[0])], ENCODER, facts={"note": "x"})
    assert (ids(theirs), theirs.fact("note")) == (["a"], "x")
    here.delete("mine")
    assert here.names() == []
    here.get("mine", create=True).add([new("b", VECTORS[1])], ENCODER)
    calls = [
        lambda g: g.get("a"), ids, lambda g: g.neighbors(VECTORS[0]), len, lambda g: g.vectors(["a"]),
        lambda g: g.add([new("c", VECTORS[2])], ENCODER), lambda g: g.delete("a"), lambda g: g.thumbnail("a"),
        lambda g: g.patch("a", Changes(label="x")), lambda g: g.keys(), lambda g: g.holds([("a", "x")]),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(NotFound, match="no gallery 'mine': it was removed"):
            call(old)
        with pytest.raises(Superseded, match="was removed meanwhile; ask again"):
            call(theirs)
    for galleries in (here, there):
        assert (ids(galleries.get("mine")), galleries.get("mine").fact("note")) == (["b"], None)
    with pytest.raises(NotFound):
        here.delete("nobody")


def test_the_default_gallery_is_always_there_and_known_to_have_been_used(on_milvus: Open) -> None:
    galleries = on_milvus()
    galleries.get(DEFAULT).add([new("a", VECTORS[0])], ENCODER, facts={"samples": "24"})
    galleries.delete(DEFAULT)
    emptied = on_milvus().get(DEFAULT)
    assert (len(emptied), emptied.encoder, emptied.fact("samples")) == (0, None, None)
    assert emptied.fact("encoder") is not None
    for call in (galleries.check_free, lambda name: galleries.publish(name, Path("x"))):
        with pytest.raises(Conflict, match="on Milvus, which has backups of its own"):
            call(DEFAULT)


def test_a_snapshot_is_all_vectors_by_key(on_milvus: Open) -> None:
    gallery = on_milvus().get("mine", create=True)
    keys, nothing = gallery.snapshot()
    assert (keys.tolist(), nothing.shape, gallery.keys().tolist()) == ([], (0, 0), [])
    gallery.add([new(f"i{i:02d}", v) for i, v in enumerate(VECTORS)], ENCODER)
    before = {id: key for key, (id, _) in gallery.names(gallery.keys()).items()}
    gallery.delete("i07")
    gallery.add([new("i05", VECTORS[0], b"other")], ENCODER, replace=True)
    gallery.patch("i20", Changes(label="x"))
    expected = {f"i{i:02d}": v for i, v in enumerate(VECTORS) if i != 7} | {"i05": VECTORS[0]}
    keys, found = gallery.snapshot()
    assert (np.diff(keys) > 0).all()
    assert np.array_equal(keys, gallery.keys())
    names = gallery.names(keys)
    assert {names[key][0]: v.tobytes() for key, v in zip(keys.tolist(), found, strict=True)} == {
        id: v.tobytes() for id, v in expected.items()
    }
    after = {id: key for key, (id, _) in names.items()}
    assert {id for id in after if after[id] != before[id]} == {"i05"}  # a key names one vector for ever
    images = gallery.images(keys)
    assert {key: (image.id, image.sha256) for key, image in images.items()} == names
    assert [(names[key][0], label) for rows in gallery.labels() for key, label in rows] == [("i20", "x")]


def test_readers_beside_a_writer_find_every_image_that_stays(on_milvus: Open) -> None:
    gallery, stop, wrong = on_milvus().get("mine", create=True), threading.Event(), []
    gallery.add([new(f"s{i}", v) for i, v in enumerate(VECTORS[:20])], ENCODER)

    def read() -> None:
        while not stop.is_set():
            found = gallery.neighbors(VECTORS[0], 10)
            if len(found) != 10 or found[0].id != "s0" or len({n.id for n in found}) != 10:
                wrong.append(found)

    with ThreadPoolExecutor(2) as pool:
        readers = [pool.submit(read) for _ in range(2)]
        for i, vector in enumerate(VECTORS[20:40]):
            gallery.add([new(f"w{i}", vector)], ENCODER)
            gallery.add([new("s1", vector, bytes([i + 1]))], ENCODER, replace=True)
        stop.set()
        [reader.result() for reader in readers]
    assert wrong == []
    assert len(gallery) == 40


def test_what_milvus_cannot_hold_is_said_and_stores_nothing(on_milvus: Open) -> None:
    gallery = on_milvus().get("mine", create=True)
    many = NewImage(Item("x", None, {f"{i:x}": 1 for i in range(1600)}), b"x", b"t", VECTORS[0])
    with pytest.raises(InvalidRequest, match="1,600 numbers and strings; .* 65,536 bytes, or the 4,096") as caught:
        gallery.add([new("y", VECTORS[1]), many], ENCODER)
    assert caught.value.param == "metadata"
    with pytest.raises(InvalidRequest, match="a thumbnail has 50,000 bytes, Milvus takes 49,149"):
        gallery.add([NewImage(Item("x"), b"x", bytes(50_000), VECTORS[0])], ENCODER)
    assert ids(gallery) == []
    largest = {"t": "x" * 16_375}
    gallery.add([NewImage(Item("x", None, largest), b"x", bytes(49_149), VECTORS[0])], ENCODER)
    assert (gallery.get("x").metadata, gallery.thumbnail("x")) == (largest, bytes(49_149))
    with pytest.raises(NotFound, match="the original of image 'x' was not kept; there is its thumbnail"):
        gallery.original("x")


def test_vectors_by_the_thousand(on_milvus: Open) -> None:
    gallery = on_milvus().get("mine", create=True)
    gallery.add([new("i00", VECTORS[0]), new("i01", VECTORS[1], b"other")], ENCODER)
    rows = [NewVector(Item(f"i{i:02d}", "a"), None, v) for i, v in enumerate(VECTORS)]
    assert gallery.add_vectors(lambda: [rows[:30], rows[30:]], ENCODER) == {
        "created": 48, "replaced": 0, "unchanged": 2,
    }  # fmt: skip
    changed = [NewVector(Item("i00", "b"), None, VECTORS[0]), NewVector(Item("i02", "b"), None, VECTORS[3])]
    fresh = NewVector(Item("z"), None, VECTORS[4])
    with pytest.raises(Conflict, match="id 'i02' is taken by another image"):
        gallery.add_vectors(lambda: [[fresh], changed], ENCODER)
    with pytest.raises(InvalidRequest, match="8 values, those of the gallery have 16"):
        gallery.add_vectors(lambda: [[fresh], [NewVector(Item("y"), None, VECTORS[0][:8])]], ENCODER)
    assert len(gallery) == 50
    assert gallery.add_vectors(lambda: [changed], ENCODER, replace=True)["replaced"] == 2
    assert (gallery.get("i00").label, gallery.thumbnail("i00")) == ("b", b"thumb i00")
    assert np.array_equal(gallery.vectors(["i02"])[0], VECTORS[3])
    with pytest.raises(NotFound, match="without its picture"):
        gallery.thumbnail("i02")
    with gallery.all_rows(threading.Event(), 7) as (encoder, chunks):
        found = [row for rows in chunks for row in rows]
    assert (encoder, [row.id for row in found]) == (ENCODER, [f"i{i:02d}" for i in range(50)])
    assert all(row.intact for row in found)


def test_pages_begin_behind_any_text(on_milvus: Open) -> None:
    gallery = on_milvus().get("mine", create=True)
    names = ["-", ".a", "0", "A", "Z", "_", "a", "a-", "a.", "aZ", "a_", "az", "z"]
    gallery.add([new(id, VECTORS[i]) for i, id in enumerate(names)], ENCODER)
    for after in [
        "",
        "a",
        'a"',
        "a\\",
        "a'",
        "aü",
        "ü",
        "\x00",
        "a\n",
        "a~",
        "a]",
        'a") or id != ("',
        "~",
        "0 ",
        "/",
        "{",
    ]:
        assert [image.id for image in gallery.page(after, 100)[0]] == sorted(id for id in names if id > after), after


@given(st.text(st.characters(codec="utf-8"), max_size=5), st.sampled_from(["a", "-", "_z", "Z.", "~", "a-b"]))
def test_a_text_between_ids_stays_between_the_same(text: str, id: str) -> None:
    assert set(between_ids(text)) <= {chr(c) for c in range(0x23, 0x7F)} - {"\\"}
    if "~" not in id:
        assert (id > between_ids(text)) == (id > text)


@given(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True))
def test_names_come_back_from_their_aliases(name: str) -> None:
    assert gallery_of("p", alias_of("p", name)) == name
    assert gallery_of("q", alias_of("p", name)) is None


numbers = st.one_of(
    st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False, allow_infinity=False),
    st.integers(-4, 4).map(lambda i: 2**53 + i), st.integers(-4, 4).map(lambda i: float(2**53 + i)),
)  # fmt: skip


@given(st.one_of(st.tuples(numbers, numbers), st.tuples(*[st.text(st.characters(codec="utf-8"))] * 2)))
def test_texts_for_numbers_and_strings_are_in_their_order(pair) -> None:
    a, b = pair
    assert (_ordered(a) < _ordered(b), _ordered(a) == _ordered(b)) == (a < b, a == b)


def test_without_pymilvus_the_extra_is_named(serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "patchsight_serve.milvus_galleries", None)
    with pytest.raises(PatchsightError, match=r"--gallery needs pip install 'patchsight\[milvus\]'"):
        serving(gallery="my.db")


def test_a_server_of_several_processes_has_galleries(serving, png: bytes, empty_milvus: Path) -> None:
    """As each of them is, but for the file, which only one may open."""
    uri = server_manager_instance.start_and_get_uri(str(empty_milvus)).replace("http", "milvus")
    first, second = (serving(gallery=f"{uri}/{PREFIX}", processes=2) for _ in range(2))
    raw = {"content": png, "headers": {"Content-Type": "image/png"}}
    assert first.post("/gallery/images?id=a", **raw).status_code == 200
    assert [n["id"] for n in second.post("/neighbors", **raw).json()["neighbors"]] == ["a"]
    assert second.delete("/gallery").status_code == 204
    assert first.get("/gallery/images/a").status_code == 409
    assert first.post("/gallery/images?id=b", **raw).json()["results"] == [{"index": 0, "id": "b", "created": True}]
    assert second.get("/gallery").json()["count"] == 1


def test_a_milvus_that_is_not_there_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(milvus_connection, "TIMEOUT_S", 1.0)
    with pytest.raises(PatchsightError, match="no Milvus at http://127.0.0.1:9: "):
        MilvusGalleries("http://127.0.0.1:9", "p", "", tmp_path)


def test_a_milvus_that_goes_away_is_503_in_time(
    serving, png: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    client = serving(gallery=str(tmp_path / "gone.db"))
    raw = {"content": png, "headers": {"Content-Type": "image/png"}}
    assert client.post("/gallery/images?id=a", **raw).status_code == 200
    monkeypatch.setattr(milvus_connection, "TIMEOUT_S", 1.0)
    server_manager_instance.release_server(str(tmp_path / "gone.db"))
    caplog.clear()
    for reply in (
        client.get("/gallery"), client.get("/gallery/images/a"), client.get("/neighbors?id=a"),
        client.post("/neighbors", **raw), client.post("/gallery/images?id=b", **raw),
    ):  # fmt: skip
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, NotReady.code)
        assert "Milvus at " in reply.json()["error"]["message"]
    assert client.get("/encoders").status_code == 200
    assert "Traceback" not in caplog.text


def test_a_whole_gallery_over_http(serving, png: bytes, empty_milvus: Path) -> None:
    client = serving(gallery=str(empty_milvus))
    raw = {"content": png, "headers": {"Content-Type": "image/png"}}
    for gallery in ("mine", "other"):
        client.post("/gallery/images", params={"id": "a", "label": "x", "gallery": gallery}, **raw)
    exported = client.get("/gallery/export?gallery=mine").content
    assert client.delete("/gallery?gallery=mine").status_code == 204
    assert client.get("/gallery?gallery=mine").status_code == 404
    assert client.get("/gallery?gallery=other").json()["galleries"] == ["other"]
    imported = client.post("/gallery/import?gallery=mine", content=exported)
    assert (imported.json()["count"], imported.json()["created"]) == (1, 1)
    (found,) = client.post("/neighbors?gallery=mine", **raw).json()["neighbors"]
    assert (found["id"], found["label"], round(found["score"], 6)) == ("a", "x", 1.0)
    assert client.get("/gallery/clusters?gallery=mine").json()["clusters"][0]["size"] == 1
    placed = client.get("/gallery/map?gallery=mine").json()
    assert (placed["ids"], placed["labels"], placed["umap"]["state"]) == (["a"], ["x"], "too_few")
    for reply in (
        client.get("/gallery/backup?gallery=mine"), client.post("/gallery/restore?gallery=new", content=b"x"),
        client.post("/gallery/reembed?gallery=mine&encoder=fake"),
    ):  # fmt: skip
        assert (reply.status_code, reply.json()["error"]["code"]) == (409, "conflict"), reply.text


@contextmanager
def server(folder: Path, *arguments: object) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A process of its own that is ready, and its address; killed at the end of the block if it is still there."""
    program, log = Path(sys.executable).parent / "patchsight-serve", folder / "serve.log"
    line = [str(part) for part in (program, "--port", 0, "--state-dir", folder / "state", *arguments)]
    with log.open("wb") as file, subprocess.Popen(line, stdout=file, stderr=file, cwd=folder) as process:
        try:
            while not (found := re.search(r"http://127[.]0[.]0[.]1:[0-9]+", log.read_text())):
                assert process.poll() is None, log.read_text()
                time.sleep(0.1)
            yield process, found[0]
        finally:
            process.kill()


def test_a_server_that_was_killed_has_what_it_acknowledged(tiny_bundle: Path, tmp_path: Path, encode) -> None:
    photos = [encode(np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)) for i in range(8)]
    arguments = ("--model-repository", tiny_bundle.parent, "--no-sample-gallery", "--gallery", "my.db")
    raw = {"Content-Type": "image/png"}
    with server(tmp_path, *arguments) as (process, url):
        for i, photo in enumerate(photos):
            httpx.post(f"{url}/gallery/images?id=i{i}", content=photo, headers=raw, timeout=60).raise_for_status()
        httpx.delete(f"{url}/gallery/images/i7", timeout=60).raise_for_status()
        before = httpx.get(f"{url}/neighbors?id=i3", timeout=60).json()
        assert len(before["neighbors"]) == 6
        process.kill()
    with server(tmp_path, *arguments) as (process, url):
        assert httpx.get(f"{url}/gallery", timeout=60).json()["count"] == 7
        assert httpx.get(f"{url}/neighbors?id=i3", timeout=60).json() == before
        process.terminate()
        assert process.wait(60) == 0
