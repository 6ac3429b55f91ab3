"""The gallery and its neighbors over HTTP: what goes in comes out, and no request can store half of anything."""

import hashlib
import io
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from patchsight_serve.errors import StorageFull
from patchsight_serve.fake_encoder import FakeEncoder

RAW = {"Content-Type": "application/octet-stream"}


@pytest.fixture(params=["embedded", "milvus"])
def serving(request: pytest.FixtureRequest, serving: Callable[..., TestClient]) -> Callable[..., TestClient]:
    """As everywhere, with galleries of either kind."""
    if request.param == "embedded":
        return serving
    file = request.getfixturevalue("empty_milvus")
    return lambda *encoders, **settings: serving(*encoders, **{"gallery": str(file), **settings})


embedded_alone = pytest.mark.parametrize("serving", ["embedded"], indirect=True)


@pytest.fixture
def photos(encode: Callable[..., bytes]) -> list[bytes]:
    """Twelve different PNGs of 32 x 32, so that no resampling is in the way."""
    rng = np.random.default_rng(0)
    return [encode(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(12)]


def add(client: TestClient, photos: list[bytes], items: list[dict[str, Any]] | None = None, **query: Any):
    files = [("images", (f"{i}.png", photo)) for i, photo in enumerate(photos)]
    data = {"items": json.dumps(items)} if items is not None else {}
    return client.post("/gallery/images", files=files, data=data, params=query)


def vector(photo: bytes, encoder: FakeEncoder | None = None) -> np.ndarray:
    """The oracle: the encoder alone, in float64, of length 1."""
    pixels = np.asarray(Image.open(io.BytesIO(photo)).convert("RGB"))
    raw = (encoder or FakeEncoder()).run(pixels[None], ["cls_embedding"])["cls_embedding"][0].astype(np.float64)
    return raw / np.linalg.norm(raw)


def ranking(query: np.ndarray, gallery: dict[str, np.ndarray]) -> list[tuple[str, float]]:
    query = query / np.linalg.norm(query)
    return sorted(((id, float(query @ v)) for id, v in gallery.items()), key=lambda pair: (-pair[1], pair[0]))


def found(reply) -> list[tuple[str, float]]:
    assert reply.status_code == 200, reply.text
    return [(n["id"], n["score"]) for n in reply.json()["neighbors"]]


def same(left: list[tuple[str, float]], right: list[tuple[str, float]]) -> bool:
    return [i for i, _ in left] == [i for i, _ in right] and np.allclose([s for _, s in left], [s for _, s in right])


def test_add_raw_get_thumbnail_patch_delete(client: TestClient, photos: list[bytes]) -> None:
    query = {"id": "a-1", "label": "dress", "metadata": '{"path": "dress/1.jpg"}'}
    assert client.post("/gallery/images", content=photos[0], headers=RAW, params=query).json() == {
        "results": [{"index": 0, "id": "a-1", "created": True}]
    }
    sha256 = hashlib.sha256(photos[0]).hexdigest()
    image = {"id": "a-1", "label": "dress", "metadata": {"path": "dress/1.jpg"}, "sha256": sha256}
    assert client.get("/gallery/images/a-1").json() == image
    thumbnail = client.get("/gallery/images/a-1/thumbnail")
    assert thumbnail.headers["content-type"] == "image/jpeg"
    assert Image.open(io.BytesIO(thumbnail.content)).size == (32, 32)
    assert client.patch("/gallery/images/a-1", json={"label": "hat"}).json() == image | {"label": "hat"}
    assert client.patch("/gallery/images/a-1", json={"label": None, "metadata": {}}).json() == image | {
        "label": None,
        "metadata": {},
    }
    manifest = FakeEncoder().manifest
    assert client.get("/gallery").json() == {
        "gallery": "default",
        "count": 1,
        "encoder": {"name": manifest.name, "sha256": manifest.sha256},
        "index": {"kind": "flat", "recall": None, "lists": None, "probes": None, "building": False},
        "damaged": [],
        "galleries": ["default"],
        "reembedding": None,
    }
    assert client.delete("/gallery/images/a-1").status_code == 204
    for method, path in [("GET", ""), ("PATCH", ""), ("DELETE", ""), ("GET", "/thumbnail"), ("GET", "/image")]:
        reply = client.request(method, f"/gallery/images/a-1{path}", content=b"{}")
        assert reply.status_code == 404
        assert reply.json()["error"]["message"] == "no image 'a-1' in gallery 'default'"
    assert client.get("/gallery").json()["count"] == 0


def test_thumbnails_are_small_and_keep_their_proportions(client: TestClient, encode: Callable[..., bytes]) -> None:
    tall = encode(np.full((800, 400, 3), 99, np.uint8))
    client.post("/gallery/images", content=tall, headers=RAW, params={"id": "tall"})
    thumbnail = Image.open(io.BytesIO(client.get("/gallery/images/tall/thumbnail").content))
    assert (thumbnail.format, thumbnail.size) == ("JPEG", (80, 160))


@embedded_alone
def test_an_original_comes_back_as_what_a_browser_shows_or_as_a_download(
    client: TestClient, picture: np.ndarray, encode: Callable[..., bytes]
) -> None:
    types = {
        "JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp", "GIF": "image/gif", "BMP": "image/bmp",
        "AVIF": "image/avif", "TIFF": "application/octet-stream",
    }  # fmt: skip
    for format, media_type in types.items():
        photo = encode(picture, format)
        reply = client.post(
            "/gallery/images", content=photo, params={"id": format}, headers={"Content-Type": "image/svg+xml"}
        )
        assert reply.status_code == 200
        original = client.get(f"/gallery/images/{format}/image")
        assert original.content == photo
        assert original.headers["content-type"] == media_type  # whatever the sender called it
        assert original.headers["x-content-type-options"] == "nosniff"
        assert original.headers["content-security-policy"] == "default-src 'none'; sandbox"
        assert (original.headers.get("content-disposition") == "attachment") == (format == "TIFF")


def test_an_original_that_was_not_kept_is_404(serving: Callable[..., TestClient], photos: list[bytes]) -> None:
    client = serving(keep_originals=False)
    client.post("/gallery/images", content=photos[0], headers=RAW, params={"id": "a"})
    reply = client.get("/gallery/images/a/image")
    assert (reply.status_code, reply.json()["error"]["param"]) == (404, "id")
    assert reply.json()["error"]["message"] == "the original of image 'a' was not kept; there is its thumbnail"
    assert client.get("/gallery/images/a/thumbnail").status_code == 200


def test_default_ids_come_from_the_bytes_and_adding_twice_is_once(client: TestClient, photos: list[bytes]) -> None:
    expected = [hashlib.sha256(p).hexdigest()[:32] for p in photos[:3]]
    first, second = add(client, photos[:3]).json(), add(client, photos[:3]).json()
    assert [r["id"] for r in first["results"]] == [r["id"] for r in second["results"]] == expected
    assert [r["created"] for r in first["results"]] == [True] * 3
    assert [r["created"] for r in second["results"]] == [False] * 3
    assert client.get("/gallery").json()["count"] == 3


class Counting(FakeEncoder):
    """How many images it was given."""

    images = 0

    def run(self, images, outputs):
        self.images += len(images)
        return super().run(images, outputs)


def test_what_is_there_is_not_embedded_again(serving, photos: list[bytes]) -> None:
    encoder = Counting()
    client = serving(encoder)
    add(client, photos)
    before = encoder.images
    add(client, photos)
    assert encoder.images == before


def test_other_bytes_under_an_id_are_409_unless_replaced(client: TestClient, photos: list[bytes]) -> None:
    def post(photo: bytes, **query: Any):
        return client.post("/gallery/images", content=photo, headers=RAW, params={"id": "x", **query})

    post(photos[0], label="old")
    conflict = post(photos[1])
    assert conflict.status_code == 409
    assert conflict.json()["error"]["code"] == "conflict"
    assert client.get("/gallery/images/x").json()["label"] == "old"
    assert post(photos[1], replace="true", label="new").json()["results"] == [{"index": 0, "id": "x", "created": False}]
    assert client.get("/gallery/images/x").json()["label"] == "new"
    ((id, score),) = found(client.post("/neighbors", content=photos[1], headers=RAW))
    assert (id, score) == ("x", pytest.approx(1.0, abs=1e-6))


def test_bad_images_and_bad_items_harm_no_other(
    client: TestClient, photos: list[bytes], bad_images: dict[str, tuple[bytes, int, str]]
) -> None:
    bad = [(data, code) for data, _, code in bad_images.values()]
    images = [photos[0], *(data for data, _ in bad), photos[1], photos[2], photos[3], photos[4]]
    items: list[Any] = [{"id": f"i{i}"} for i in range(len(images))]
    items[-3:] = [{"id": "../etc"}, {"label": "x" * 257}, "no object"]
    results = add(client, images, items).json()["results"]
    assert [r["index"] for r in results] == list(range(len(images)))
    assert results[0] == {"index": 0, "id": "i0", "created": True}
    assert [r["error"]["code"] for r in results[1 : 1 + len(bad)]] == [code for _, code in bad]
    assert results[-4]["created"] is True
    assert [r["error"]["code"] for r in results[-3:]] == ["invalid_request"] * 3
    assert client.get("/gallery").json()["count"] == 2


def test_a_single_bad_image_has_its_own_status(
    client: TestClient, bad_images: dict[str, tuple[bytes, int, str]]
) -> None:
    for data, status, code in bad_images.values():
        for path in ("/gallery/images", "/neighbors"):
            reply = client.post(path, content=data, headers=RAW)
            assert (reply.status_code, reply.json()["error"]["code"]) == (status, code)
    assert client.get("/gallery").json()["count"] == 0


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({"id": "a/b"}, "does not match"),
        ({"id": "ü"}, "does not match"),
        ({"label": "x" * 10_000}, "10,000 characters"),
        ({"metadata": "{no json"}, "not JSON"),
        ({"metadata": "[1]"}, "not a JSON object"),
        ({"metadata": '{"a": NaN}'}, "not JSON"),
        ({"metadata": json.dumps({"m": "x" * 20_000})}, "the limit is 16,384"),
        ({"replace": "perhaps"}, "replace"),
    ],
)
def test_a_bad_description_is_400_and_stores_nothing(client: TestClient, photos, query, message: str) -> None:
    reply = client.post("/gallery/images", content=photos[0], headers=RAW, params=query)
    assert reply.status_code == 400
    assert message in reply.json()["error"]["message"]
    assert client.get("/gallery").json()["count"] == 0


def test_metadata_of_1_mb_in_a_form_is_an_error_of_its_image(client: TestClient, photos: list[bytes]) -> None:
    results = add(client, photos[:2], [{"metadata": {"m": "x" * 1_000_000}}, {"id": "b"}]).json()["results"]
    assert "1,000,008 bytes, the limit is 16,384" in results[0]["error"]["message"]
    assert results[1] == {"index": 1, "id": "b", "created": True}


@pytest.mark.parametrize(
    "id", ["a%2Fb", "%C3%BC", "%F0%9F%91%95", "%FF", "%00", "..%2F..%2Fgallery.sqlite", "x" * 129, "nobody"]
)
@pytest.mark.parametrize("what", ["", "/thumbnail", "/image"])
def test_strange_and_unknown_ids_in_paths_are_4xx(client: TestClient, photos: list[bytes], id: str, what: str) -> None:
    add(client, photos[:1], [{"id": "x"}])
    calls = [client.get(f"/gallery/images/{id}{what}"), client.get(f"/neighbors?id={id}")]
    if not what:
        calls += [client.delete(f"/gallery/images/{id}"), client.patch(f"/gallery/images/{id}", json={"label": "a"})]
    for reply in calls:
        assert reply.status_code in (400, 404)
        assert reply.json()["error"]["code"] in ("invalid_request", "not_found")
    listed = client.get(f"/gallery/images?cursor={id}")  # any text may stand in the order of the ids
    assert (listed.status_code, listed.json()["next_cursor"]) == (200, None)
    assert [image["id"] for image in client.get("/gallery/images").json()["images"]] == ["x"]


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"label": "x" * 10_000, "metadata": {"a": 1}}, "label"),
        ({"label": "b", "metadata": {"m": "x" * 1_000_000}}, "metadata"),
        ({"label": "b", "metadata": "no object"}, "metadata"),
        ({"label": "b", "metadata": [1]}, "metadata"),
    ],
)
def test_a_wrong_change_is_400_and_changes_nothing(
    client: TestClient, photos: list[bytes], changes: dict[str, Any], param: str
) -> None:
    add(client, photos[:1], [{"id": "x", "label": "a", "metadata": {"n": 1}}])
    before = client.get("/gallery/images/x").json()
    reply = client.patch("/gallery/images/x", json=changes)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)
    assert client.get("/gallery/images/x").json() == before


def test_more_neighbors_than_there_are_images_are_all(client: TestClient, photos: list[bytes]) -> None:
    add(client, photos[:3], [{"id": "a"}, {"id": "b"}, {"id": "c"}])
    assert len(found(client.post("/neighbors", params={"k": 1000}, content=photos[0], headers=RAW))) == 3
    assert len(found(client.get("/neighbors", params={"k": 1000, "id": "a"}))) == 2


@pytest.mark.parametrize(
    ("items", "message"),
    [("[{}]", "1 entries for 2 images"), ("{}", "no list for 2 images"), ("[{", "not JSON")],
)
def test_items_that_do_not_fit_are_400(client: TestClient, photos: list[bytes], items: str, message: str) -> None:
    files = [("images", ("a.png", photo)) for photo in photos[:2]]
    reply = client.post("/gallery/images", files=files, data={"items": items})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "items")
    assert message in reply.json()["error"]["message"]


def test_bodies_of_other_kinds_are_refused(client: TestClient, photos: list[bytes]) -> None:
    assert client.post("/gallery/images", json={"images": []}).status_code == 415
    assert client.post("/gallery/images", content=b"x", headers={"Content-Type": "text/plain"}).status_code == 415
    assert client.post("/gallery/images", data={"items": "[]"}, files={"other": b""}).status_code == 400
    assert add(client, photos[:2], [{}, {}], id="x").status_code == 400
    assert client.patch("/gallery/images/x", content=b"{").status_code == 400
    assert client.patch("/gallery/images/x", json={"id": "y"}).status_code == 400
    assert client.get("/neighbors").status_code == 400


def test_paging_sees_every_image_once(client: TestClient, photos: list[bytes]) -> None:
    add(client, photos, [{"id": f"i{i:02d}", "label": "a"} for i in range(12)])
    seen, cursor = [], ""
    while cursor is not None:
        page = client.get("/gallery/images", params={"limit": 5, "cursor": cursor}).json()
        seen += page["images"]
        cursor = page["next_cursor"]
        client.delete(f"/gallery/images/{seen[0]['id']}")  # a change in front of the cursor moves nothing behind it
    assert [image["id"] for image in seen] == [f"i{i:02d}" for i in range(12)]
    assert client.get("/gallery/images", params={"limit": 0}).status_code == 400
    assert client.get("/gallery/images", params={"limit": 1001}).status_code == 400


def test_neighbors_of_an_indexed_image_equal_brute_force(client: TestClient, photos: list[bytes]) -> None:
    add(client, photos, [{"id": f"i{i:02d}"} for i in range(12)])
    vectors = {f"i{i:02d}": vector(p) for i, p in enumerate(photos)}
    for id in vectors:
        expected = ranking(vectors[id], {other: v for other, v in vectors.items() if other != id})
        assert same(found(client.get("/neighbors", params={"id": id, "k": 4})), expected[:4])
        assert same(found(client.get("/neighbors", params={"id": id, "k": 1000})), expected)
    reply = client.get("/neighbors", params={"id": "i00"}).json()
    manifest = FakeEncoder().manifest
    assert reply["encoder"] == {"name": manifest.name, "sha256": manifest.sha256}
    assert set(reply) == {"encoder", "neighbors"}
    assert set(reply["neighbors"][0]) == {"id", "score", "label", "metadata"}


def test_neighbors_of_an_uploaded_image_in_each_kind_of_body(client: TestClient, photos: list[bytes]) -> None:
    add(client, photos, [{"id": f"i{i:02d}"} for i in range(12)])
    vectors = {f"i{i:02d}": vector(p) for i, p in enumerate(photos)}
    expected = ranking(vector(photos[5]), vectors)[:10]
    raw = client.post("/neighbors", content=photos[5], headers={"Content-Type": "image/png"})
    form = client.post("/neighbors", files={"images": ("x.png", photos[5])})
    assert same(found(raw), expected)
    assert form.json() == raw.json()
    assert client.post("/neighbors", files=[("images", photos[0]), ("images", photos[1])]).status_code == 413


def test_neighbors_of_examples(client: TestClient, photos: list[bytes]) -> None:
    add(client, photos, [{"id": f"i{i:02d}"} for i in range(12)])
    vectors = {f"i{i:02d}": vector(p) for i, p in enumerate(photos)}
    foreign = np.linspace(-3, 5, 16)
    unit = foreign / np.linalg.norm(foreign)
    body = {"ids": ["i01", "i02"], "vectors": [foreign.tolist()], "negative": ["i03", (-foreign).tolist()]}
    query = (vectors["i01"] + vectors["i02"] + unit) / 3 - (vectors["i03"] - unit) / 2
    rest = {id: v for id, v in vectors.items() if id not in {"i01", "i02", "i03"}}
    assert same(found(client.post("/neighbors", json=body)), ranking(query, rest))
    assert same(found(client.post("/neighbors", json={"vectors": [[1] * 16]})), ranking(np.ones(16), vectors)[:10])


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({}, 400, "an id or a vector"),
        ({"negative": ["i00"]}, 400, "an id or a vector"),
        ({"ids": ["nobody"]}, 404, "no image 'nobody'"),
        ({"ids": ["a/b"]}, 400, "does not match"),
        ({"ids": [[1] * 16]}, 400, "ids[0] must be an id"),
        ({"ids": "i00"}, 400, "must be a list"),
        ({"vectors": [[1, 2, 3]]}, 400, "3 values, the gallery's vectors have 16"),
        ({"vectors": [[1, 2, 3], [1] * 16]}, 400, "different sizes"),
        ({"vectors": ["i00"]}, 400, "vectors[0] must be a list of numbers"),
        ({"vectors": [[0] * 16]}, 400, "vectors[0] has length 0"),
        ({"vectors": [[True] * 16]}, 400, "vectors[0] must be a list of numbers"),
        ({"vectors": [[]]}, 400, "vectors[0] must be a list of numbers"),
        ({"vectors": [[None] * 16]}, 400, "vectors[0] must be a list of numbers"),
        ({"vectors": [[1] * 16, [-1] * 16]}, 400, "cancel each other out"),
        ({"ids": ["i00"], "negative": ["i00"]}, 400, "cancel each other out"),
        ({"ids": ["i00"] * 1001}, 400, "1,001 examples, the limit is 1,000"),
        ({"ids": ["i00"], "k": 3}, 400, "must be an object with"),
        ([1], 400, "must be an object with"),
    ],
)
def test_bad_examples_say_what_is_wrong(client: TestClient, photos, body, status: int, message: str) -> None:
    add(client, photos[:2], [{"id": "i00"}, {"id": "i01"}])
    reply = client.post("/neighbors", json=body)
    assert (reply.status_code, message in reply.json()["error"]["message"]) == (status, True), reply.text


@pytest.mark.parametrize("text", ["{", '{"vectors": [[NaN]]}', f'{{"vectors": [[{"9" * 400}]]}}', "[" * 100_000])
def test_bodies_that_no_json_reader_takes_are_400(client: TestClient, text: str) -> None:
    reply = client.post("/neighbors", content=text, headers={"Content-Type": "application/json"})
    assert reply.status_code == 400


@pytest.mark.parametrize(
    "query", [{"k": 0}, {"k": -1}, {"k": 1001}, {"k": "x"}, {"min_score": 2}, {"min_score": "nan"}]
)
def test_what_is_out_of_range_is_400(client: TestClient, photos: list[bytes], query: dict[str, Any]) -> None:
    add(client, photos[:1], [{"id": "x"}])
    for reply in (
        client.get("/neighbors", params={"id": "x", **query}),
        client.post("/neighbors", content=photos[0], headers=RAW, params=query),
    ):
        assert reply.status_code == 400
        assert reply.json()["error"]["param"] == next(iter(query))


def test_label_min_score_and_vote(client: TestClient, photos: list[bytes]) -> None:
    labels = ["a", "b", None] * 4
    add(client, photos, [{"id": f"i{i:02d}", "label": label} for i, label in enumerate(labels)])
    vectors = {f"i{i:02d}": vector(p) for i, p in enumerate(photos)}
    ranked = ranking(vector(photos[0]), vectors)
    labelled = {"content": photos[0], "headers": RAW}
    only_b = {id: v for (id, v), label in zip(vectors.items(), labels, strict=True) if label == "b"}
    reply = client.post("/neighbors", **labelled, params={"label": "b", "k": 4})
    assert same(found(reply), ranking(vector(photos[0]), only_b))
    cut = (ranked[4][1] + ranked[5][1]) / 2
    assert same(found(client.post("/neighbors", **labelled, params={"min_score": cut})), ranked[:5])

    vote = client.post("/neighbors", **labelled, params={"vote": "true", "k": 6}).json()["vote"]
    weights = {"a": 0.0, "b": 0.0}
    for id, score in ranked[:6]:
        label = labels[int(id[1:])]
        if label:
            weights[label] += float(np.exp(score / 0.07))
    winner = max(weights, key=lambda label: weights[label])
    assert vote["label"] == winner
    assert vote["confidence"] == pytest.approx(weights[winner] / sum(weights.values()), rel=1e-4)
    unlabelled = client.get("/neighbors", params={"id": "i00", "vote": "true", "min_score": 1}).json()
    assert unlabelled["vote"] == {"label": None, "confidence": 0.0}


def test_filters_and_several_labels(client: TestClient, photos: list[bytes]) -> None:
    items = []
    for i in range(12):
        metadata = {"year": 2000 + i, "place": {"city": "Rome" if i % 2 else "Köln"}}
        items.append({"id": f"i{i:02d}", "label": "abc"[i % 3], "metadata": metadata})
    add(client, photos, items)
    vectors = {f"i{i:02d}": vector(p) for i, p in enumerate(photos)}

    def expected(keep: Callable[[int], bool]) -> list[tuple[str, float]]:
        return ranking(vectors["i00"], {id: v for i, (id, v) in enumerate(vectors.items()) if keep(i)})

    for query, keep in [
        ({"label": ["a", "c"]}, lambda i: i % 3 != 1),
        ({"label": ["b"]}, lambda i: i % 3 == 1),
        ({"label": ["b", "nobody"]}, lambda i: i % 3 == 1),
        ({"filter": {"place.city": "Köln"}}, lambda i: i % 2 == 0),
        ({"filter": {"year": {"gte": 2003, "lt": 2009}, "place.city": "Rome"}}, lambda i: i in (3, 5, 7)),
        ({"filter": {"year": {"in": [2001, 2002]}}, "label": ["b", "c"]}, lambda i: i in (1, 2)),
        ({"filter": {"city": {"exists": True}}}, lambda i: False),  # noqa: ARG005
        ({"filter": {}}, lambda i: True),  # noqa: ARG005
    ]:
        said = query | ({"filter": json.dumps(query["filter"])} if "filter" in query else {})
        posted = client.post("/neighbors", content=photos[0], headers=RAW, params=said | {"k": 12})
        assert same(found(posted), expected(keep)), query
        example = client.post("/neighbors", json={"vectors": [vectors["i00"].tolist()]}, params=said | {"k": 12})
        assert same(found(example), expected(keep)), query
        own = client.get("/neighbors", params=said | {"id": "i00", "k": 12})
        assert same(found(own), [pair for pair in expected(keep) if pair[0] != "i00"]), query


def test_a_filter_that_is_wrong_is_400_before_anything_is_embedded(serving, photos: list[bytes]) -> None:
    encoder = Counting()
    client = serving(encoder)
    add(client, photos[:1], [{"id": "x"}])
    before = encoder.images
    for query, message in [
        ({"filter": "{"}, "filter is not JSON"),
        ({"filter": ""}, "filter is not JSON"),
        ({"filter": '{"year": {"like": 1}}'}, "filter has no operator 'like', given for 'year'"),
        ({"filter": json.dumps({str(i): i for i in range(21)})}, "filter has 21 conditions, the limit is 20"),
        ({"label": [str(i) for i in range(101)]}, "at most 100 items"),
    ]:
        for reply in (
            client.post("/neighbors", content=photos[0], headers=RAW, params=query),
            client.get("/neighbors", params=query | {"id": "x"}),
        ):
            error = reply.json()["error"]
            assert (reply.status_code, error["code"], error["param"]) == (400, "invalid_request", next(iter(query)))
            assert message in error["message"]
    assert encoder.images == before


@embedded_alone
def test_an_index_over_the_limit_says_what_it_is(serving, photos: list[bytes], until) -> None:
    client = serving(exact_limit=5)
    many = [photos[i % len(photos)] for i in range(40)]
    add(client, many, [{"id": f"i{i:02d}"} for i in range(40)])
    until(lambda: client.get("/gallery").json()["index"]["kind"] == "ivf")
    assert client.get("/gallery").json()["index"] == {
        "kind": "ivf",
        "recall": 1.0,  # forty images are one list
        "lists": 1,
        "probes": 1,
        "building": False,
    }
    vectors = {f"i{i:02d}": vector(p) for i, p in enumerate(many)}
    assert same(found(client.post("/neighbors", content=photos[0], headers=RAW)), ranking(vectors["i00"], vectors)[:10])


def test_an_empty_gallery_answers(client: TestClient, photos: list[bytes]) -> None:
    assert client.get("/gallery").json()["count"] == 0
    assert client.get("/gallery").json()["encoder"] is None
    assert client.get("/gallery/images").json() == {"images": [], "next_cursor": None}
    assert client.post("/neighbors", content=photos[0], headers=RAW).json()["neighbors"] == []
    assert client.post("/neighbors", json={"vectors": [[1, 2]]}).json() == {"encoder": None, "neighbors": []}
    assert client.get("/neighbors", params={"id": "x"}).status_code == 404


def test_galleries_have_names_and_are_apart(client: TestClient, photos: list[bytes]) -> None:
    assert client.get("/gallery", params={"gallery": "other"}).status_code == 404
    assert client.post("/neighbors", content=photos[0], headers=RAW, params={"gallery": "other"}).status_code == 404
    add(client, photos[:2], [{"id": "a"}, {"id": "b"}], gallery="other")
    add(client, photos[2:3], [{"id": "a"}])
    assert client.get("/gallery", params={"gallery": "other"}).json()["count"] == 2
    assert client.get("/gallery").json()["galleries"] == ["default", "other"]
    assert found(client.get("/neighbors", params={"id": "a"})) == []
    assert [id for id, _ in found(client.get("/neighbors", params={"id": "a", "gallery": "other"}))] == ["b"]
    for name in ("..", "../x", ".hidden", "a/b", "x" * 129, ""):
        assert add(client, photos[:1], gallery=name).status_code == 404


def test_a_gallery_of_another_encoder_is_409_never_a_wrong_neighbor(serving, photos: list[bytes]) -> None:
    """The default encoder is the first of equals by name; a gallery stays with the one it began with."""
    client = serving(FakeEncoder("alpha"), FakeEncoder("beta", embedding_dim=8))
    add(client, photos[:2], encoder="beta")
    assert client.get("/gallery").json()["encoder"]["name"] == "beta"
    assert client.post("/neighbors", content=photos[0], headers=RAW).json()["encoder"]["name"] == "beta"
    for reply in (
        add(client, photos[2:4], encoder="alpha"),
        client.post("/neighbors", content=photos[0], headers=RAW, params={"encoder": "alpha"}),
        client.post("/neighbors", json={"vectors": [[1.0] * 8]}, params={"encoder": "alpha"}),
        client.get("/neighbors", params={"id": hashlib.sha256(photos[0]).hexdigest()[:32], "encoder": "alpha"}),
    ):
        assert (reply.status_code, reply.json()["error"]["code"]) == (409, "conflict")
    assert add(client, photos[:1], encoder="gamma").status_code == 404
    assert client.get("/gallery").json()["count"] == 2


def test_a_gallery_whose_encoder_is_gone_still_answers_by_id(serving, photos: list[bytes], tmp_path) -> None:
    first = serving(FakeEncoder("old"), state_dir=tmp_path)
    add(first, photos[:3], [{"id": "a"}, {"id": "b"}, {"id": "c"}])
    before = found(first.get("/neighbors", params={"id": "a"}))
    first.__exit__(None, None, None)
    for encoder in (FakeEncoder("new"), FakeEncoder("old", embedding_dim=8)):
        client = serving(encoder, state_dir=tmp_path)
        assert found(client.get("/neighbors", params={"id": "a"})) == before
        assert client.post("/neighbors", content=photos[0], headers=RAW).status_code == 409
        assert add(client, photos[3:4]).status_code == 409
        client.__exit__(None, None, None)


def test_an_encoder_that_gives_nan_stores_nothing(serving, photos: list[bytes]) -> None:
    class Broken(FakeEncoder):
        def run(self, images, outputs):
            return {name: values * np.nan for name, values in super().run(images, outputs).items()}

    client = serving(Broken())
    assert add(client, photos[:1]).status_code == 500
    assert [r["error"]["code"] for r in add(client, photos[:2]).json()["results"]] == ["internal"] * 2
    assert client.get("/gallery").json()["count"] == 0


@embedded_alone
def test_a_full_disk_is_507_and_reads_go_on(client: TestClient, photos: list[bytes]) -> None:
    add(client, photos[:1], [{"id": "a"}])
    writer = client.app.state.galleries.get("default")._record._writer
    writer.execute(f"PRAGMA max_page_count = {writer.execute('PRAGMA page_count').fetchone()[0]}")
    reply = add(client, photos[1:12])
    assert (reply.status_code, reply.json()["error"]["code"]) == (507, StorageFull.code)
    assert [id for id, _ in found(client.post("/neighbors", content=photos[5], headers=RAW))] == ["a"]


def test_every_route_is_documented(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert {"get"} <= set(paths["/gallery"])
    assert {"get", "post"} <= set(paths["/gallery/images"])
    assert {"get", "patch", "delete"} <= set(paths["/gallery/images/{id}"])
    original = paths["/gallery/images/{id}/image"]["get"]["responses"]
    assert {"image/jpeg", "image/png", "application/octet-stream"} <= set(original["200"]["content"])
    assert {"404"} <= set(original)
    assert {"get", "post"} <= set(paths["/neighbors"])
    names = {parameter["name"] for parameter in paths["/neighbors"]["post"]["parameters"]}
    assert names == {"k", "label", "filter", "min_score", "vote", "gallery", "encoder"}


def test_metadata_that_no_reply_could_hold(client: TestClient, png: bytes) -> None:
    """Nested so deep that it can be stored, and not written inside of a reply: it would break every page it is on."""

    def nested(depth: int) -> str:
        return '{"a":' * depth + "1" + "}" * depth

    headers = {"Content-Type": "image/png"}
    for depth in (33, 254, 300):
        reply = client.post(
            "/gallery/images", params={"id": "a", "metadata": nested(depth)}, content=png, headers=headers
        )
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "metadata")
    added = client.post("/gallery/images", params={"id": "a", "metadata": nested(32)}, content=png, headers=headers)
    assert added.status_code == 200
    for depth in (33, 253, 254):
        reply = client.patch("/gallery/images/a", content=f'{{"metadata":{nested(depth)}}}')
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "metadata")
    assert client.get("/gallery/images").status_code == 200
    assert client.get("/neighbors?id=a").status_code == 200


def test_all_galleries_in_short(serving: Callable[..., TestClient], photos: list[bytes]) -> None:
    client = serving()
    assert client.get("/galleries").json() == {"galleries": []}
    add(client, photos[:3], gallery="mine")
    add(client, photos[:1], gallery="a.b")
    encoder = client.get("/gallery?gallery=mine").json()["encoder"]
    expected = [{"name": "a.b", "count": 1, "encoder": encoder}, {"name": "mine", "count": 3, "encoder": encoder}]
    assert client.get("/galleries").json() == {"galleries": expected}
    client.delete("/gallery?gallery=a.b")
    assert client.get("/galleries").json() == {"galleries": expected[1:]}
