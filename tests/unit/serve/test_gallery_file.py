"""A gallery as Parquet: what goes out comes in again, and a file that cannot come in whole stays out."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from starlette.testclient import TestClient

from patchsight_serve import embed, gallery_file, recorded_gallery
from patchsight_serve.bulk_add import add_vectors
from patchsight_serve.embedded_galleries import EmbeddedGalleries as Galleries
from patchsight_serve.embedding_file import read_embeddings, written
from patchsight_serve.errors import Conflict, InvalidRequest, StorageFull
from patchsight_serve.fake_encoder import FakeEncoder
from patchsight_serve.gallery_file import look_over
from patchsight_serve.item import Identity, Item, NewImage, NewVector
from patchsight_serve.nearest import normalize
from patchsight_serve.ort_encoder import OrtEncoder

ENCODER = FakeEncoder().manifest
MADE_BY = Identity(ENCODER.name, ENCODER.sha256)
NOBODY_LEFT = threading.Event()
PARQUET = {"Content-Type": "application/vnd.apache.parquet"}


@pytest.fixture
def photos(encode: Callable[..., bytes]) -> list[bytes]:
    """Twelve different PNGs of 32 x 32."""
    rng = np.random.default_rng(0)
    return [encode(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(12)]


def add(client: TestClient, photos: list[bytes], gallery: str) -> None:
    items = [{"id": f"i{i:02d}", "label": "ab"[i % 2] if i % 5 else None} for i in range(len(photos))]
    items[3]["metadata"] = {"path": "ü/3.png", "n": [1, {"m": None}]}
    files = [("images", (f"{i}.png", photo)) for i, photo in enumerate(photos)]
    reply = client.post("/gallery/images", files=files, data={"items": json.dumps(items)}, params={"gallery": gallery})
    assert reply.status_code == 200


def exported(client: TestClient, gallery: str) -> bytes:
    reply = client.get("/gallery/export", params={"gallery": gallery})
    assert reply.status_code == 200, reply.text
    return reply.content


def post(client: TestClient, body: bytes | Path, **query: Any):
    content = body.read_bytes() if isinstance(body, Path) else body
    return client.post("/gallery/import", content=content, params=query, headers=PARQUET)


def answers(client: TestClient, gallery: str) -> dict[str, Any]:
    """All that does not need the pictures."""
    query = {"gallery": gallery}
    info = client.get("/gallery", params=query).json()
    images = client.get("/gallery/images", params={**query, "limit": 1000}).json()["images"]
    near = [client.get("/neighbors", params={**query, "id": image["id"], "k": 1000}).json() for image in images]
    return {"count": info["count"], "encoder": info["encoder"], "images": images, "neighbors": near}


def table(count: int = 3, dim: int = 16, **columns: Any) -> pa.Table:
    """A file as it should be, but for `columns`; None leaves one out."""
    rows = np.random.default_rng(0).standard_normal((count, dim)).astype(np.float32)
    whole = {
        "id": [f"i{i}" for i in range(count)],
        "label": ["a", None, "b"][:count],
        "metadata": ['{"n": 1}', None, "{}"][:count],
        "sha256": ["0" * 64, None, "f" * 64][:count],
        "embedding": pa.array(list(rows), pa.list_(pa.float32())),
    } | columns
    return pa.table({name: column for name, column in whole.items() if column is not None})


def file(path: Path, table: pa.Table, encoder: Identity = MADE_BY, output: str = "cls", **options: Any) -> Path:
    made_by = json.dumps(encoder._asdict() | {"output": output})
    pq.write_table(table.replace_schema_metadata({"patchsight": made_by}), path, **options)
    return path


def test_what_goes_out_comes_in_again(client: TestClient, photos: list[bytes]) -> None:
    add(client, photos, "mine")
    before = answers(client, "mine")
    reply = client.get("/gallery/export", params={"gallery": "mine"})
    assert reply.headers["content-type"] == "application/vnd.apache.parquet"
    assert reply.headers["content-disposition"] == 'attachment; filename="mine.parquet"'
    told = post(client, reply.content, gallery="twin").json()
    assert told == {
        "gallery": "twin", "count": 12, "encoder": before["encoder"], "created": 12, "replaced": 0, "unchanged": 0,
    }  # fmt: skip
    assert answers(client, "twin") == before
    assert exported(client, "twin") == reply.content
    for part in ("thumbnail", "image"):
        missing = client.get(f"/gallery/images/i00/{part}", params={"gallery": "twin"})
        assert missing.status_code == 404
        assert missing.json()["error"]["message"] == "image 'i00' came as a vector, without its picture"
        assert client.get(f"/gallery/images/i00/{part}", params={"gallery": "mine"}).status_code == 200
    again = post(client, reply.content, gallery="twin").json()
    assert (again["created"], again["unchanged"], again["count"]) == (0, 12, 12)
    assert answers(client, "twin") == before
    # With its picture, an image of the same bytes is still the same.
    files = [("images", ("x.png", photos[0]))]
    data = {"items": '[{"id": "i00"}]'}
    put = client.post("/gallery/images", files=files, data=data, params={"gallery": "twin", "replace": True})
    assert put.status_code == 200
    assert client.get("/gallery/images/i00/image", params={"gallery": "twin"}).content == photos[0]


def test_any_reader_finds_what_the_gallery_holds(client: TestClient, photos: list[bytes], tmp_path: Path) -> None:
    add(client, photos, "mine")
    (tmp_path / "e.parquet").write_bytes(exported(client, "mine"))
    found = pq.read_table(tmp_path / "e.parquet")
    assert found.column_names == ["id", "label", "metadata", "sha256", "embedding"]
    images = client.get("/gallery/images", params={"gallery": "mine"}).json()["images"]
    assert [
        {"id": row["id"], "label": row["label"], "metadata": json.loads(row["metadata"]), "sha256": row["sha256"]}
        for row in found.drop_columns(["embedding"]).to_pylist()
    ] == images
    vectors = np.array(found.column("embedding").to_pylist(), np.float32)
    held = client.app.state.galleries.get("mine").vectors([image["id"] for image in images])
    np.testing.assert_array_equal(vectors, held)
    assert json.loads(found.schema.metadata[b"patchsight"]) == MADE_BY._asdict() | {"output": "cls"}
    features = json.loads(found.schema.metadata[b"huggingface"])["info"]["features"]
    assert set(features) == set(found.column_names)


def test_files_of_patchsight_embed_come_in(client: TestClient, tmp_path: Path) -> None:
    """Ids that are paths go to the metadata, numbers become the names of their classes, vectors get length 1."""
    rows = np.random.default_rng(0).standard_normal((4, 16)).astype(np.float32) * 5
    with written(tmp_path / "e.parquet", ["cat", "dog"], MADE_BY, "cls") as out:
        for name, label, row in zip(["a/0.jpg", "a/1.jpg", "plain", "b/2.jpg"], [0, 1, None, 5], rows, strict=True):
            out.add(name, label, row)
    assert post(client, tmp_path / "e.parquet").json()["created"] == 4
    images = client.get("/gallery/images").json()["images"]
    said = {image["metadata"].get("path", image["id"]): image["label"] for image in images}
    assert said == {"a/0.jpg": "cat", "a/1.jpg": "dog", "plain": None, "b/2.jpg": "5"}
    assert {image["sha256"] for image in images} == {None}
    assert {len(image["id"]) for image in images} == {5, 32}
    unit = normalize(rows)
    by_path = {image["metadata"].get("path", image["id"]): image["id"] for image in images}
    held = client.app.state.galleries.get("default").vectors([by_path[n] for n in ("a/0.jpg", "a/1.jpg", "plain")])
    np.testing.assert_array_equal(held, unit[:3])
    assert post(client, tmp_path / "e.parquet").json()["unchanged"] == 4
    assert client.get("/neighbors", params={"id": "plain"}).status_code == 200


def test_the_command_and_the_server_give_one_gallery(
    serving, tiny_bundle: Path, photos: list[bytes], tmp_path: Path
) -> None:
    """patchsight-embed of a folder, imported, finds what the server finds for the same pictures."""
    for i, photo in enumerate(photos):
        (tmp_path / "photos" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / "ab"[i % 2] / f"{i}.png").write_bytes(photo)
    embed.main([
        str(tmp_path / "photos"), "--out", str(tmp_path / "e.parquet"), "--encoder", "tiny",
        "--model-repository", str(tiny_bundle.parent),
    ])  # fmt: skip
    client = serving(OrtEncoder(tiny_bundle, threads=1))
    assert post(client, tmp_path / "e.parquet").json()["created"] == 12
    for i, photo in enumerate(photos):
        (found,) = client.post("/neighbors", content=photo, params={"k": 1}).json()["neighbors"]
        assert found["metadata"]["path"] == f"{'ab'[i % 2]}/{i}.png"
        assert found["label"] == "ab"[i % 2]
        assert found["score"] == pytest.approx(1, abs=1e-5)


def test_row_groups_are_written_and_read_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gallery_file, "ROW_GROUP", 10)
    galleries = Galleries(tmp_path / "g")
    gallery = galleries.get("mine", create=True)
    rows = normalize(np.random.default_rng(0).standard_normal((35, 8)).astype(np.float32))
    gallery.add([NewImage(Item(f"i{i:02d}"), b"x", b"thumb", row) for i, row in enumerate(rows)], MADE_BY)
    with gallery_file.export(gallery, galleries.scratch, {}, NOBODY_LEFT) as out:
        (tmp_path / "e.parquet").write_bytes(out.read())
    groups = pq.read_metadata(tmp_path / "e.parquet")
    assert [groups.row_group(i).num_rows for i in range(groups.num_row_groups)] == [10, 10, 10, 5]
    assert read_embeddings(tmp_path / "e.parquet").output == "embedding"
    looked = look_over(tmp_path / "e.parquet", NOBODY_LEFT)
    assert (looked.count, looked.dim, looked.encoder) == (35, 8, MADE_BY)
    batches = list(looked.batches(NOBODY_LEFT))
    assert [len(batch) for batch in batches] == [10, 10, 10, 5]
    np.testing.assert_array_equal(np.stack([new.vector for batch in batches for new in batch]), rows)
    galleries.close()


def test_a_vector_of_length_1_stays_bit_by_bit(tmp_path: Path) -> None:
    """Scaled a second time, some would end in another digit: a file that comes twice would be other vectors."""
    rows = normalize(np.random.default_rng(0).standard_normal((5000, 2)).astype(np.float32))
    assert not np.array_equal(normalize(rows), rows)
    plain = table(5000, label=None, metadata=None, sha256=None, embedding=list(rows))
    looked = look_over(file(tmp_path / "e.parquet", plain), NOBODY_LEFT)
    came = np.stack([new.vector for batch in looked.batches(NOBODY_LEFT) for new in batch])
    np.testing.assert_array_equal(came, rows)


def test_an_export_is_of_one_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Emptied and filled by another encoder meanwhile: neither that one's name nor its rows are in the file."""
    galleries = Galleries(tmp_path / "g")
    gallery = galleries.get("mine", create=True)
    rows = normalize(np.random.default_rng(0).standard_normal((9, 8)).astype(np.float32))
    gallery.add([NewImage(Item(f"i{i}"), b"x", b"thumb", row) for i, row in enumerate(rows)], MADE_BY)
    real = recorded_gallery.rows_in

    def late(connection: Any, chunk: int):
        for i in range(9):
            gallery.delete(f"i{i}")
        gallery.add([NewImage(Item("other"), b"x", b"thumb", rows[0])], Identity("other", "b" * 64))
        yield from real(connection, chunk)

    monkeypatch.setattr(recorded_gallery, "rows_in", late)
    with gallery_file.export(gallery, galleries.scratch, {}, NOBODY_LEFT) as out:
        found = pq.read_table(pa.BufferReader(out.read()))
    assert found.column("id").to_pylist() == [f"i{i}" for i in range(9)]
    assert json.loads(found.schema.metadata[b"patchsight"])["name"] == MADE_BY.name
    galleries.close()


def test_an_export_leaves_damage_out(client: TestClient, photos: list[bytes]) -> None:
    add(client, photos, "mine")
    gallery = client.app.state.galleries.get("mine")
    with gallery._record.transaction():
        gallery._record._writer.execute("UPDATE images SET label = 'other' WHERE id = 'i03'")
    table = pq.read_table(pa.BufferReader(exported(client, "mine")))
    assert table.column("id").to_pylist() == [f"i{i:02d}" for i in range(12) if i != 3]
    assert client.get("/gallery/export", params={"gallery": "nobody"}).status_code == 404


def test_an_empty_gallery_is_a_file_without_rows_which_cannot_come_in(client: TestClient) -> None:
    body = exported(client, "default")
    assert pq.read_table(pa.BufferReader(body)).num_rows == 0
    assert post(client, body).status_code == 400


def test_replace_takes_what_the_file_says_and_keeps_pictures(client: TestClient, photos: list[bytes]) -> None:
    add(client, photos, "mine")
    changed = pq.read_table(pa.BufferReader(exported(client, "mine")))
    ids, labels = changed.column("id").to_pylist(), ["new"] * 12
    rows = np.array(changed.column("embedding").to_pylist(), np.float32)
    rows[5] = -rows[5]
    digests = changed.column("sha256").to_pylist()
    digests[5] = "e" * 64
    sink = pa.BufferOutputStream()
    pq.write_table(
        pa.table({"id": ids, "label": labels, "sha256": digests, "embedding": list(rows)}).replace_schema_metadata(
            changed.schema.metadata
        ),
        sink,
    )
    body = sink.getvalue().to_pybytes()
    before = answers(client, "mine")
    refused = post(client, body, gallery="mine")
    assert refused.status_code == 409
    assert refused.json()["error"]["message"] == "id 'i05' is taken by another image; replace=true replaces it"
    assert answers(client, "mine") == before
    told = post(client, body, gallery="mine", replace=True).json()
    assert (told["created"], told["replaced"], told["unchanged"], told["count"]) == (0, 12, 0, 12)
    for i, id in enumerate(ids):
        image = client.get(f"/gallery/images/{id}", params={"gallery": "mine"}).json()
        assert (image["label"], image["metadata"], image["sha256"]) == ("new", {}, digests[i])
        original = client.get(f"/gallery/images/{id}/image", params={"gallery": "mine"})
        assert original.status_code == (404 if i == 5 else 200)
    held = client.app.state.galleries.get("mine").vectors(ids)
    np.testing.assert_array_equal(held, rows)
    assert post(client, body, gallery="mine", replace=True).json()["unchanged"] == 12


def test_another_encoder_another_output_another_size_are_refused(client: TestClient, tmp_path: Path) -> None:
    path = tmp_path / "e.parquet"
    add_one = post(client, file(path, table(1)))
    assert add_one.status_code == 200
    other = Identity("other", "b" * 64)
    for bad, status, message in [
        (file(tmp_path / "1", table(2), other, "embedding"), 409, "holds vectors of encoder 'fake'"),
        (file(tmp_path / "2", table(2), other, "cls"), 409, "encoder 'other' (sha256 bbbbbbbbbbbb…) is not loaded"),
        (file(tmp_path / "3", table(2), Identity("fake", "b" * 64), "embedding"), 409, "holds vectors of"),
        (file(tmp_path / "4", table(2), output="mean"), 409, "the file holds 'mean' of encoder 'fake'"),
        (file(tmp_path / "5", table(2, dim=8)), 400, "have 8 numbers, those of 'fake' have 16"),
    ]:
        reply = post(client, bad)
        assert (reply.status_code, message in reply.json()["error"]["message"]) == (status, True), reply.text
    assert client.get("/gallery").json()["count"] == 1
    # Of an encoder that is not loaded, into a gallery of its own.
    reply = post(client, file(path, table(3, dim=8), other, "embedding"), gallery="theirs")
    assert reply.json()["encoder"] == other._asdict()
    assert post(client, file(path, table(2, dim=4), other, "embedding"), gallery="theirs").status_code == 400


NAN, ZERO = [float("nan")] + [1.0] * 15, [0.0] * 16


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"id": None}, "needs one column `id`"),
        ({"embedding": None}, "needs one column `embedding`"),
        ({"embedding": [1.0, 2.0, 3.0]}, "no lists of numbers"),
        ({"embedding": [{"a": 1.0}] * 3}, "no lists of numbers"),
        ({"embedding": [["x"], ["y"], ["z"]]}, "cannot be read as Parquet"),
        ({"embedding": [[[1.0]], [[1.0]], [[1.0]]]}, "cannot be read as Parquet"),
        ({"embedding": [[1.0], [1.0, 2.0], [1.0]]}, "of 1 numbers, and of 2"),
        ({"embedding": [[1.0], None, [1.0]]}, "a list in every row"),
        ({"embedding": [[], [], []]}, "row 0: its embedding holds NaN"),
        ({"embedding": [[1.0] * 16, NAN, [1.0] * 16]}, "row 1: its embedding holds NaN or infinity"),
        ({"embedding": [[1.0] * 16, [1.0] * 16, ZERO]}, "row 2: its embedding holds NaN or infinity, or has length 0"),
        ({"id": ["a", None, "c"]}, "row 1: its id is null"),
        ({"id": ["a", "", "c"]}, "row 1: id '' does not match"),
        ({"id": [1, 2, 3]}, "`id` holds int64, no text"),
        ({"id": ["a", "b", "a"]}, "id 'a' twice"),
        ({"label": ["a", "x" * 300, "c"]}, "row 1: label"),
        ({"label": [1.5, 2.5, 3.5]}, "`label` holds double, no text"),
        ({"metadata": ["{}", "[1]", "{}"]}, "row 1: metadata [1] is not a JSON object"),
        ({"metadata": ["{}", "{", "{}"]}, "row 1: metadata is not JSON"),
        ({"metadata": [{"a": 1}] * 3}, "`metadata` holds struct"),
        ({"sha256": ["0" * 64, "xyz", None]}, "row 1: sha256 'xyz' is not 64 hex digits"),
    ],
)
def test_a_row_that_is_wrong_keeps_the_whole_file_out(
    client: TestClient, tmp_path: Path, columns: dict[str, Any], message: str
) -> None:
    reply = post(client, file(tmp_path / "e.parquet", table(**columns)))
    assert (reply.status_code, message in reply.json()["error"]["message"]) == (400, True), reply.text
    assert str(tmp_path) not in reply.text
    assert "scratch" not in reply.text
    assert client.get("/gallery").json()["count"] == 0


def test_what_is_no_parquet_or_has_no_encoder_is_refused(client: TestClient, tmp_path: Path) -> None:
    path = file(tmp_path / "e.parquet", table())
    good = path.read_bytes()
    for body in (b"", b"text", good[:-100], good[:100], good[4:]):
        reply = post(client, body)
        assert (reply.status_code, "cannot be read as Parquet" in reply.text) == (400, True), reply.text
    no_sha256 = '{"name": "a", "sha256": "x", "output": "cls"}'
    for text in ("{}", "x", "[1]", '{"name": "a"}', no_sha256, "[" * 100_000, None):
        said = {} if text is None else {"patchsight": text}
        pq.write_table(table().replace_schema_metadata(said), path)
        reply = post(client, path)
        assert reply.status_code == 400, reply.text
        assert "does not say which encoder" in reply.text or "cannot be read" in reply.text
    assert client.get("/gallery").json()["count"] == 0


def test_damage_anywhere_is_refused_or_does_no_harm(client: TestClient, tmp_path: Path) -> None:
    """Bytes flipped all over the file: never a 500, and all of it or nothing."""
    good = file(tmp_path / "e.parquet", table(3), use_dictionary=False).read_bytes()
    rng = np.random.default_rng(2)
    refused = 0
    for i in range(60):
        body = bytearray(good)
        for at in rng.integers(0, len(body), 3):
            body[at] ^= 1 << int(rng.integers(8))
        reply = post(client, bytes(body), gallery=f"g{i}")
        assert reply.status_code in (200, 400, 409), reply.text
        refused += reply.status_code != 200
        count = client.get("/gallery", params={"gallery": f"g{i}"})
        assert (count.status_code == 404 or count.json()["count"] == 0) == (reply.status_code != 200)
        if reply.status_code == 200:
            assert count.json()["count"] == reply.json()["created"] > 0
    assert 5 < refused < 60


def test_nothing_is_stored_when_the_disk_is_full_or_a_row_is_taken(tmp_path: Path) -> None:
    galleries = Galleries(tmp_path / "g")
    gallery = galleries.get("mine", create=True)
    rows = normalize(np.random.default_rng(0).standard_normal((2000, 64)).astype(np.float32))
    new = [NewVector(Item(f"i{i}"), None, row) for i, row in enumerate(rows)]
    add_vectors(gallery, [new[:3]], MADE_BY)
    writer = gallery._record._writer
    pages = writer.execute("PRAGMA page_count").fetchone()[0]
    writer.execute(f"PRAGMA max_page_count = {pages + 20}")
    with pytest.raises(StorageFull):
        add_vectors(gallery, [new[3:1000], new[1000:]], MADE_BY)
    writer.execute("PRAGMA max_page_count = 1000000")
    last = NewVector(Item("i1"), None, rows[7])
    with pytest.raises(Conflict, match="id 'i1' is taken"):
        add_vectors(gallery, [new[3:1000], [last]], MADE_BY)
    with pytest.raises(InvalidRequest, match="8 values, those of the gallery have 64"):
        add_vectors(gallery, [new[3:9], [NewVector(Item("x"), None, rows[0, :8])]], MADE_BY)

    def broken():
        yield new[3:9]
        raise InvalidRequest("no more")

    with pytest.raises(InvalidRequest, match="no more"):
        add_vectors(gallery, broken(), MADE_BY)
    assert len(gallery) == 3
    assert not gallery.busy
    assert [n.id for n in gallery.neighbors(rows[5], 10)] == sorted(
        ["i0", "i1", "i2"], key=lambda id: -float(rows[int(id[1:])] @ rows[5])
    )
    assert add_vectors(gallery, [new], MADE_BY) == {"created": 1997, "replaced": 0, "unchanged": 3}
    assert gallery.neighbors(rows[1234], 1)[0].id == "i1234"
    galleries.close()


def test_reads_go_on_during_an_import_and_short_writes_wait_outside_of_threads(
    client: TestClient, photos: list[bytes]
) -> None:
    add(client, photos, "mine")
    gallery = client.app.state.galleries.get("mine")
    inside, go_on = threading.Event(), threading.Event()
    row = normalize(np.ones(16, np.float32))

    def slowly():
        yield [NewVector(Item("v1"), None, row)]
        inside.set()
        assert go_on.wait(60)
        yield [NewVector(Item("v2"), None, row)]

    importing = threading.Thread(target=add_vectors, args=(gallery, slowly(), MADE_BY))
    importing.start()
    assert inside.wait(60)
    replies: list[int] = []

    def patch(i: int) -> None:
        query = {"gallery": "mine"}
        replies.append(client.patch(f"/gallery/images/i{i:02d}", params=query, json={"label": "z"}).status_code)

    writers = [threading.Thread(target=patch, args=(i % 12,)) for i in range(48)]  # more than there are threads
    for writer in writers:
        writer.start()
    try:
        for id in ("i01", "i02", "i03"):
            found = client.get("/neighbors", params={"gallery": "mine", "id": id, "k": 100}).json()["neighbors"]
            assert len(found) == 11
            assert not {"v1", "v2"} & {n["id"] for n in found}
        assert replies == []
    finally:
        go_on.set()
        for thread in (importing, *writers):
            thread.join()
    assert replies == [200] * 48
    assert client.get("/gallery", params={"gallery": "mine"}).json()["count"] == 14
