"""`POST /embed` and `POST /attention`: what comes back is what the decoder and the encoder give, in every form."""

import asyncio
import base64
import io
import itertools
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from starlette.testclient import TestClient

from patchsight_serve.decode import decode, fit, open_rgb
from patchsight_serve.encoder import Encoder
from patchsight_serve.fake_encoder import FakeEncoder
from patchsight_serve.heatmap import keep_mass, overlay, shown_crop
from patchsight_serve.ort_encoder import OrtEncoder

RAW = {"Content-Type": "application/octet-stream"}
GRAPH = {
    "embedding": "cls_embedding", "cls": "cls_embedding", "mean": "mean_embedding", "attention": "attention",
    "patch_tokens": "patch_tokens",
}  # fmt: skip


def oracle(data: bytes, output: str, encoder: Encoder | None = None, normalize: bool = True) -> np.ndarray:
    encoder = encoder or FakeEncoder()
    pixels = decode(data, encoder.manifest.transform)
    value = encoder.run(pixels[None], [GRAPH[output]])[GRAPH[output]][0].astype(np.float64)
    return value / np.linalg.norm(value) if normalize and value.ndim == 1 else value


def unpack(packed: dict[str, Any]) -> np.ndarray:
    assert packed["dtype"] == "float32"
    return np.frombuffer(base64.b64decode(packed["data"]), "<f4").reshape(packed["shape"])


def as_raw(client: TestClient, images: Sequence[bytes], **query: Any) -> Any:
    (image,) = images
    return client.post("/embed", content=image, headers=RAW, params=query)


def as_form(client: TestClient, images: Sequence[bytes], **query: Any) -> Any:
    return client.post("/embed", files=[("images", ("photo.jpg", i)) for i in images], params=query)


def as_base64(client: TestClient, images: Sequence[bytes], **query: Any) -> Any:
    return client.post("/embed", json={"images": [base64.b64encode(i).decode() for i in images]}, params=query)


def as_data_uri(client: TestClient, images: Sequence[bytes], **query: Any) -> Any:
    uris = [f"data:image/png;base64,{base64.b64encode(i).decode()}" for i in images]
    return client.post("/embed", json={"images": uris}, params=query)


WAYS = {"raw": as_raw, "form": as_form, "base64": as_base64, "data URI": as_data_uri}
SEVERAL = {name: way for name, way in WAYS.items() if name != "raw"}


@pytest.fixture
def photos(encode: Callable[..., bytes]) -> list[bytes]:
    rng = np.random.default_rng(0)
    return [encode(rng.integers(0, 256, (40, 30, 3), np.uint8)) for _ in range(5)]


# Replies


@pytest.mark.parametrize("way", WAYS)
def test_one_image_in_every_way(way: str, client: TestClient, png: bytes) -> None:
    reply = WAYS[way](client, [png])
    assert reply.status_code == 200
    manifest = FakeEncoder().manifest
    assert reply.json()["encoder"] == {"name": "fake", "sha256": manifest.sha256}
    (result,) = reply.json()["results"]
    assert list(result) == ["index", "embedding"]
    np.testing.assert_allclose(result["embedding"], oracle(png, "embedding"), rtol=1e-6)


@pytest.mark.parametrize("way", SEVERAL)
def test_several_images_keep_their_order(way: str, client: TestClient, photos: list[bytes]) -> None:
    results = SEVERAL[way](client, photos).json()["results"]
    assert [r["index"] for r in results] == [0, 1, 2, 3, 4]
    for photo, result in zip(photos, results, strict=True):
        np.testing.assert_allclose(result["embedding"], oracle(photo, "embedding"), rtol=1e-6)


@pytest.mark.parametrize("kind", ["image/jpeg", "image/x-unheard-of", "IMAGE/PNG; q=1", "application/octet-stream", ""])
def test_the_format_is_told_from_the_bytes(kind: str, client: TestClient, png: bytes) -> None:
    assert client.post("/embed", content=png, headers={"Content-Type": kind}).status_code == 200


def test_all_outputs_in_json(serving: Callable[..., TestClient], tiny_bundle: Path, png: bytes) -> None:
    encoder = OrtEncoder(tiny_bundle, threads=1)
    reply = as_raw(serving(encoder), [png], outputs=",".join(GRAPH)).json()
    (result,) = reply["results"]
    assert list(result) == ["index", *GRAPH]
    for output in GRAPH:
        value = result[output] if isinstance(result[output], list) else unpack(result[output])
        np.testing.assert_allclose(value, oracle(png, output, encoder), rtol=1e-5, atol=1e-6)


def test_embeddings_are_of_length_one_unless_told_otherwise(client: TestClient, png: bytes) -> None:
    def embedding(**query: Any) -> np.ndarray:
        return np.array(as_raw(client, [png], **query).json()["results"][0]["embedding"])

    assert np.linalg.norm(embedding()) == pytest.approx(1)
    np.testing.assert_array_equal(embedding(normalize="true"), embedding())
    np.testing.assert_array_equal(embedding(normalize="false"), oracle(png, "embedding", normalize=False))


def test_a_vector_of_zeros_stays_one(client: TestClient, encode: Callable[..., bytes]) -> None:
    black = encode(np.zeros((8, 8, 3), np.uint8))
    assert as_raw(client, [black]).json()["results"][0]["embedding"] == [0.0] * 16


@pytest.mark.parametrize("output", GRAPH)
def test_npy_and_octet_stream(output: str, client: TestClient, photos: list[bytes]) -> None:
    expected = np.stack([oracle(photo, output) for photo in photos])
    files = [("images", ("photo.png", photo)) for photo in photos]
    url = f"/embed?outputs={output}"
    npy = client.post(url, files=files, headers={"Accept": "application/x-npy"})
    assert npy.headers["content-type"] == "application/x-npy"
    array = np.load(io.BytesIO(npy.content), allow_pickle=False)
    assert array.dtype == np.dtype("<f4")
    np.testing.assert_allclose(array, expected, rtol=1e-6)
    raw = client.post(url, files=files, headers={"Accept": "application/octet-stream"})
    assert (raw.headers["x-dtype"], raw.headers["x-encoder"]) == ("float32", "fake")
    shape = [int(side) for side in raw.headers["x-shape"].split(",")]
    np.testing.assert_array_equal(np.frombuffer(raw.content, "<f4").reshape(shape), array)


def test_npz_holds_several_outputs(client: TestClient, photos: list[bytes]) -> None:
    files = [("images", ("photo.png", photo)) for photo in photos]
    reply = client.post("/embed?outputs=attention,mean", files=files, headers={"Accept": "application/x-npz"})
    with np.load(io.BytesIO(reply.content), allow_pickle=False) as arrays:
        assert sorted(arrays) == ["attention", "mean"]
        for output in arrays:
            np.testing.assert_allclose(arrays[output], [oracle(photo, output) for photo in photos], rtol=1e-6)


@pytest.mark.parametrize("accept", ["application/x-npy", "application/octet-stream"])
def test_two_outputs_do_not_fit_one_array(accept: str, client: TestClient, png: bytes) -> None:
    reply = client.post("/embed?outputs=cls,mean", content=png, headers=RAW | {"Accept": accept})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "outputs")


def test_the_encoder_is_chosen_by_name(serving: Callable[..., TestClient], png: bytes) -> None:
    one, two = FakeEncoder("one"), FakeEncoder("two", image_size=16)
    client = serving(one, two, encoder="two")
    for query, encoder in (({}, two), ({"encoder": "one"}, one), ({"encoder": "two"}, two)):
        reply = as_raw(client, [png], **query).json()
        assert reply["encoder"]["name"] == encoder.manifest.name
        np.testing.assert_allclose(reply["results"][0]["embedding"], oracle(png, "cls", encoder), rtol=1e-6)
    reply = as_raw(client, [png], encoder="three")
    assert reply.status_code == 404
    assert reply.json()["error"] == {
        "code": "not_found", "message": "no encoder 'three' is loaded; there are one, two", "param": "encoder",
    }  # fmt: skip


@pytest.mark.parametrize("outputs", ["", "logits", "embedding,", "Embedding"])
def test_unknown_outputs(outputs: str, client: TestClient, png: bytes) -> None:
    reply = as_raw(client, [png], outputs=outputs)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "outputs")


# Bad images

BAD = ["empty", "text", "truncated", "bomb", "svg"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", BAD)
def test_a_bad_image_alone_gives_its_status(
    name: str, way: str, client: TestClient, bad_images: dict[str, tuple[bytes, int, str]]
) -> None:
    data, status, code = bad_images[name]
    reply = WAYS[way](client, [data])
    error = reply.json()["error"]
    assert (reply.status_code, error["code"], error["param"]) == (status, code, "images[0]")


@pytest.mark.parametrize("way", SEVERAL)
def test_bad_images_among_good_ones(
    way: str, client: TestClient, bad_images: dict[str, tuple[bytes, int, str]], photos: list[bytes]
) -> None:
    mixed = [photos[0], *(data for data, _, _ in bad_images.values()), photos[1]]
    reply = SEVERAL[way](client, mixed)
    assert reply.status_code == 200
    first, *bad, last = reply.json()["results"]
    np.testing.assert_allclose(first["embedding"], oracle(photos[0], "embedding"), rtol=1e-6)
    np.testing.assert_allclose(last["embedding"], oracle(photos[1], "embedding"), rtol=1e-6)
    for i, (result, (_, _, code)) in enumerate(zip(bad, bad_images.values(), strict=True), start=1):
        assert list(result) == ["index", "error"]
        assert (result["index"], result["error"]["code"], result["error"]["param"]) == (i, code, f"images[{i}]")


@pytest.mark.parametrize("way", SEVERAL)
def test_odd_images_among_bad_ones_are_embedded_as_alone(
    way: str, client: TestClient, odd_images: dict[str, bytes], bad_images: dict[str, tuple[bytes, int, str]]
) -> None:
    """CMYK, 16-bit, palette, rotated, animated, 1 × 1: each gets what it gets alone, whatever stands beside it."""
    bad = [data for data, _, _ in bad_images.values()]
    mixed = [image for i, odd in enumerate(odd_images.values()) for image in (odd, bad[i % len(bad)])]
    results = SEVERAL[way](client, mixed).json()["results"]
    assert ["error" in result for result in results] == [False, True] * len(odd_images)
    for odd, result in zip(odd_images.values(), results[::2], strict=True):
        np.testing.assert_allclose(result["embedding"], oracle(odd, "embedding"), rtol=1e-6)


def test_only_bad_images_are_still_answered_one_by_one(
    client: TestClient, bad_images: dict[str, tuple[bytes, int, str]]
) -> None:
    reply = as_form(client, [data for data, _, _ in bad_images.values()])
    assert reply.status_code == 200
    assert [r["error"]["code"] for r in reply.json()["results"]] == [code for _, _, code in bad_images.values()]


@pytest.mark.parametrize("accept", ["application/x-npy", "application/octet-stream", "application/x-npz"])
def test_a_binary_reply_fails_whole(accept: str, client: TestClient, photos: list[bytes]) -> None:
    files = [("images", ("photo.png", data)) for data in (photos[0], photos[1], photos[2], b"junk")]
    reply = client.post("/embed", files=files, headers={"Accept": accept})
    assert (reply.status_code, reply.json()["error"]["param"]) == (415, "images[3]")


def test_damaged_base64_harms_no_other_image(client: TestClient, png: bytes) -> None:
    good = base64.b64encode(png).decode()
    entries = [good, "not base64!", 7, None, "https://example.org/cat.jpg", "data:image/png,plain", good + "\n", "ä"]
    results = client.post("/embed", json={"images": entries}).json()["results"]
    assert [r.get("error", {}).get("code") for r in results] == [
        None,
        *["invalid_request"] * 5,
        None,
        "invalid_request",
    ]
    assert "never fetched" in results[4]["error"]["message"]


@pytest.mark.parametrize("way", WAYS)
def test_odd_images_are_embedded(way: str, client: TestClient, odd_images: dict[str, bytes]) -> None:
    for name, data in odd_images.items():
        reply = WAYS[way](client, [data])
        assert reply.status_code == 200, (name, reply.text)
        np.testing.assert_allclose(reply.json()["results"][0]["embedding"], oracle(data, "embedding"), rtol=1e-6)


def test_an_image_that_breaks_the_encoder_harms_no_other(
    serving: Callable[..., TestClient], photos: list[bytes]
) -> None:
    poison = decode(photos[2], FakeEncoder().manifest.transform)

    class Breaking(FakeEncoder):
        def run(self, images: np.ndarray, outputs: Sequence[str]) -> dict[str, np.ndarray]:
            if any((image == poison).all() for image in images):
                raise RuntimeError("/secret/path.cc:17")
            return super().run(images, outputs)

    client = serving(Breaking())
    results = as_form(client, photos).json()["results"]
    assert ["error" in r for r in results] == [False, False, True, False, False]
    alone = as_raw(client, [photos[2]])
    assert (alone.status_code, alone.json()["error"]["code"]) == (500, "internal")
    assert "secret" not in alone.text
    assert client.get("/readyz").status_code == 200


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(
        ["image/png", "application/json", "multipart/form-data; boundary=x", "multipart/form-data", "text/html"]
    ),
    body=st.one_of(st.binary(max_size=60), st.sampled_from([b"--x\r\n", b"--x--", b'{"images": [[]]}', b"[" * 2000])),
    path=st.sampled_from(["/embed", "/attention", "/embed?outputs=attention&normalize=0"]),
)
def test_no_body_is_a_server_error(client: TestClient, kind: str, body: bytes, path: str) -> None:
    reply = client.post(path, content=body, headers={"Content-Type": kind})
    assert 400 <= reply.status_code < 500, reply.text
    assert set(reply.json()["error"]) == {"code", "message", "param"}


# Limits


def test_more_images_than_allowed(serving: Callable[..., TestClient], png: bytes) -> None:
    client = serving(max_images=3)
    for way in SEVERAL.values():
        assert way(client, [png] * 3).status_code == 200
        reply = way(client, [png] * 4)
        assert (reply.status_code, reply.json()["error"]["code"]) == (413, "too_large")
        assert "the limit is 3" in reply.json()["error"]["message"]


@pytest.mark.parametrize("announced", [True, False])
def test_more_bytes_than_allowed(serving: Callable[..., TestClient], announced: bool) -> None:
    client = serving(max_body_bytes=1000)
    for kind in ("image/png", "application/json", "multipart/form-data; boundary=x"):
        content = b"x" * 1001 if announced else iter([b"x" * 1001])  # the latter goes without Content-Length
        reply = client.post("/embed", content=content, headers={"Content-Type": kind})
        assert (reply.status_code, reply.json()["error"]["code"]) == (413, "too_large"), kind


def test_one_image_over_its_limits_harms_no_other(serving: Callable[..., TestClient], photos: list[bytes]) -> None:
    client = serving(max_image_bytes=len(photos[0]) + 100, max_pixels=1500)
    file = io.BytesIO()
    Image.new("RGB", (50, 31)).save(file, "PNG")
    results = as_form(client, [photos[0], file.getvalue(), photos[1] + b"x" * 300]).json()["results"]
    assert [r.get("error", {}).get("code") for r in results] == [None, "too_large", "too_large"]


@pytest.mark.parametrize(
    ("kind", "body", "status"),
    [
        ("application/json", b"", 400),
        ("application/json", b"{", 400),
        ("application/json", b"[]", 400),
        ("application/json", b'{"images": []}', 400),
        ("application/json", b'{"images": "abc"}', 400),
        ("application/json", b'{"images": ["aGk="], "image": 1}', 400),
        ("multipart/form-data", b"", 400),
        ("multipart/form-data; boundary=x", b"--x--\r\n", 400),
        (
            "multipart/form-data; boundary=x",
            b'--x\r\nContent-Disposition: form-data; name="images"\r\n\r\nhi\r\n--x--\r\n',
            400,
        ),
        ("application/x-www-form-urlencoded", b"abc", 415),
        ("text/plain", b"abc", 415),
    ],
)
def test_malformed_bodies(kind: str, body: bytes, status: int, client: TestClient) -> None:
    reply = client.post("/embed", content=body, headers={"Content-Type": kind})
    assert reply.status_code == status, reply.text


# Overload and deadlines


class Slow(FakeEncoder):
    """Holds every batch until told to go on; the first, which proves readiness at the start, passes."""

    def __init__(self) -> None:
        super().__init__()
        self.go, self.inside, self.calls = threading.Event(), threading.Event(), itertools.count()

    def run(self, images: np.ndarray, outputs: Sequence[str]) -> dict[str, np.ndarray]:
        if next(self.calls):
            self.inside.set()
            assert self.go.wait(60)
        return super().run(images, outputs)


def test_a_full_queue_answers_429_at_once_and_counts_images(
    serving: Callable[..., TestClient], photos: list[bytes]
) -> None:
    encoder = Slow()
    client = serving(encoder, max_queue=4, max_images=4)
    replies: list[Any] = []
    worker = threading.Thread(target=lambda: replies.append(as_form(client, photos[:2])))
    worker.start()
    assert encoder.inside.wait(60)
    refused = as_form(client, photos[:3])
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "overloaded")
    assert int(refused.headers["retry-after"]) >= 1
    assert 'patchsight_rejected_images_total{reason="overloaded"} 3.0' in client.get("/metrics").text
    encoder.go.set()
    worker.join(60)
    assert replies[0].status_code == 200
    assert as_form(client, photos[:4]).status_code == 200


@pytest.mark.parametrize("path", ["/embed", "/embed?priority=bulk", "/attention"])
def test_a_full_server_refuses_before_it_has_read_the_body(path: str, serving: Callable[..., TestClient]) -> None:
    """A generator that is asked for nothing: the client of a test gives the body only as it is read."""
    client = serving()
    client.app.state.service.encoder().engine.max_queue = 0
    sent: list[bytes] = []

    async def receive() -> dict[str, Any]:
        sent.append(b"x")
        return {"type": "http.request", "body": b"x", "more_body": True}

    async def send(message: dict[str, Any]) -> None:
        statuses.append(message.get("status"))

    statuses: list[int | None] = []
    path, _, query = path.partition("?")
    headers = [(b"content-type", b"image/jpeg"), (b"content-length", b"1000000")]
    scope = {"type": "http", "method": "POST", "path": path, "query_string": query.encode(), "headers": headers}
    asyncio.run(client.app({"http_version": "1.1", "app": client.app, **scope}, receive, send))
    assert statuses[0] == 429
    assert not sent


def test_an_encoder_that_hangs_answers_504_and_readyz_503(
    serving: Callable[..., TestClient], png: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("patchsight_serve.service.PROOF_TIMEOUT_S", 0.05)
    encoder = Slow()
    client = serving(encoder, timeout_s=0.05, ready_age_s=1e-6)
    reply = as_raw(client, [png])
    assert (reply.status_code, reply.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert client.get("/readyz").status_code == 503
    assert client.get("/livez").status_code == 200
    encoder.go.set()
    for _ in range(1000):  # its deadline is short, and the machine may be busy
        if as_raw(client, [png]).status_code == client.get("/readyz").status_code == 200:
            return
    raise AssertionError("it does not recover")


# Attention


def picture_of(reply: Any) -> np.ndarray:
    assert reply.headers["content-type"] == "image/png"
    return np.asarray(Image.open(io.BytesIO(reply.content)).convert("RGB"))


@pytest.mark.parametrize(
    ("query", "head", "mass"), [({}, None, None), ({"head": "1"}, 1, None), ({"mass": "0.6"}, None, 0.6)]
)
def test_the_picture_is_the_overlay_of_the_map(
    query: dict[str, str], head: int | None, mass: float | None, client: TestClient, photos: list[bytes]
) -> None:
    data = photos[0]
    heads = oracle(data, "attention").astype(np.float32)
    chosen = heads.mean(axis=0) if head is None else heads[head]
    kept = chosen if mass is None else keep_mass(chosen, mass)
    shown = shown_crop(open_rgb(data), FakeEncoder().manifest.transform, 8)
    expected = np.asarray(Image.open(io.BytesIO(overlay(shown, kept, mass is not None))))
    reply = client.post("/attention", content=data, headers=RAW, params=query)
    np.testing.assert_array_equal(picture_of(reply), expected)
    assert min(expected.shape[:2]) >= 384


@pytest.mark.parametrize("way", ["raw", "form", "json"])
def test_attention_takes_every_way(way: str, client: TestClient, png: bytes) -> None:
    body: dict[str, Any] = {
        "raw": {"content": png, "headers": RAW},
        "form": {"files": [("images", ("a.png", png))]},
        "json": {"json": {"images": [base64.b64encode(png).decode()]}},
    }[way]
    assert client.post("/attention", **body).status_code == 200


def test_the_bare_map(client: TestClient, png: bytes) -> None:
    expected = oracle(png, "attention")
    reply = client.post("/attention", content=png, headers=RAW | {"Accept": "application/json"})
    np.testing.assert_allclose(unpack(reply.json()["attention"]), expected.mean(axis=0), rtol=1e-5)
    reply = client.post("/attention?head=0", content=png, headers=RAW | {"Accept": "application/x-npy"})
    np.testing.assert_allclose(np.load(io.BytesIO(reply.content)), expected[0], rtol=1e-5)
    reply = client.post("/attention?mass=0.3", content=png, headers=RAW | {"Accept": "application/octet-stream"})
    values = np.frombuffer(reply.content, "<f4").reshape(8, 8)
    np.testing.assert_array_equal(values, keep_mass(expected.mean(axis=0).astype(np.float32), 0.3))


@pytest.mark.parametrize(
    ("query", "param"),
    [("head=2", "head"), ("head=-1", "head"), ("head=max", "head"), ("mass=0", "mass"), ("mass=1.1", "mass"),
     ("mass=nan", "mass"), ("head=²", "head")],
)  # fmt: skip
def test_values_out_of_range(query: str, param: str, client: TestClient, png: bytes) -> None:
    reply = client.post(f"/attention?{query}", content=png, headers=RAW)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


def test_attention_of_two_images_is_refused(client: TestClient, png: bytes) -> None:
    reply = client.post("/attention", files=[("images", ("a", png)), ("images", ("b", png))])
    assert (reply.status_code, reply.json()["error"]["code"]) == (413, "too_large")


@pytest.mark.parametrize("name", BAD)
def test_attention_of_a_bad_image(name: str, client: TestClient, bad_images: dict[str, tuple[bytes, int, str]]) -> None:
    data, status, code = bad_images[name]
    reply = client.post("/attention", content=data, headers=RAW)
    assert (reply.status_code, reply.json()["error"]["code"]) == (status, code)


# Encoders with `mean_embedding` alone


def test_a_resnet_is_embedded_by_its_mean(
    serving: Callable[..., TestClient], mean_bundle: Path, photos: list[bytes]
) -> None:
    encoder = OrtEncoder(mean_bundle, threads=1)
    client = serving(FakeEncoder(), encoder)
    for outputs in ("embedding", "mean", "embedding,mean"):
        results = as_form(client, photos, encoder="resnet", outputs=outputs).json()["results"]
        for photo, result in zip(photos, results, strict=True):
            assert list(result) == ["index", *outputs.split(",")]
            for output in outputs.split(","):
                np.testing.assert_allclose(result[output], oracle(photo, "mean", encoder), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("outputs", ["attention", "cls", "patch_tokens", "embedding,attention"])
def test_what_a_resnet_lacks_is_named(
    outputs: str, serving: Callable[..., TestClient], mean_bundle: Path, png: bytes
) -> None:
    client = serving(FakeEncoder(), OrtEncoder(mean_bundle, threads=1))
    reply = as_raw(client, [png], encoder="resnet", outputs=outputs)
    lacking = outputs.split(",")[-1]
    assert reply.status_code == 400
    assert reply.json()["error"] == {
        "code": "invalid_request", "param": "outputs",
        "message": f"encoder 'resnet' (tiny ResNet) has no output '{lacking}'; it has embedding, mean",
    }  # fmt: skip


@pytest.mark.parametrize("query", ["", "&head=0", "&head=mean&mass=0.6"])
@pytest.mark.parametrize("accept", ["image/png", "application/json"])
def test_a_resnet_has_no_attention_to_show(
    query: str, accept: str, serving: Callable[..., TestClient], mean_bundle: Path, png: bytes
) -> None:
    client = serving(FakeEncoder(), OrtEncoder(mean_bundle, threads=1))
    reply = client.post(f"/attention?encoder=resnet{query}", content=png, headers=RAW | {"Accept": accept})
    assert reply.status_code == 400
    assert reply.json()["error"] == {
        "code": "invalid_request", "param": "encoder",
        "message": "encoder 'resnet' (tiny ResNet) has no output 'attention'; it has embedding, mean",
    }  # fmt: skip
    assert client.get("/readyz").status_code == 200


def test_what_is_shown_is_what_the_encoder_saw(photos: list[bytes]) -> None:
    """Scaled down again, the shown crop is the encoder's input, up to resampling twice."""
    image = open_rgb(photos[0]).resize((600, 400), Image.Resampling.BICUBIC)
    transform = FakeEncoder().manifest.transform
    again = Image.fromarray(shown_crop(image, transform, 8)).resize((32, 32), Image.Resampling.BICUBIC)
    assert np.abs(np.asarray(again).astype(int) - fit(image, transform)).mean() < 4
