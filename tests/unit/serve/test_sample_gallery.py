"""The sample gallery: there at once on a new server, and never again once its owner has other plans."""

import asyncio
import logging
import time
from collections import Counter

import numpy as np
import pytest
from starlette.testclient import TestClient

from patchsight_serve import sample_gallery
from patchsight_serve.dataset import read_dataset
from patchsight_serve.decode import open_rgb
from patchsight_serve.errors import Overloaded
from patchsight_serve.fake_encoder import FakeEncoder
from patchsight_serve.item import Identity, Item, NewImage
from patchsight_serve.sample_gallery import SAMPLES


def filled(client: TestClient, count: int = 200) -> dict:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        info = client.get("/gallery").json()
        if info["count"] >= count:
            return info
        time.sleep(0.02)
    raise AssertionError(f"still {info}")


def test_the_shipped_photos_are_200_of_10_classes_and_say_their_license() -> None:
    samples = read_dataset(SAMPLES)
    assert samples.labels is not None
    assert samples.class_names is not None
    assert Counter(samples.labels.tolist()) == dict.fromkeys(range(10), 20)
    for i in range(len(samples)):
        assert min(open_rgb(samples.read(i)).size) == 160
    assert "CC0" in (SAMPLES.parent / "NOTICE").read_text()
    assert SAMPLES.stat().st_size < 2_500_000


def test_they_are_the_first_of_each_class_in_the_labelled_data(data) -> None:
    train = read_dataset(data / "clothing10" / "train.parquet")
    samples = read_dataset(SAMPLES)
    assert samples.class_names == train.class_names
    rows = {name: i for i, name in enumerate(train.names)}
    for i, name in enumerate(samples.names):
        assert samples.read(i) == train.read(rows[name])
        assert samples.labels[i] == train.labels[rows[name]]
    skipped = [n for n in train.names[: max(rows[n] for n in samples.names)] if n not in set(samples.names)]
    counts = Counter(int(train.labels[rows[n]]) for n in samples.names)
    assert all(counts[int(train.labels[rows[n]])] == 20 for n in skipped)


def test_a_new_server_has_them_and_what_is_deleted_stays_deleted(serving, tmp_path, caplog) -> None:
    caplog.set_level(logging.INFO)
    client = serving(state_dir=tmp_path, sample_gallery=True)
    assert client.get("/readyz").status_code == 200
    assert filled(client)["encoder"]["name"] == "fake"
    assert "indexing 200 sample photos (clothing10, CC0 1.0)" in caplog.text
    image = client.get("/gallery/images/t-shirt-07").json()
    assert image["label"] == "t-shirt"
    assert image["metadata"]["source"] == "clothing10, CC0 1.0"
    neighbors = client.get("/neighbors", params={"id": "t-shirt-07", "k": 5}).json()["neighbors"]
    assert len(neighbors) == 5
    assert client.delete("/gallery/images/t-shirt-07").status_code == 204
    client.__exit__(None, None, None)

    caplog.clear()
    again = serving(state_dir=tmp_path, sample_gallery=True)
    assert run_to_the_end(again) == 199
    assert "sample photos" not in caplog.text
    for page in [again.get("/gallery/images", params={"limit": 1000}).json()]:
        for image in page["images"]:
            again.delete(f"/gallery/images/{image['id']}")
    assert run_to_the_end(again) == 0


def run_to_the_end(client: TestClient) -> int:
    """Run what the start runs once more, wait for it, and count."""
    state = client.app.state
    client.portal.call(sample_gallery.index_samples, state.service, state.galleries)
    return len(state.galleries.get("default"))


def test_a_gallery_with_images_of_its_own_is_left_alone(serving, picture, encode) -> None:
    client = serving()
    client.post("/gallery/images", content=encode(picture), headers={"Content-Type": "image/png"})
    assert run_to_the_end(client) == 1
    ids = [image["id"] for image in client.get("/gallery/images").json()["images"]]
    client.delete(f"/gallery/images/{ids[0]}")
    assert run_to_the_end(client) == 0


def test_it_goes_on_where_it_was_stopped(serving, tmp_path, monkeypatch) -> None:
    """A stop in the middle, and a deletion before the next start: the rest comes, the deleted one does not."""
    client = serving(state_dir=tmp_path)
    whole = sample_gallery.index_images
    calls = 0

    async def stopping(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 4:
            raise asyncio.CancelledError
        return await whole(*args, **kwargs)

    monkeypatch.setattr(sample_gallery, "index_images", stopping)
    with pytest.raises(BaseException):  # noqa: B017, PT011 - which cancellation it is depends on the portal
        run_to_the_end(client)
    assert client.get("/gallery").json()["count"] == 24
    first = client.get("/gallery/images").json()["images"][0]["id"]
    client.delete(f"/gallery/images/{first}")
    monkeypatch.setattr(sample_gallery, "index_images", whole)
    client.__exit__(None, None, None)
    again = serving(state_dir=tmp_path)
    assert run_to_the_end(again) == 199
    assert again.get(f"/gallery/images/{first}").status_code == 404


def test_a_busy_server_is_waited_for(serving, monkeypatch) -> None:
    client = serving()
    whole, refused = sample_gallery.index_images, []

    async def busy_at_first(*args, **kwargs):
        if not refused:
            refused.append(True)
            raise Overloaded("the queue is full")
        return await whole(*args, **kwargs)

    real = asyncio.sleep
    monkeypatch.setattr(sample_gallery, "index_images", busy_at_first)
    monkeypatch.setattr(sample_gallery.asyncio, "sleep", lambda _: real(0))
    assert run_to_the_end(client) == 200


def test_an_interrupted_gallery_of_another_encoder_is_left_alone(serving, tmp_path, caplog) -> None:
    first = serving(FakeEncoder("old"), state_dir=tmp_path)
    gallery = first.app.state.galleries.get("default")
    manifest = first.app.state.service.encoder("old").manifest
    item = NewImage(Item("dress-01"), b"data", b"thumbnail", np.eye(16, dtype=np.float32)[0])
    gallery.add([item], Identity(manifest.name, manifest.sha256), facts={"samples": "1"})
    first.__exit__(None, None, None)
    second = serving(FakeEncoder("new"), state_dir=tmp_path)
    caplog.set_level(logging.WARNING)
    assert run_to_the_end(second) == 1
    assert "the sample photos were not indexed: the gallery needs encoder 'old'" in caplog.text
