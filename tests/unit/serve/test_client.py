"""The Python client, in a thread and in an event loop, against a real server on a real socket. The oracle is `/embed`,
asked raw for one image after the other."""

import asyncio
import io
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from in_loop import both
from on_socket import on_socket
from PIL import Image

from patchsight_serve import client_steps
from patchsight_serve.app import create_app
from patchsight_serve.client import AsyncClient, Client
from patchsight_serve.client_steps import Wait
from patchsight_serve.dataset import read_dataset
from patchsight_serve.embedder import LocalEmbedder
from patchsight_serve.errors import (
    Conflict,
    DamagedImage,
    InvalidRequest,
    NotFound,
    NotReady,
    Overloaded,
    PatchsightError,
    Unauthorized,
    UnsupportedImage,
)  # fmt: skip
from patchsight_serve.fake_encoder import FakeEncoder
from patchsight_serve.item import Item, NewImage
from patchsight_serve.manifest import Transform
from patchsight_serve.nearest import normalize
from patchsight_serve.sample_gallery import SAMPLES
from patchsight_serve.settings import ServeSettings

CUT = -1  # an answer that breaks off


def test_both_clients_can_do_the_same() -> None:
    assert {n for n in vars(Client) if n[0] != "_"} == {n for n in vars(AsyncClient) if n[0] != "_"}


class Scripted:
    """An application that answers `POST /embed` with these statuses first; counts how many it has at once."""

    def __init__(self, app: Any, answers: Sequence[int], retry_after: str) -> None:
        self.app, self.answers, self.retry_after = app, list(answers), retry_after
        self.seen, self.inside, self.most = 0, 0, 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["path"] != "/embed":
            return await self.app(scope, receive, send)
        self.seen += 1
        self.inside += 1
        self.most = max(self.most, self.inside)
        try:
            if not self.answers:
                return await self.app(scope, receive, send)
            status = self.answers.pop(0)
            while (await receive()).get("more_body"):
                pass
            headers = [(b"retry-after", self.retry_after.encode()), (b"content-length", b"90")]
            await send({"type": "http.response.start", "status": 200 if status == CUT else status, "headers": headers})
            if status != CUT:
                code = {429: "overloaded", 503: "not_ready"}[status]
                body = f'{{"error": {{"code": "{code}", "message": "later", "param": null}}}}'
                await send({"type": "http.response.body", "body": body.ljust(90).encode()})
        finally:
            self.inside -= 1
        return None


@contextmanager
def listening(
    encoder: Any = None, answers: Sequence[int] = (), retry_after: str = "7", **settings: Any
) -> Iterator[tuple[str, Scripted]]:
    encoder = encoder or FakeEncoder()
    app = create_app({encoder.manifest.name: encoder}, ServeSettings(sample_gallery=False, **settings))
    scripted = Scripted(app, answers, retry_after)
    with on_socket(scripted, "critical") as url:
        yield url, scripted


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long was to be waited; nothing is waited for."""
    said: list[float] = []

    def wait(seconds: float) -> Wait:
        said.append(seconds)
        return Wait(0)

    monkeypatch.setattr(client_steps, "Wait", wait)
    return said


def photos(count: int) -> list[bytes]:
    samples = read_dataset(SAMPLES)
    return [samples.read(i) for i in range(count)]


def one_by_one(url: str, images: Sequence[bytes], output: str = "embedding") -> np.ndarray:
    """What the server says to each image alone, sent raw."""
    headers = {"Content-Type": "application/octet-stream", "Accept": "application/octet-stream"}
    query = f"/embed?normalize=false&outputs={output}"
    replies = [httpx.post(url + query, content=image, headers=headers).raise_for_status() for image in images]
    return np.stack([np.frombuffer(reply.content, "<f4") for reply in replies])


@both
def test_rows_are_in_order_and_those_of_embed(kind: Any) -> None:
    images = photos(50)
    local = np.stack(list(LocalEmbedder(FakeEncoder()).embed_each(images)))
    with listening() as (url, app), kind(url, batch=7, concurrency=3) as client:
        got = client.embed(iter(images))
        assert got.dtype == np.float32
        assert got.tobytes() == one_by_one(url, images).tobytes() == local.tobytes()
        assert 1 <= app.most <= 3
        assert client.embed([]).shape == (0, 16)
        with pytest.raises(PatchsightError) as error:
            client.embed([*images[:9], b"text"])
        assert (error.value.param, error.value.status) == ("images[9]", 415)
        with kind(url, output="mean") as mean:
            assert mean.embed(images[:3]).tobytes() == one_by_one(url, images[:3], "mean").tobytes()


class Margin(FakeEncoder):
    """Cuts a margin away, of a width that does not halve."""

    def __init__(self) -> None:
        super().__init__()
        self.manifest = self.manifest.model_copy(update={"transform": Transform(resize=37, crop=32)})


@both
@pytest.mark.parametrize("encoder", [FakeEncoder(), Margin()], ids=["whole", "margin"])
def test_resizing_here_changes_no_bit(
    kind: Any, encoder: FakeEncoder, odd_images: dict[str, bytes], png: bytes
) -> None:
    images = [png, *odd_images.values(), *photos(5)]
    with listening(encoder) as (url, _), kind(url, resize=True, batch=4) as client:
        assert client.embed(images).tobytes() == one_by_one(url, images).tobytes()
        headers = {"Content-Type": "image/png", "Accept": "application/octet-stream"}
        expected = httpx.post(f"{url}/attention?head=1", content=png, headers=headers).content
        assert client.attention(png, head="1").tobytes() == expected


@both
@pytest.mark.parametrize("resize", [False, True])
def test_every_kind_of_picture_is_as_its_bytes_are(
    kind: Any, resize: bool, odd_images: dict[str, bytes], picture: np.ndarray, png: bytes, tmp_path: Path
) -> None:
    (tmp_path / "a.png").write_bytes(png)
    gray = Image.fromarray(picture).convert("L")
    rgba = np.dstack([picture, picture[..., :1]])
    odd = list(odd_images.values())
    pictures = [png, bytearray(png), memoryview(png), tmp_path / "a.png", str(tmp_path / "a.png"), picture]
    same = [Image.open(io.BytesIO(data)) for data in odd]
    made = [np.asarray(gray), gray, rgba, Image.fromarray(rgba)]
    with listening() as (url, _), kind(url, resize=resize) as client:
        got = client.embed([*pictures, *same, *made])
        expected = one_by_one(url, [png, *odd])
        assert (got[:6] == expected[0]).all()
        assert got[6 : 6 + len(odd)].tobytes() == expected[1:].tobytes()
        assert (got[-4] == got[-3]).all()
        assert (got[-2] == got[-1]).all()
        assert len(np.unique(got[[0, -4, -2]], axis=0)) == 3
        stack = np.stack([picture, picture[::-1]])
        assert client.embed(stack)[0].tobytes() == expected[0].tobytes()


@both
@pytest.mark.parametrize("resize", [False, True])
def test_what_is_no_picture_is_an_error_in_its_place(kind: Any, resize: bool, png: bytes, tmp_path: Path) -> None:
    bad = [
        tmp_path / "nowhere.png",
        "a\0b",
        np.zeros((4, 4, 3)),
        np.zeros((0, 4, 3), np.uint8),
        7,
        b"",
        b"text",
        png[:80],
    ]
    said = ["nowhere.png", "null", "float64", "(0, 4, 3)", "int is no picture", "0 bytes", "not an image", "damaged"]
    with listening() as (url, _), kind(url, resize=resize, batch=5) as client:
        rows = list(client.embed_each([each for one in bad for each in (png, one)]))
        good = one_by_one(url, [png])
        assert all((row == good[0]).all() for row in rows[::2])
        for row, text in zip(rows[1::2], said, strict=True):
            assert isinstance(row, PatchsightError)
            assert text in row.message
        for one in (png, str(tmp_path), Image.new("RGB", (3, 3)), np.zeros((9, 9, 3), np.uint8)):
            with pytest.raises(InvalidRequest, match="pictures"):
                client.embed(one)
        with pytest.raises(DamagedImage):
            client.attention(png[:80])


@both
def test_a_mix_of_good_and_bad_images(kind: Any) -> None:
    good = photos(6)
    mix = [b"", good[0], b"x", good[1], good[2][:2000], good[3], good[4], b"", good[5]]
    alone = {data: next(iter(LocalEmbedder(FakeEncoder()).embed_each([data]))) for data in mix}
    with listening() as (url, _), kind(url, batch=4) as client:
        for embedder in (LocalEmbedder(FakeEncoder(), batch=4), client):
            for data, row in zip(mix, embedder.embed_each(mix), strict=True):
                if isinstance(row, PatchsightError):
                    assert type(row) is type(alone[data])
                    assert row.message == alone[data].message
                else:
                    assert row.tolist() == alone[data].tolist()


@both
@pytest.mark.parametrize("answers", [[429], [429, 503, 429, CUT, 429], [503, 429, CUT]])
def test_a_server_that_is_busy_or_away_is_asked_again(kind: Any, answers: list[int], waits: list[float]) -> None:
    images = photos(3)
    with listening(answers=answers) as (url, app), kind(url, batch=3) as client:
        assert client.embed(images).tobytes() == one_by_one(url, images).tobytes()
        assert app.seen == len(answers) + 1 + 3
    told = [0.2 if answer == CUT else 7 for answer in answers]
    assert all(least <= wait <= 1.25 * least for least, wait in zip(told, waits, strict=True))


@both
@pytest.mark.parametrize(
    ("answers", "error"), [([503, 503], NotReady), ([CUT, CUT], PatchsightError), ([429] * 3, Overloaded)]
)
def test_a_server_that_stays_away_is_given_up(
    kind: Any, answers: list[int], error: type[Exception], waits: list[float]
) -> None:
    patience = {"patience_s": 0} if error is Overloaded else {}
    with listening(answers=answers) as (url, app), kind(url, **patience) as client:
        with pytest.raises(error) as raised:
            client.embed(photos(1))
        assert type(raised.value) is error
        assert app.seen == (1 if patience else 2)
    assert len(waits) == (0 if patience else 1)


@pytest.mark.parametrize(("told", "least"), [("7", 7), ("100000", 60), ("soon", 1), ("-3", 1)])
def test_the_wait_is_what_the_server_says_within_reason(told: str, least: float, waits: list[float]) -> None:
    with listening(answers=[429] * 8, retry_after=told) as (url, _), Client(url) as client:
        client.embed(photos(1))
    assert all(least <= wait <= 1.25 * least for wait in waits)
    assert len(set(waits)) == 8  # with jitter


@both
def test_more_than_the_server_takes_at_once(kind: Any) -> None:
    """More images than the queue holds, more per request than allowed, more bytes than allowed, one image too large."""
    images = photos(40)
    limits = {"max_images": 8, "max_queue": 8, "max_body_bytes": 60_000}
    with listening(**limits) as (url, app), kind(url, batch=32, concurrency=4) as client:
        huge = b"\xff" * 70_000
        rows = list(client.embed_each([*images, huge]))
        assert np.stack(rows[:40]).tobytes() == one_by_one(url, images).tobytes()
        assert "bytes or more, the limit is 60,000" in rows[40].message
        assert app.most <= 4


def test_who_stops_listening_waits_for_nothing() -> None:
    """The server says 429 for a minute; the client leaves."""
    images = photos(8)
    with listening(answers=[], retry_after="60") as (url, app), Client(url, batch=2, concurrency=2) as client:
        start = time.monotonic()
        rows = client.embed_each(images)
        next(rows)
        app.answers = [429] * 100
        rows.close()
        assert time.monotonic() - start < 30

        app.answers, app.seen = [429] * 100, 0
        with pytest.raises(RuntimeError, match="the caller's own"):
            for _ in client.embed_each(broken_after(images[:4], app)):
                pass
        assert time.monotonic() - start < 30


def broken_after(images: Sequence[bytes], app: Scripted) -> Iterator[bytes]:
    yield from images
    while app.seen < 1:
        time.sleep(0.01)
    raise RuntimeError("the caller's own")


def test_a_cancelled_task_leaves_nothing_behind() -> None:
    async def scenario(url: str, app: Scripted) -> None:
        async with AsyncClient(url, batch=2, concurrency=3) as client:
            app.answers = [429] * 100
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(client.embed(photos(12)), 1)
            assert 1 <= app.most <= 3
            assert len(asyncio.all_tasks()) == 1
            app.answers = []
            assert (await client.embed(photos(12))).shape == (12, 16)

    start = time.monotonic()
    with listening(retry_after="60") as (url, app):
        asyncio.run(scenario(url, app))
    assert time.monotonic() - start < 30


@both
def test_encoders_and_neighbors(kind: Any, png: bytes, tmp_path: Path) -> None:
    images = photos(6)
    with listening(state_dir=tmp_path) as (url, _), kind(url, resize=True) as client:
        assert [encoder["name"] for encoder in client.encoders()] == ["fake"]
        for i, image in enumerate(images):
            said = {"id": f"i{i}", "label": f"l{i % 2}", "metadata": f'{{"n": {i}}}'}
            httpx.post(f"{url}/gallery/images", content=image, params=said).raise_for_status()
        best, *_ = client.neighbors(images[2])
        assert (best.id, best.label) == ("i2", "l0")
        assert best.score == pytest.approx(1)
        found = client.neighbors_of("i2", k=2, label="l0")
        assert len(found) == 2
        raw = httpx.get(f"{url}/neighbors?id=i2&k=2&label=l0").json()["neighbors"]
        assert [(n.id, n.score) for n in found] == [(n["id"], n["score"]) for n in raw]
        some = client.neighbors_of("i2", label=["l0", "l1"], filter={"n": {"gte": 1, "lt": 4}})
        assert {n.id for n in some} == {"i1", "i3"}
        assert [n.id for n in client.neighbors(images[5], filter='{"n": 5}', label=None)] == ["i5"]
        with pytest.raises(InvalidRequest, match="no operator 'like'") as refused:
            client.neighbors(images[5], filter={"n": {"like": 5}})
        assert refused.value.param == "filter"
        with pytest.raises(InvalidRequest, match="filter cannot be written as JSON"):
            client.neighbors(images[5], filter={"n": {1, 2}})
        with pytest.raises(InvalidRequest, match="label is empty"):
            client.neighbors(images[5], label=[])
        with pytest.raises(NotFound, match="nowhere"):
            client.neighbors(png, gallery="nowhere")


@both
def test_a_gallery_is_filled_listed_and_asked_for_many(kind: Any, tmp_path: Path) -> None:
    images = photos(30)
    new = [(image, {"id": f"i{i:02d}", "metadata": {"n": i}}) for i, image in enumerate(images)]
    new.insert(7, (b"no picture", {"id": "bad"}))
    with listening(state_dir=tmp_path) as (url, _), kind(url, batch=4, concurrency=3) as client:
        results = list(client.add_each(new, gallery="mine"))
        assert isinstance(results.pop(7), UnsupportedImage)
        assert [(r.id, r.created) for r in results] == [(f"i{i:02d}", True) for i in range(30)]
        assert not any(r.created for r in client.add_each(new[:7], gallery="mine"))
        assert client.gallery(gallery="mine")["count"] == 30
        encoder = client.gallery(gallery="mine")["encoder"]
        assert client.galleries() == [{"name": "mine", "count": 30, "encoder": encoder}]
        listed = list(client.gallery_images(gallery="mine"))
        assert [(one["id"], one["metadata"]) for one in listed] == [
            (item["id"], item["metadata"]) for _, item in new if "metadata" in item
        ]
        found = list(client.neighbors_each([*images[:5], b"no picture"], gallery="mine", k=1))
        assert isinstance(found.pop(), UnsupportedImage)
        assert [[n.id for n in one] for one in found] == [[f"i{i:02d}"] for i in range(5)]


@both
def test_regions(kind: Any, tmp_path: Path) -> None:
    images = photos(6)
    with listening(state_dir=tmp_path) as (url, _), kind(url) as client:
        for i, image in enumerate(images):
            httpx.post(f"{url}/gallery/images?id=i{i}&label=l{i % 2}", content=image).raise_for_status()
        box = (0.25, 0.2, 0.75, 0.5)
        best, *others = client.neighbors_of_region(images[3], box, k=4)
        assert (best.id, best.label, len(best.box), len(others)) == ("i3", "l1", 4, 3)
        raw = httpx.get(f"{url}/neighbors/region?id=i3&box=0.25,0.2,0.75,0.5&k=2&label=l0").json()["neighbors"]
        found = client.neighbors_of_region_of("i3", box, k=2, label="l0")
        assert [asdict(n) | {"box": list(n.box)} for n in found] == raw
        assert len(raw) == 2
        with pytest.raises(InvalidRequest, match="fractions of the picture") as refused:
            client.neighbors_of_region(images[3], (0, 0, 20, 20))
        assert refused.value.param == "box"


@both
def test_duplicates_clusters_and_the_map(kind: Any, tmp_path: Path) -> None:
    images = photos(6)
    with listening(state_dir=tmp_path) as (url, _), kind(url) as client:
        assert client.duplicates() == client.clusters() == client.map().ids == []
        for i, image in enumerate(images * 2):
            httpx.post(f"{url}/gallery/images?id=i{i:02d}&label=l{i % 2}", content=image).raise_for_status()
        groups = client.duplicates(min_score=0.9999)
        assert [(group.id, group.size) for group in groups] == [(f"i{i:02d}", 2) for i in range(6)]
        assert [(m.id, m.label, m.copy_of) for m in groups[3].members] == [("i03", "l1", None), ("i09", "l1", "i03")]
        assert [m.score for m in groups[3].members] == pytest.approx([1, 1])
        assert client.duplicates(min_score=0.9999, limit=2) == groups[:2]
        raw = httpx.get(f"{url}/gallery/clusters?k=3&typical=2").json()["clusters"]
        assert [asdict(cluster) for cluster in client.clusters(k=3, typical=2)] == raw
        assert sum(cluster.size for cluster in client.clusters(k=3)) == 12
        with pytest.raises(InvalidRequest, match="k is 13, the gallery has 12 images"):
            client.clusters(k=13)
        placed, told = client.map(limit=5), httpx.get(f"{url}/gallery/map?limit=5").json()
        assert (placed.method, placed.umap, placed.images) == ("pca", "too_few", 12)
        assert (placed.ids, placed.labels) == (told["ids"], told["labels"])
        assert placed.positions.tolist() == pytest.approx(np.array([told["xs"], told["ys"]]).T)
        with pytest.raises(NotFound, match="nowhere"):
            client.duplicates(gallery="nowhere")


@both
def test_a_list_of_groups_is_fetched_page_by_page(kind: Any, tmp_path: Path) -> None:
    vectors = normalize(np.random.default_rng(0).standard_normal((150, 16)).astype(np.float32))
    with listening(state_dir=tmp_path) as (url, app), kind(url) as client:
        copies = [NewImage(Item(f"i{i:03d}-{c}"), b"%d" % i, b"", v) for i, v in enumerate(vectors) for c in "ab"]
        app.app.state.galleries.get("default").add(copies, client.encoder)
        assert [group.id for group in client.duplicates(min_score=1)] == [f"i{i:03d}-a" for i in range(150)]


@both
def test_what_is_wrong_with_the_server_is_said(kind: Any, waits: list[float]) -> None:
    with listening(api_keys="right") as (url, _):
        with pytest.raises(Unauthorized):
            kind(url, "wrong")
        with kind(url, "right"), pytest.raises(InvalidRequest, match="no output 'other'"):
            kind(url, "right", output="other")
        with pytest.raises(NotFound, match="has no encoder 'dino'; it has fake"):
            kind(url, "right", encoder="dino")
    with pytest.raises(PatchsightError, match="http://127.0.0.1:1: "):
        kind("http://127.0.0.1:1")
    with pytest.raises(InvalidRequest, match="batch is 0"):
        kind(url, batch=0)
    assert len(waits) == 1


@both
def test_a_server_whose_encoder_is_exchanged_is_an_error(kind: Any) -> None:
    with listening() as (url, _), kind(url) as client:
        client._talk.encoder = client.encoder._replace(sha256="0" * 64)
        with pytest.raises(Conflict, match="exchanged"):
            client.embed(photos(1))
        with pytest.raises(Conflict, match="exchanged"):
            client.embed([*photos(1), b"text"])


def test_the_client_is_light() -> None:
    """Training and export import it: neither the server's framework nor FAISS or ONNX Runtime comes with it."""

    code = "import sys, patchsight_serve.client; print(*sys.modules)"
    loaded = set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split())
    assert "patchsight_serve.client" in loaded
    assert not loaded & {"fastapi", "starlette", "uvicorn", "faiss", "onnxruntime", "pyarrow", "tritonclient", "torch"}
