"""`size=`: the same part of a picture with more or fewer patches, alone and beside requests of other sizes."""

import asyncio
import base64
import io
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from patchsight_serve.batcher import Batcher
from patchsight_serve.decode import decode
from patchsight_serve.fake_encoder import FakeEncoder
from patchsight_serve.manifest import Transform

RAW = {"Content-Type": "application/octet-stream"}


@pytest.fixture
def photo() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(3).integers(0, 256, (90, 70, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def embed(client: TestClient, photo: bytes, **query: Any) -> Any:
    return client.post("/embed", content=photo, headers=RAW, params=query)


def unpack(packed: dict[str, Any]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(packed["data"]), "<f4").reshape(packed["shape"])


def test_twice_the_size_has_twice_the_grid(serving: Callable[..., TestClient], photo: bytes) -> None:
    encoder = FakeEncoder(dynamic_size=True)
    client = serving(encoder)
    pixels = decode(photo, Transform(resize=64, crop=64))[None]
    (entry,) = embed(client, photo, size=64, outputs="attention,patch_tokens,cls", normalize=False).json()["results"]
    for output, name in (("attention", "attention"), ("patch_tokens", "patch_tokens")):
        np.testing.assert_array_equal(unpack(entry[output]), encoder.run(pixels, [name])[name][0])
    np.testing.assert_allclose(entry["cls"], encoder.run(pixels, ["cls_embedding"])["cls_embedding"][0], rtol=1e-6)
    assert unpack(entry["attention"]).shape == (2, 16, 16)
    for size, grid in ((None, 8), (32, 8), (64, 16), (4, 1)):
        query = {} if size is None else {"size": size}
        reply = client.post("/attention", content=photo, headers=RAW | {"Accept": "application/json"}, params=query)
        assert reply.json()["attention"]["shape"] == [grid, grid]
    picture = client.post("/attention", content=photo, headers=RAW | {"Accept": "image/png"}, params={"size": 64})
    assert Image.open(io.BytesIO(picture.content)).size == (448, 448)


def test_the_resize_grows_with_the_crop(serving: Callable[..., TestClient], photo: bytes) -> None:
    encoder = FakeEncoder(dynamic_size=True)
    encoder.manifest = encoder.manifest.model_copy(update={"transform": Transform(resize=37, crop=32)})
    (entry,) = embed(serving(encoder), photo, size=48, outputs="patch_tokens").json()["results"]
    pixels = decode(photo, Transform(resize=56, crop=48))[None]  # 37 · 48 / 32 = 55.5
    np.testing.assert_array_equal(
        unpack(entry["patch_tokens"]), encoder.run(pixels, ["patch_tokens"])["patch_tokens"][0]
    )


@pytest.mark.parametrize(
    ("fake", "size", "said"),
    [
        ({}, 64, "size is 64; encoder 'fake' takes 32 alone"),
        ({"dynamic_size": True}, 30, "size is 30; encoder 'fake' takes multiples of 4"),
        ({"dynamic_size": True}, 0, "size is 0; encoder 'fake' takes multiples of 4"),
        ({"dynamic_size": True}, -4, "size is -4; encoder 'fake' takes multiples of 4"),
        ({"dynamic_size": True, "patch_size": None}, 31, "size is 31; encoder 'fake' takes 32 and more"),
        (
            {"dynamic_size": True}, 84,
            "size is 84, which makes 441 patches of 4 pixels; the limit is 400, a size of 80",
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("route", ["/embed", "/attention"])
def test_what_cannot_be_had_names_value_and_limit(
    serving: Callable[..., TestClient], photo: bytes, fake: dict[str, Any], size: int, said: str, route: str
) -> None:
    if route == "/attention" and "patch_size" in fake:
        route = "/embed"
    client = serving(FakeEncoder(**fake), max_patches=400)
    reply = client.post(route, content=photo, headers=RAW, params={"size": size})
    assert reply.status_code == 400
    assert reply.json()["error"] == {"code": "invalid_request", "message": said, "param": "size"}


def test_the_own_size_can_be_asked_of_every_encoder(serving: Callable[..., TestClient], photo: bytes) -> None:
    client = serving(max_patches=1)
    assert embed(client, photo, size=32).json() == embed(client, photo).json()


class Slow(FakeEncoder):
    """Waits for a gate, and keeps the shapes it was given."""

    def __init__(self) -> None:
        super().__init__(dynamic_size=True)
        self.gate, self.busy = threading.Event(), threading.Event()
        self.shapes: list[tuple[int, int]] = []

    def run(self, images: np.ndarray, outputs: Sequence[str]) -> dict[str, np.ndarray]:
        self.busy.set()
        assert self.gate.wait(60)
        self.shapes.append((len(images), images.shape[1]))
        return super().run(images, outputs)


def test_a_batch_is_of_one_size_and_the_order_within_it_stays() -> None:
    encoder = Slow()
    sides = [16, 32, 64, 32, 32, 64, 16, 64, 64, 64, 32]
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (side, side, 3), dtype=np.uint8) for side in sides]

    async def requests() -> list[Any]:
        async with Batcher(encoder, max_batch=16) as batcher:
            waiting = []
            for image in images:
                waiting.append(asyncio.create_task(batcher.run([image], ["mean_embedding"])))
                await asyncio.sleep(0)
                await asyncio.to_thread(encoder.busy.wait, 60)  # the first is in the encoder, all others queue behind
            await asyncio.sleep(0.05)
            encoder.gate.set()
            return await asyncio.gather(*waiting)

    results = asyncio.run(requests())
    # Pictures four times as large go four at a time, where 16 may go; the fifth comes after those that were before it.
    assert encoder.shapes == [(1, 16), (4, 32), (4, 64), (1, 16), (1, 64)]
    for image, ((result,), _) in zip(images, results, strict=True):
        alone = FakeEncoder().run(image[None], ["mean_embedding"])["mean_embedding"][0]
        np.testing.assert_array_equal(result["mean_embedding"], alone)


def test_mixed_sizes_at_once_give_the_numbers_of_each_alone(serving: Callable[..., TestClient], photo: bytes) -> None:
    client = serving(FakeEncoder(dynamic_size=True))
    sizes = [32, 64, 16, 48, 64, 32, 16, 48] * 3
    alone = {size: embed(client, photo, size=size).json() for size in set(sizes)}
    found: dict[int, Any] = {}

    def ask(i: int) -> None:
        found[i] = embed(client, photo, size=sizes[i]).json()

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(sizes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(len(sizes))] == [alone[size] for size in sizes]
    assert len({str(reply) for reply in alone.values()}) == 4
