"""A folder into a gallery, of a server and of this machine: all that can be read, once, whatever comes between."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from on_socket import on_socket

from patchsight_serve import client_steps, embed
from patchsight_serve.app import create_app
from patchsight_serve.client import Client
from patchsight_serve.dataset import read_dataset
from patchsight_serve.embedded_galleries import EmbeddedGalleries as Galleries
from patchsight_serve.embedder import LocalEmbedder
from patchsight_serve.errors import NotReady, PatchsightError
from patchsight_serve.fake_encoder import FakeEncoder
from patchsight_serve.filling import Filled, ServerGallery, fill
from patchsight_serve.item import Added, Identity
from patchsight_serve.nearest import normalize
from patchsight_serve.ort_encoder import OrtEncoder
from patchsight_serve.own_gallery import OwnGallery
from patchsight_serve.settings import ServeSettings
from patchsight_serve.skipped import Skipped

CUT = -1  # an answer that breaks off
BAD = {"cat/0bad.png", "dog/0bad too.png", "dog/empty.jpg"}


@pytest.fixture
def photos(tmp_path: Path, encode: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch) -> Path:
    """80 pictures of two classes, a copy of one, and three files that are none, two of them alike."""
    monkeypatch.chdir(tmp_path)
    noise = np.random.default_rng(1).integers(0, 256, (80, 20, 16, 3), np.uint8)
    for i, pixels in enumerate([*noise, noise[0]]):
        path = tmp_path / "photos" / ("cat" if i % 2 else "dog/deep") / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(pixels))
    (tmp_path / "photos" / "cat" / "0bad.png").write_text("a text")
    (tmp_path / "photos" / "dog" / "0bad too.png").write_text("a text")
    (tmp_path / "photos" / "dog" / "empty.jpg").write_bytes(b"")
    return tmp_path / "photos"


class Scripted:
    """An application that answers `POST /gallery/images` with these statuses first, before or after doing what was
    asked; and counts the bytes of those that it lets pass."""

    def __init__(self, app: Any, answers: Sequence[int]) -> None:
        self.app, self.answers, self.bytes = app, list(answers), 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] != "/gallery/images":
            return await self.app(scope, receive, send)
        self.bytes += int(dict(scope["headers"])[b"content-length"])
        if not self.answers:
            return await self.app(scope, receive, send)
        status = self.answers.pop(0)
        if status == CUT:  # it is done, and the answer is lost

            async def lose(message: Any) -> None:
                if message["type"] == "http.response.start":
                    await send(message | {"headers": [(b"content-length", b"9999")]})

            return await self.app(scope, receive, lose)
        while (await receive()).get("more_body"):
            pass
        code = {429: "overloaded", 503: "not_ready", 504: "deadline_exceeded"}[status]
        body = json.dumps({"error": {"code": code, "message": "later", "param": None}}).encode()
        headers = [(b"retry-after", b"0"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        return await send({"type": "http.response.body", "body": body})


@contextmanager
def listening(
    state: Path, answers: Sequence[int] = (), encoder: Any = None, **settings: Any
) -> Iterator[tuple[str, Scripted]]:
    encoder = encoder or FakeEncoder()
    app = create_app({encoder.manifest.name: encoder}, ServeSettings(sample_gallery=False, state_dir=state, **settings))
    scripted = Scripted(app, answers)
    with on_socket(scripted) as url:
        yield url, scripted


def expected(photos: Path) -> dict[str, tuple[str, str]]:
    """Label and path by id; of equal bytes the first in order."""
    found: dict[str, tuple[str, str]] = {}
    dataset = read_dataset(photos)
    for i, name in enumerate(dataset.names):
        if name not in BAD:
            found.setdefault(hashlib.sha256(dataset.read(i)).hexdigest()[:32], (name.split("/")[0], name))
    assert len(found) == 80
    return found


def listed(url: str, gallery: str) -> dict[str, tuple[str, str]]:
    with Client(url) as client:
        return {i["id"]: (i["label"], i["metadata"]["path"]) for i in client.gallery_images(gallery=gallery)}


def command(*arguments: object) -> None:
    embed.main([str(argument) for argument in arguments])


def test_a_folder_becomes_a_gallery_and_the_second_time_nothing_is_sent(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with listening(tmp_path / "state", max_images=20) as (url, server):
        command("photos", "--gallery", "mine", "--server", url)
        printed = capsys.readouterr()
        assert printed.out == "gallery mine: 80 images are new, 1 were there\n"
        assert "3 of 84 images were left out: see mine.skipped.jsonl" in printed.err
        lines = [json.loads(line) for line in Path("mine.skipped.jsonl").read_text().splitlines()]
        assert {line["name"] for line in lines} == BAD
        assert "not an image" in next(line["reason"] for line in lines if line["name"] == "cat/0bad.png")
        assert listed(url, "mine") == expected(photos)
        sent, server.bytes = server.bytes, 0
        command("photos", "--gallery", "mine", "--server", url)
        assert capsys.readouterr().out == "gallery mine: 0 images are new, 81 were there\n"
        assert server.bytes < sent / 20  # those that are none
        with Client(url) as client:
            dataset, local = read_dataset(photos), LocalEmbedder(FakeEncoder())
            for i in (0, 40, 80):
                vector = next(local.embed_each([dataset.read(i)]))
                assert isinstance(vector, np.ndarray)
                best = client.neighbors(dataset.read(i), gallery="mine", k=1)[0]
                assert best.id == hashlib.sha256(dataset.read(i)).hexdigest()[:32]
                assert best.score == pytest.approx(1, abs=1e-6)


def test_what_is_in_the_way_costs_no_image(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Busy, away, too late, and answers that are lost behind the work."""
    monkeypatch.setattr(client_steps, "JITTER", 0)
    answers = [429, CUT, 503, 504, 429, CUT, 503, 503, CUT, 504]
    with listening(tmp_path / "state", answers) as (url, server):
        command("photos", "--gallery", "mine", "--server", url)
        assert server.answers == []
        assert listed(url, "mine") == expected(photos)
    with (
        listening(tmp_path / "state2", [503, 503]) as (url, _),
        Client(url, concurrency=1) as client,
        pytest.raises(NotReady),
    ):
        list(client.add_each([(b"", {})]))  # without patience for an outage, once more and no longer


@pytest.mark.parametrize("after", [1, 33, 70])
def test_a_stop_loses_nothing_and_sends_nothing_twice(after: int, photos: Path, tmp_path: Path) -> None:
    dataset = read_dataset(photos)

    class Stop(Exception):
        pass

    def stop(n: int) -> None:
        done.append(n)
        if len(done) == after:
            raise Stop

    done: list[int] = []
    with listening(tmp_path / "state") as (url, _), Client(url, batch=8) as client:
        target = ServerGallery(client, "mine", None)
        with pytest.raises(Stop):
            fill(dataset, target, Skipped(tmp_path / "s.jsonl"), stop)
        there = len(list(client.gallery_images(gallery="mine"))) if client.gallery()["galleries"] != ["default"] else 0
        rest = fill(dataset, target, Skipped(tmp_path / "s.jsonl"), done.append)
        assert rest == Filled(80 - there, 1 + there)
        assert listed(url, "mine") == expected(photos)
    assert len((tmp_path / "s.jsonl").read_text().splitlines()) == 3


def test_a_description_that_is_wrong_is_an_error_of_its_image(tmp_path: Path, encode: Callable[..., bytes]) -> None:
    """Alone in a request, and among others; there and here."""
    good, other = (encode(np.full((8, 8, 3), value, np.uint8)) for value in (1, 2))
    news = [(good, {"label": "a"}), (other, {"label": "x" * 300}), (b"a text", {})]
    with listening(tmp_path / "state") as (url, _), Client(url) as client:
        targets: list[Any] = [
            ServerGallery(client, "mine", None),
            OwnGallery(Galleries(tmp_path / "g").get("m", True), FakeEncoder()),
        ]
        for target in targets:
            for cut in (1, 3):
                results = [r for i in range(0, 3, cut) for r in target.add_each(iter(news[i : i + cut]))]
                assert results[0] == Added(hashlib.sha256(good).hexdigest()[:32], cut == 1)
                assert [isinstance(r, PatchsightError) for r in results] == [False, True, True]
                assert "label" in str(results[1])
                assert "not an image" in str(results[2])
        assert client.gallery(gallery="mine")["count"] == 1


def test_the_own_gallery_is_the_servers(
    photos: Path, tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same images and vectors, whoever fills it; and a server goes on with it."""
    here = ("photos", "--gallery", "mine", "--state-dir", tmp_path / "here", "--model-repository", tiny_bundle.parent)
    command(*here)
    assert capsys.readouterr().out == "gallery mine: 80 images are new, 1 were there\n"
    command(*here)
    assert capsys.readouterr().out == "gallery mine: 0 images are new, 81 were there\n"
    encoder = OrtEncoder(tiny_bundle, 1)
    with listening(tmp_path / "there", encoder=encoder) as (url, _):
        command("photos", "--gallery", "mine", "--server", url)
        assert listed(url, "mine") == expected(photos)
    with listening(tmp_path / "here", encoder=encoder) as (url, _):
        assert listed(url, "mine") == expected(photos)
        with pytest.raises(SystemExit):
            command(*here)
        assert "is open in another process; if that is a server, name it: --server URL" in capsys.readouterr().err
    ids, vectors, thumbnails = list(expected(photos)), [], []
    for state in ("here", "there"):
        galleries = Galleries(tmp_path / state / "galleries")
        gallery = galleries.get("mine")
        assert gallery.encoder == Identity(encoder.manifest.name, encoder.manifest.sha256)
        vectors.append(gallery.vectors(ids))
        thumbnails.append([gallery.thumbnail(id) for id in ids])
        galleries.close()
    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-6)
    assert thumbnails[0] == thumbnails[1]
    alone = next(LocalEmbedder(encoder).embed_each([(photos / expected(photos)[ids[5]][1]).read_bytes()]))
    assert isinstance(alone, np.ndarray)
    np.testing.assert_allclose(vectors[0][5], normalize(alone), atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["photos"], 2, "where to?"),
        (["photos", "--gallery", "mine", "--out", "e.parquet"], 2, "where to?"),
        (["photos", "--gallery", "mine", "--output", "cls"], 2, "hold the recommended embedding"),
        (["photos", "--gallery", "../mine", "--state-dir", "state"], 1, "names match"),
        (["photos/cat/0bad.png", "--gallery", "mine", "--state-dir", "state"], 1, "none of 1 images can be embedded"),
        (["photos", "--gallery", "mine", "--encoder", "other", "--state-dir", "state"], 1, "'other' is not in"),
    ],
)
def test_what_cannot_work_is_said(
    arguments: list[str], status: int, message: str, photos: Path, tiny_bundle: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert photos.is_dir()
    with pytest.raises(SystemExit) as exit:
        command(*arguments, "--model-repository", tiny_bundle.parent)
    assert exit.value.code == status
    assert message in capsys.readouterr().err
