"""What clients ask, of a server that runs its encoders itself and of one whose encoders are on a real Triton: the same
requests, the same answers."""

import base64
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from patchsight_serve.client import Client

ENCODER = "simclr-vit-tiny-cifar10-long"
WAYS = ("in process", "on Triton")


@pytest.fixture(scope="module")
def urls(shared_serve: Callable[..., str], repository: Path, triton: Any) -> dict[str, str]:
    """Both servers, on ONNX Runtime. The gallery of one must not be the other's."""
    common = ("--no-sample-gallery", "--encoder", ENCODER, "--max-images", "96")
    return {
        "in process": shared_serve(
            "--model-repository", repository, "--state-dir", "here", "--engine", "onnxruntime", *common
        ),
        "on Triton": shared_serve("--triton", triton.address, "--state-dir", "there", *common),
    }


@pytest.fixture(scope="module", params=WAYS)
def url(request: pytest.FixtureRequest, urls: Mapping[str, str]) -> str:
    return urls[request.param]


def post(url: str, path: str, **how: Any) -> httpx.Response:
    return httpx.post(url + path, timeout=60, **how)


def parts(photos: list[bytes]) -> list[tuple[str, tuple[str, bytes]]]:
    return [("images", (f"{i}.png", photo)) for i, photo in enumerate(photos)]


def test_it_is_ready_and_says_what_it_serves(url: str) -> None:
    assert httpx.get(f"{url}/readyz").json() == {"status": "ready"}
    listed = httpx.get(f"{url}/encoders").json()["encoders"]
    assert [entry["name"] for entry in listed] == ["dino-vit-cifar10", ENCODER]
    assert [entry["default"] for entry in listed] == [False, True]


def test_one_image_in_every_format(url: str, photos: list[bytes]) -> None:
    as_json = post(url, "/embed", content=photos[0]).json()["results"][0]["embedding"]
    reply = post(url, "/embed", content=photos[0], headers={"Accept": "application/x-npy"})
    assert np.array_equal(np.load(io.BytesIO(reply.content))[0], np.array(as_json, np.float32))
    assert np.isclose(np.linalg.norm(as_json), 1)
    assert "infer;dur=" in reply.headers["Server-Timing"]


def test_more_images_than_a_batch_keep_their_order(url: str, photos: list[bytes]) -> None:
    """96 at once, of which Triton takes 64 in a call; every third one alone is the same."""
    with Client(url, batch=96) as together, Client(url, batch=1) as alone:
        vectors = np.stack(list(together.embed_each(photos)))
        singles = np.stack(list(alone.embed_each(photos[::3])))
    assert np.abs(vectors[::3] - singles).max() <= 1e-5 * np.abs(singles).max()  # whitening lets rounding grow
    assert len({vector.tobytes() for vector in vectors}) == len(photos)


def test_bad_images_harm_no_good_one(url: str, photos: list[bytes]) -> None:
    mixed = [photos[0], b"no image", photos[1][: len(photos[1]) // 2], photos[2]]
    reply = post(url, "/embed", files=parts(mixed))
    assert reply.status_code == 200
    found = [entry.get("error", {}).get("code") for entry in reply.json()["results"]]
    assert found == [None, "unsupported_image", "damaged_image", None]


def test_attention_is_one(url: str, photos: list[bytes]) -> None:
    picture = post(url, "/attention", content=photos[0])
    assert Image.open(io.BytesIO(picture.content)).format == "PNG"
    sent = post(url, "/embed", params={"outputs": "attention,patch_tokens"}, content=photos[0]).json()["results"][0]
    attention = np.frombuffer(base64.b64decode(sent["attention"]["data"]), "<f4").reshape(sent["attention"]["shape"])
    assert (attention >= 0).all()
    assert (attention.sum(axis=(1, 2)) < 1).all()
    assert sent["patch_tokens"]["shape"] == [8, 8, 192]


def test_a_gallery_finds_what_it_holds(url: str, photos: list[bytes]) -> None:
    items = json.dumps([{"id": f"photo-{i}", "label": "ab"[i % 2]} for i in range(20)])
    added = post(url, "/gallery/images", params={"gallery": "g"}, files=parts(photos[:20]), data={"items": items})
    assert all("error" not in result for result in added.json()["results"]), added.text
    found = post(url, "/neighbors", params={"gallery": "g", "k": 5, "vote": "true"}, content=photos[3]).json()
    assert found["neighbors"][0]["id"] == "photo-3"
    assert found["neighbors"][0]["score"] == pytest.approx(1, abs=1e-5)


def test_what_the_encoder_lacks_is_named(url: str, photos: list[bytes]) -> None:
    reply = post(url, "/embed", params={"encoder": "dino-vit-cifar10", "outputs": "both"}, content=photos[0])
    assert reply.status_code in (200, 400)  # by its manifest, the same on both: compared below
    assert post(url, "/embed", params={"encoder": "../tiny"}, content=photos[0]).status_code == 404


QUESTIONS: dict[str, Callable[[str, list[bytes]], Any]] = {
    "encoders": lambda url, _: [
        {k: v for k, v in entry["manifest"].items() if k != "measured"}
        for entry in httpx.get(f"{url}/encoders").json()["encoders"]
    ],
    "embedding": lambda url, photos: post(url, "/embed", content=photos[0]).json(),
    "all outputs": lambda url, photos: post(
        url, "/embed", params={"outputs": "embedding,cls,mean,both,attention,patch_tokens"}, files=parts(photos[:8])
    ).json(),
    "not normalized": lambda url, photos: post(
        url, "/embed", params={"normalize": "false", "encoder": "dino-vit-cifar10"}, content=photos[1]
    ).json(),
    "attention": lambda url, photos: post(url, "/attention", params={"head": 1}, content=photos[2]).content,
    "OpenAI's": lambda url, photos: post(
        url, "/v1/embeddings", json={"model": ENCODER, "input": [base64.b64encode(photos[4]).decode()]}
    ).json(),
    "an error": lambda url, photos: post(url, "/embed", params={"outputs": "nose"}, content=photos[0]).json(),
    "a lack": lambda url, photos: post(
        url, "/embed", params={"encoder": "dino-vit-cifar10", "outputs": "both"}, content=photos[0]
    ).json(),
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_answers_are_equal(question: str, urls: Mapping[str, str], photos: list[bytes]) -> None:
    here, there = (QUESTIONS[question](urls[way], photos) for way in WAYS)
    assert here == there
