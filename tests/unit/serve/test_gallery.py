"""The gallery: nothing acknowledged is lost, nothing damaged is trusted, and search equals brute force."""

import hashlib
import sqlite3
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from patchsight_serve.embedded_gallery import EmbeddedGallery as Gallery
from patchsight_serve.errors import Conflict, InvalidRequest, NotFound, PatchsightError, StorageFull
from patchsight_serve.filters import Filter
from patchsight_serve.item import Identity, Item, NewImage
from patchsight_serve.nearest import normalize

ENCODER = Identity("vit", "a" * 64)
OTHER = Identity("vit", "b" * 64)


def unit_vectors(count: int, dim: int = 16, seed: int = 0) -> np.ndarray:
    return normalize(np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32))


def new(id: str, vector: np.ndarray, data: bytes | None = None, label: str | None = None, **metadata) -> NewImage:
    return NewImage(
        Item(id, label, metadata), data if data is not None else id.encode(), b"thumb " + id.encode(), vector
    )


@pytest.fixture(params=["embedded", "milvus"])
def open_gallery(request: pytest.FixtureRequest, tmp_path: Path):
    """`open_gallery(name)`: of either kind; again, as after a restart."""
    opened: list[Any] = []

    def embedded(name: str) -> Gallery:
        if opened:
            opened.pop().close()
        opened.append(Gallery(tmp_path / name))
        return opened[-1]

    if request.param == "milvus":
        on_milvus = request.getfixturevalue("on_milvus")
        yield lambda name: on_milvus().get(name, create=True)
    else:
        yield embedded
    for gallery in opened:
        gallery.close()


@pytest.fixture
def gallery(open_gallery):
    return open_gallery("default")


embedded_alone = pytest.mark.parametrize("open_gallery", ["embedded"], indirect=True)


def ids(gallery: Gallery) -> list[str]:
    return [image.id for image in gallery.page(limit=10_000)[0]]


def brute_force(vectors: dict[str, np.ndarray], query: np.ndarray, k: int) -> list[tuple[str, np.float32]]:
    """One by one in float64, then sorted by score and id."""
    q = [float(x) for x in normalize(query)]
    scored = []
    for id, vector in vectors.items():
        score = np.float32(min(1.0, max(-1.0, float(np.sum([a * float(b) for a, b in zip(q, vector, strict=True)])))))
        scored.append((id, score))
    return sorted(scored, key=lambda pair: (-pair[1], pair[0]))[:k]


def test_neighbors_equal_brute_force_with_ties_by_id(gallery: Gallery) -> None:
    base = unit_vectors(40)
    # Every vector three times, under ids in another order than they are added: ties everywhere.
    vectors = {f"{name}{i:02d}": base[i] for name in "cab" for i in range(40)}
    gallery.add([new(id, v) for id, v in vectors.items()], ENCODER)
    for seed in range(20):
        query = np.random.default_rng(seed).standard_normal(16).astype(np.float32)
        for k in (1, 2, 7, 119, 120, 500):
            found = [(n.id, np.float32(n.score)) for n in gallery.neighbors(query, k)]
            assert found == brute_force(vectors, query, k)


def test_a_gallery_of_one_picture_many_times_is_cut_by_id(gallery: Gallery) -> None:
    (vector,) = unit_vectors(1)
    gallery.add([new(f"{i:03d}", vector) for i in reversed(range(300))], ENCODER)
    assert [n.id for n in gallery.neighbors(vector, 5)] == ["000", "001", "002", "003", "004"]


def test_the_label_filter_comes_before_the_search(gallery: Gallery) -> None:
    vectors = unit_vectors(500)
    query = vectors[0]
    order = np.argsort(vectors @ query)  # the rare label goes to the images farthest from the query
    rare = {f"i{row:03d}" for row in order[:12]}
    gallery.add(
        [new(f"i{i:03d}", v, label="rare" if f"i{i:03d}" in rare else "common") for i, v in enumerate(vectors)], ENCODER
    )
    found = gallery.neighbors(query, 10, label="rare")
    expected = brute_force({f"i{i:03d}": v for i, v in enumerate(vectors) if f"i{i:03d}" in rare}, query, 10)
    assert [n.id for n in found] == [id for id, _ in expected]
    assert {n.label for n in found} == {"rare"}
    left_out = {n.id for n in found[:3]}
    assert [n.id for n in gallery.neighbors(query, 10, label="rare", leave_out=left_out)] == [
        id
        for id, _ in brute_force({f"i{i:03d}": v for i, v in enumerate(vectors) if f"i{i:03d}" in rare}, query, 12)[3:]
    ]
    assert gallery.neighbors(query, 10, label="no such label") == []


def test_filters_come_before_the_search(gallery: Gallery) -> None:
    """The few that a filter leaves are the farthest from the query, and some of them are equal."""
    vectors = unit_vectors(400)
    query = vectors[0]
    order = np.argsort(vectors @ query)
    vectors[order[:12]] = np.repeat(vectors[order[:3]], 4, axis=0)
    rare = {f"i{row:03d}": vectors[row] for row in order[:12]}
    images = []
    for i, v in enumerate(vectors):
        id = f"i{i:03d}"
        metadata = {"year": 2015 if id in rare else 2000 + i % 10, "place": {"city": "Rome"}, 'a"b': i}
        images.append(new(id, v, label="abc"[i % 3], **metadata))
    gallery.add(images, ENCODER)
    years = Filter.of({"year": {"gte": 2010, "lt": 2020}, "place.city": "Rome"})
    for k in (1, 5, 12, 100):
        found = [(n.id, np.float32(n.score)) for n in gallery.neighbors(query, k, filter=years)]
        assert found == brute_force(rare, query, k)
    left_out = {id for id, _ in brute_force(rare, query, 3)}
    assert [n.id for n in gallery.neighbors(query, 9, filter=years, leave_out=left_out)] == [
        id for id, _ in brute_force(rare, query, 12)[3:]
    ]
    for labels in (["a"], ["a", "c"], ["c", "nobody"], ["a", "b", "c"]):
        some = {id: v for id, v in rare.items() if "abc"[int(id[1:]) % 3] in labels}
        assert [n.id for n in gallery.neighbors(query, 12, label=labels, filter=years)] == [
            id for id, _ in brute_force(some, query, 12)
        ]
    assert {n.label for n in gallery.neighbors(query, 400, label=["a", "b"])} == {"a", "b"}
    assert gallery.neighbors(query, 10, label=[]) == []
    assert [n.id for n in gallery.neighbors(query, 10, filter=Filter.of({'a"b': {"in": [7, 3]}}))] == [
        id for id, _ in brute_force({f"i{i:03d}": vectors[i] for i in (3, 7)}, query, 10)
    ]
    assert gallery.neighbors(query, 10, filter=Filter.of({})) == gallery.neighbors(query, 10)
    assert gallery.neighbors(query, 10, filter=Filter.of({"year": 1900})) == []


@embedded_alone
def test_labels_are_looked_up_in_their_index(gallery: Gallery) -> None:
    plan = gallery._record.read("EXPLAIN QUERY PLAN SELECT key FROM images WHERE images.label IN (?, ?)", ("a", "b"))
    assert any("images_by_label" in step[-1] for step in plan)


@embedded_alone
def test_a_filter_holds_up_nobody_who_wants_an_image(gallery: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    """While SQLite is in the middle of a filter over all rows."""
    gallery.add([new(f"i{i}", v, n=i) for i, v in enumerate(unit_vectors(3))], ENCODER)
    long_read, inside, go_on = gallery._record.long_read, threading.Event(), threading.Event()

    @contextmanager
    def slow(left: threading.Event) -> Iterator[sqlite3.Connection]:
        with long_read(left) as connection:
            connection.set_progress_handler(lambda: inside.set() or not go_on.wait(60), 1)
            yield connection

    monkeypatch.setattr(gallery._record, "long_read", slow)
    found: list[str] = []
    query = unit_vectors(3)[2]

    def search() -> None:
        found.extend(n.id for n in gallery.neighbors(query, 1, filter=Filter.of({"n": {"gte": 1}})))

    searching = threading.Thread(target=search)
    searching.start()
    try:
        assert inside.wait(60)
        assert gallery.get("i1").metadata == {"n": 1}
        assert gallery.neighbors(query, 1)[0].id == "i2"
        assert gallery.add([new("later", query)], ENCODER) == [True]
        assert found == []
    finally:
        go_on.set()
        searching.join()
    assert found == ["i2"]


def test_a_gallery_over_the_limit_gets_an_approximate_index(tmp_path: Path, until) -> None:
    """At the add that crosses it, and at each start; the record alone decides what is in it."""
    vectors = unit_vectors(900)
    gallery = Gallery(tmp_path / "g", exact_limit=500)
    gallery.add([new(f"i{i:03d}", v, half=i % 2) for i, v in enumerate(vectors[:500])], ENCODER)
    assert gallery.index == ("flat", None, None, None, False)
    gallery.add([new(f"i{i + 500:03d}", v, half=i % 2) for i, v in enumerate(vectors[500:])], ENCODER)
    until(lambda: gallery.index.kind == "ivf")
    gallery.delete("i007")
    gallery.add([new("i008", vectors[7], b"other")], ENCODER, replace=True)
    gallery.close()
    gallery = Gallery(tmp_path / "g", exact_limit=500)
    until(lambda: gallery.index.kind == "ivf")
    assert gallery.index.recall is not None
    assert gallery.index.recall >= 0.99
    assert len(gallery) == 899
    assert gallery.neighbors(vectors[7], 1)[0].id == "i008"
    assert {n.id for n in gallery.neighbors(vectors[0], 1000)} == {f"i{i:03d}" for i in range(900)} - {"i007"}
    kept = {f"i{i:03d}": vectors[i] for i in range(0, 900, 2) if i != 8}  # which was replaced, without its metadata
    half = gallery.neighbors(vectors[3], 20, filter=Filter.of({"half": 0}))
    assert [(n.id, np.float32(n.score)) for n in half] == brute_force(kept, vectors[3], 20)  # 449 are within the limit
    gallery.close()


def test_leave_out_and_min_score(gallery: Gallery) -> None:
    vectors = unit_vectors(50)
    gallery.add([new(f"i{i:02d}", v) for i, v in enumerate(vectors)], ENCODER)
    everything = gallery.neighbors(vectors[7], 50)
    assert everything[0].id == "i07"
    assert everything[0].score == pytest.approx(1.0, abs=1e-7)
    assert gallery.neighbors(vectors[7], 50, leave_out=["i07", "unknown"]) == everything[1:]
    cut = everything[20].score
    assert gallery.neighbors(vectors[7], 50, min_score=cut) == everything[:21]


@pytest.mark.parametrize("k", [0, -1, 1001])
def test_k_out_of_range_names_the_limit(gallery: Gallery, k: int) -> None:
    with pytest.raises(InvalidRequest, match=f"k is {k}, it must be 1 to 1000"):
        gallery.neighbors(np.ones(16, np.float32), k)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (np.ones(15, np.float32), "15 values.* 16"),
        (np.full(16, np.nan, np.float32), "NaN"),
        (np.full(16, np.inf, np.float32), "infinity"),
        (np.zeros(16, np.float32), "length 0"),
    ],
)
def test_a_query_without_direction_or_of_another_size_is_refused(gallery: Gallery, query, message: str) -> None:
    gallery.add([new("a", unit_vectors(1)[0])], ENCODER)
    with pytest.raises(InvalidRequest, match=message):
        gallery.neighbors(query)


def test_an_empty_gallery_has_no_neighbors(gallery: Gallery) -> None:
    assert len(gallery) == 0
    assert gallery.encoder is None
    assert gallery.neighbors(np.ones(5, np.float32), 10) == []
    assert ids(gallery) == []


def test_adding_twice_is_one_image_and_other_bytes_are_a_conflict(gallery: Gallery) -> None:
    a, b = unit_vectors(2)
    assert gallery.add([new("x", a, b"one", label="old", n=1)], ENCODER) == [True]
    again, conflict, fresh, twin = gallery.add(
        [new("x", a, b"one", label="new"), new("x", b, b"two"), new("y", b, b"two"), new("y", b, b"two")], ENCODER
    )
    assert again is False
    assert isinstance(conflict, Conflict)
    assert "replace=true" in conflict.message
    assert fresh is True
    assert twin is False
    assert gallery.get("x").label == "old"
    assert gallery.get("x").metadata == {"n": 1}
    assert len(gallery) == 2


def test_replace_changes_vector_bytes_label_and_thumbnail(gallery: Gallery) -> None:
    a, b, c = unit_vectors(3)
    gallery.add([new("x", a, b"one", label="old"), new("z", c)], ENCODER)
    assert gallery.add([new("x", b, b"two", label="new"), new("x", c, b"three")], ENCODER, replace=True) == [
        False,
        False,
    ]
    image = gallery.get("x")
    assert image.label is None
    assert image.sha256 == hashlib.sha256(b"three").hexdigest()
    assert len(gallery) == 2
    assert [(n.id, round(n.score, 6)) for n in gallery.neighbors(c, 2)] == [("x", 1.0), ("z", 1.0)]
    assert [n.id for n in gallery.neighbors(b, 1)][0] in {"x", "z"}


def test_another_encoder_is_a_conflict_and_stores_nothing(gallery: Gallery) -> None:
    gallery.add([new("x", unit_vectors(1)[0])], ENCODER)
    with pytest.raises(Conflict, match="holds vectors of encoder 'vit'"):
        gallery.add([new("y", unit_vectors(1)[0])], OTHER)
    assert ids(gallery) == ["x"]
    gallery.require(ENCODER)
    with pytest.raises(Conflict):
        gallery.require(OTHER)


def test_an_emptied_gallery_is_free_for_another_encoder_of_another_size(tmp_path: Path) -> None:
    gallery = Gallery(tmp_path / "g")
    gallery.add([new("x", unit_vectors(1)[0])], ENCODER)
    gallery.delete("x")
    assert gallery.encoder is None
    vector = unit_vectors(1, dim=8)[0]
    gallery.add([new("x", vector)], OTHER)
    gallery.close()
    reopened = Gallery(tmp_path / "g")
    assert reopened.encoder == OTHER
    assert [n.id for n in reopened.neighbors(vector)] == ["x"]
    reopened.close()


def test_a_vector_of_another_size_is_refused_and_nothing_of_its_request_is_stored(gallery: Gallery) -> None:
    gallery.add([new("x", unit_vectors(1)[0])], ENCODER)
    with pytest.raises(InvalidRequest, match="8 values"):
        gallery.add([new("y", unit_vectors(1)[0]), new("z", unit_vectors(1, dim=8)[0])], ENCODER)
    assert ids(gallery) == ["x"]
    assert len(gallery) == 1


def test_patch_delete_page_and_thumbnail(gallery: Gallery) -> None:
    gallery.add([new(f"i{i}", v, label="a", n=i) for i, v in enumerate(unit_vectors(9))], ENCODER)
    assert gallery.patch("i3", {"label": "b"}).metadata == {"n": 3}
    assert gallery.patch("i3", {"metadata": {"m": [1, "ü"]}}).label == "b"
    assert gallery.patch("i3", {"label": None}) == gallery.get("i3")
    assert gallery.get("i3").label is None
    assert gallery.thumbnail("i4") == b"thumb i4"
    gallery.delete("i5")
    for call in (gallery.get, gallery.thumbnail, gallery.original, gallery.delete, lambda id: gallery.patch(id, {})):
        with pytest.raises(NotFound, match="no image 'i5' in gallery 'default'"):
            call("i5")
    first, more = gallery.page(limit=4)
    assert more == "i3"
    rest, end = gallery.page(after=more, limit=4)
    assert end is None
    assert [i.id for i in first + rest] == ["i0", "i1", "i2", "i3", "i4", "i6", "i7", "i8"]
    assert "i5" not in {n.id for n in gallery.neighbors(unit_vectors(9)[5], 100)}


def test_a_reopened_gallery_is_the_same(open_gallery) -> None:
    vectors = unit_vectors(30)
    gallery = open_gallery("g")
    gallery.add([new(f"i{i:02d}", v, label="ab"[i % 2], n=i) for i, v in enumerate(vectors)], ENCODER)
    gallery.delete("i11")
    gallery.patch("i12", {"label": "c"})
    gallery.add([new("i13", vectors[0], b"other")], ENCODER, replace=True)
    before = gallery.page(), gallery.neighbors(vectors[3], 30), gallery.neighbors(vectors[3], 3, label="a")
    gallery = open_gallery("g")
    assert (gallery.page(), gallery.neighbors(vectors[3], 30), gallery.neighbors(vectors[3], 3, label="a")) == before
    assert gallery.encoder == ENCODER


def test_originals_are_kept_or_not(tmp_path: Path) -> None:
    for keep, expected in ((True, b"bytes"), (False, None)):
        gallery = Gallery(tmp_path / str(keep), keep_originals=keep)
        gallery.add([new("x", unit_vectors(1)[0], b"bytes")], ENCODER)
        if keep:
            assert gallery.original("x") == b"bytes"
        else:
            with pytest.raises(NotFound, match="the original of image 'x' was not kept"):
                gallery.original("x")
        gallery.close()
        stored = sqlite3.connect(tmp_path / str(keep) / "gallery.sqlite")
        assert stored.execute("SELECT original FROM pictures").fetchone() == (expected,)
        stored.close()


def test_a_damaged_original_is_never_given_out(tmp_path: Path) -> None:
    gallery = Gallery(tmp_path / "g")
    gallery.add([new("x", unit_vectors(1)[0], b"bytes")], ENCODER)
    gallery.close()
    stored = sqlite3.connect(tmp_path / "g" / "gallery.sqlite")
    stored.execute("UPDATE pictures SET original = ?", (b"bytez",))
    stored.commit()
    stored.close()
    gallery = Gallery(tmp_path / "g")
    with pytest.raises(PatchsightError, match="original is damaged; add the image again"):
        gallery.original("x")
    gallery.close()


ADDS_FOR_EVER = """
    import sys
    from pathlib import Path
    import numpy as np
    from patchsight_serve.embedded_gallery import EmbeddedGallery as Gallery
    from patchsight_serve.item import Identity, Item, NewImage
    from patchsight_serve.nearest import normalize
    gallery, i = Gallery(Path(sys.argv[1])), int(sys.argv[2])
    while True:
        vector = normalize(np.random.default_rng(i).standard_normal(16).astype(np.float32))
        gallery.add([NewImage(Item(str(i)), bytes(50_000), b"thumb", vector)], Identity("vit", "a" * 64))
        print("+", i, flush=True)
        if i % 3 == 0:
            gallery.delete(str(i))
            print("-", i, flush=True)
        i += 1
"""


def test_acknowledged_writes_survive_kill_9(tmp_path: Path) -> None:
    present, start = set(), 0
    for acks in (5, 23, 60):
        command = [sys.executable, "-c", textwrap.dedent(ADDS_FOR_EVER), str(tmp_path / "g"), str(start)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            lines = [process.stdout.readline() for _ in range(acks)]
            process.kill()
            lines += process.stdout.read().splitlines()
        for line in lines:
            sign, number = line.split()
            present = present | {int(number)} if sign == "+" else present - {int(number)}
            start = max(start, int(number) + 2)
        gallery = Gallery(tmp_path / "g")
        found = {int(id) for id in ids(gallery)}
        # One more or one less at the end: stored, and killed before it could say so.
        assert len(found ^ present) <= 1
        assert all(number >= start - 2 for number in found ^ present)
        assert len(gallery) == len(found)
        assert gallery.damaged == []
        for number in sorted(found)[-5:]:
            vector = np.random.default_rng(number).standard_normal(16).astype(np.float32)
            assert gallery.neighbors(vector, 1)[0].id == str(number)
        gallery.close()
        present = found


def test_a_damaged_row_is_reported_left_out_and_mended_by_adding_again(tmp_path: Path, caplog) -> None:
    vectors = unit_vectors(20)
    gallery = Gallery(tmp_path / "g")
    gallery.add([new(f"i{i:02d}", v, label="a") for i, v in enumerate(vectors)], ENCODER)
    gallery.close()
    path = tmp_path / "g" / "gallery.sqlite"
    content = bytearray(path.read_bytes())
    at = content.index(vectors[7].tobytes()) + 5
    content[at] ^= 0x10
    path.write_bytes(content)

    gallery = Gallery(tmp_path / "g")
    assert gallery.damaged == ["i07"]
    assert "'i07' is damaged" in caplog.text
    assert len(gallery) == 19
    assert "i07" not in {n.id for n in gallery.neighbors(vectors[7], 20)}
    assert "i07" not in {n.id for n in gallery.neighbors(vectors[7], 20, label="a")}
    assert "i07" not in ids(gallery)
    with pytest.raises(NotFound, match="damaged"):
        gallery.get("i07")
    assert gallery.holds(
        [("i07", hashlib.sha256(b"i07").hexdigest()), ("i08", hashlib.sha256(b"i08").hexdigest())]
    ) == [
        False,
        True,
    ]
    assert gallery.add([new("i07", vectors[7])], ENCODER) == [True]
    assert gallery.damaged == []
    assert gallery.neighbors(vectors[7], 1)[0].id == "i07"
    gallery.close()


@pytest.mark.parametrize("column", ["id", "label", "metadata", "sha256", "vector", "checksum"])
def test_the_checksum_covers_every_column(tmp_path: Path, column: str) -> None:
    gallery = Gallery(tmp_path / "g")
    gallery.add([new("x", unit_vectors(1)[0], label="a"), new("y", unit_vectors(1)[0])], ENCODER)
    gallery.close()
    with sqlite3.connect(tmp_path / "g" / "gallery.sqlite") as connection:
        connection.execute(f"UPDATE images SET {column} = ? WHERE id = 'x'", (b"\xff other",))
    connection.close()
    gallery = Gallery(tmp_path / "g")
    assert len(gallery.damaged) == 1
    assert ids(gallery) == ["y"]
    gallery.close()


@embedded_alone
def test_a_full_disk_is_said_and_changes_nothing(gallery: Gallery) -> None:
    vectors = unit_vectors(3)
    gallery.add([new("x", vectors[0])], ENCODER)
    # SQLite itself refuses to grow the file: the same error, from the same place, as a full disk.
    pages = gallery._record._writer.execute("PRAGMA page_count").fetchone()[0]
    gallery._record._writer.execute(f"PRAGMA max_page_count = {pages + 1}")
    with pytest.raises(StorageFull, match="no space left for gallery 'default'; nothing of this request was stored"):
        gallery.add([new("y", vectors[1]), new("z", vectors[2], bytes(1_000_000))], ENCODER)
    assert ids(gallery) == ["x"]
    assert [n.id for n in gallery.neighbors(vectors[1])] == ["x"]
    gallery._record._writer.execute("PRAGMA max_page_count = 1000000")
    assert gallery.add([new("y", vectors[1])], ENCODER) == [True]


@embedded_alone
def test_a_second_process_is_locked_out(gallery: Gallery) -> None:
    code = "import sys, pathlib, patchsight_serve.embedded_gallery as g; g.EmbeddedGallery(pathlib.Path(sys.argv[1]))"
    folder = str(gallery._record.path.parent)
    second = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=False)
    assert "Conflict: gallery 'default' is open in another process" in second.stderr


def test_a_file_that_is_no_gallery_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "g").mkdir()
    (tmp_path / "g" / "gallery.sqlite").write_bytes(b"something else entirely" * 1000)
    with pytest.raises(PatchsightError, match="not a database"):
        Gallery(tmp_path / "g")
    (tmp_path / "g" / "gallery.sqlite").unlink()
    Gallery(tmp_path / "g").close()  # the lock was let go


@embedded_alone
def test_readers_do_not_wait_for_a_writer_at_the_disk(gallery: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that hangs in the middle of its transaction holds up nobody, and shows nobody what is not committed."""
    vectors = unit_vectors(3)
    gallery.add([new("x", vectors[0], label="a")], ENCODER)
    inside, go_on, insert = threading.Event(), threading.Event(), gallery._record.insert

    def hanging(*values):
        key = insert(*values)
        inside.set()
        assert go_on.wait(60)
        return key

    monkeypatch.setattr(gallery._record, "insert", hanging)
    writer = threading.Thread(target=gallery.add, args=([new("y", vectors[1]), new("z", vectors[2])], ENCODER))
    writer.start()
    assert inside.wait(60)
    try:
        assert [n.id for n in gallery.neighbors(vectors[1], 10)] == ["x"]
        assert [n.id for n in gallery.neighbors(vectors[1], 10, label="a")] == ["x"]
        assert ids(gallery) == ["x"]
        assert gallery.get("x").label == "a"
        assert gallery.thumbnail("x") == b"thumb x"
        with pytest.raises(NotFound):
            gallery.get("y")
    finally:
        go_on.set()
        writer.join()
    assert [n.id for n in gallery.neighbors(vectors[1], 1)] == ["y"]


@embedded_alone
def test_readers_and_writers_at_once_agree_with_the_record(gallery: Gallery) -> None:
    vectors = unit_vectors(200)
    gallery.add([new(f"s{i}", v) for i, v in enumerate(vectors[:50])], ENCODER)
    stop, wrong = threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            found = gallery.neighbors(vectors[0], 10)
            if len(found) != 10 or found[0].id != "s0" or len({n.id for n in found}) != 10:
                wrong.append(found)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for i, vector in enumerate(vectors[50:]):
        gallery.add([new(f"w{i}", vector)], ENCODER)
        if i % 2:
            gallery.delete(f"w{i}")
        if i % 5 == 0:
            gallery.add([new("s1", vector, bytes([i]))], ENCODER, replace=True)
    stop.set()
    for reader in readers:
        reader.join()
    assert wrong == []
    present = set(ids(gallery))
    assert {n.id for n in gallery.neighbors(vectors[0], 1000)} == present
    assert len(gallery) == len(present) == 125


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"id": "a/b"}, "does not match"),
        ({"id": ""}, "does not match"),
        ({"id": ".."}, "does not match"),
        ({"id": "ünï"}, "does not match"),
        ({"id": "x" * 129}, "does not match"),
        ({"id": "x\n"}, "does not match"),
        ({"id": "x", "label": "l" * 10_000}, "10,000 characters; a label has 1 to 256"),
        ({"id": "x", "label": ""}, "0 characters"),
        ({"id": "x", "label": "\ud800"}, "not valid Unicode"),
        ({"id": "x", "label": 3}, "no string"),
        ({"id": "x", "metadata": [1]}, "not a JSON object"),
        ({"id": "x", "metadata": {"m": "x" * 1_000_000}}, "1,000,008 bytes, the limit is 16,384"),
        ({"id": "x", "metadata": {"m": {1, 2}}}, "cannot be written as JSON"),
    ],
)
def test_an_item_outside_the_limits_cannot_be_made(item, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        Item(**item)
    with pytest.raises(InvalidRequest):
        Item("ok\n")
    Item("A.z_0-9" * 18, "l" * 256, {"m": "x" * (16_384 - 8)})


@embedded_alone
def test_a_snapshot_is_all_vectors_by_key(gallery: Gallery) -> None:
    keys, nothing = gallery.snapshot()
    assert (keys.tolist(), nothing.shape, gallery.keys().tolist()) == ([], (0, 0), [])
    vectors = unit_vectors(300)
    gallery.add([new(f"i{i:03d}", v) for i, v in enumerate(vectors)], ENCODER)
    for i in (0, 17, 120, 121, 299):
        gallery.delete(f"i{i:03d}")
    gallery.add([new("i005", vectors[0], b"other")], ENCODER, replace=True)
    expected = {f"i{i:03d}": v for i, v in enumerate(vectors) if i not in (0, 17, 120, 121, 299)} | {"i005": vectors[0]}
    for rows in (16_384, 7):
        keys, found = gallery._index.snapshot(rows)
        assert (np.diff(keys) > 0).all()
        assert np.array_equal(keys, gallery.keys())
        names = gallery.names(keys)
        assert {names[key][0]: v.tobytes() for key, v in zip(keys.tolist(), found, strict=True)} == {
            id: v.tobytes() for id, v in expected.items()
        }
    images = gallery.images(keys)
    assert {image.id for image in images.values()} == set(expected)
    assert {key: (image.id, image.sha256) for key, image in images.items()} == names
    gallery.patch("i200", {"label": "x"})
    gallery.patch("i100", {"label": "y"})
    labels = [(names[key][0], label) for rows in gallery.labels() for key, label in rows]
    assert labels == [("i100", "y"), ("i200", "x")]


@embedded_alone
def test_a_snapshot_beside_a_writer_has_what_was_there_all_the_time(gallery: Gallery) -> None:
    """With vectors that belong to their keys, whatever moved in between."""
    vectors = unit_vectors(400)
    gallery.add([new(f"i{i}", v) for i, v in enumerate(vectors[:200])], ENCODER)
    written = threading.Event()

    def write() -> None:
        for i in range(200):
            gallery.add([new(f"i{i + 200}", vectors[i + 200])], ENCODER)
            if i % 2:
                gallery.delete(f"i{i}")
        written.set()

    writer = threading.Thread(target=write)
    writer.start()
    stay = {f"i{i}" for i in range(0, 200, 2)}
    rounds = 0
    while not written.is_set() or not rounds:
        keys, found = gallery._index.snapshot(3)
        names = gallery.names(keys)
        seen = {names[key][0]: v for key, v in zip(keys.tolist(), found, strict=True) if key in names}
        assert stay <= set(seen)
        assert all(np.array_equal(v, vectors[int(id[1:])]) for id, v in seen.items())
        rounds += 1
    writer.join()


@embedded_alone
def test_a_snapshot_of_a_gallery_that_is_begun_anew_meanwhile(gallery: Gallery, monkeypatch) -> None:
    gallery.add([new(f"i{i}", v) for i, v in enumerate(unit_vectors(10))], ENCODER)
    locked, index = gallery._index._lock.shared, gallery._index
    times = 0

    def anew():
        nonlocal times
        times += 1
        if times == 3:  # the keys and one part have been read
            monkeypatch.undo()
            for i in range(10):
                gallery.delete(f"i{i}")
            gallery.add([new("small", unit_vectors(1, dim=8)[0])], OTHER)
        return locked()

    monkeypatch.setattr(index._lock, "shared", anew)
    keys, vectors = index.snapshot(4)
    assert vectors.shape == (4, 16)
    assert gallery.names(keys) == {}
