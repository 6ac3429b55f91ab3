"""What the routes build on: names of outputs, unit length, and images that fail without harm to the others."""

import asyncio
from collections.abc import Callable

import numpy as np
import pytest
from starlette.testclient import TestClient

from patchsight_serve.errors import InvalidRequest, NotFound, PatchsightError
from patchsight_serve.fake_encoder import FakeEncoder
from patchsight_serve.outputs import graph_name, to_unit_length
from patchsight_serve.service import Service
from patchsight_serve.timing import Timing


@pytest.mark.parametrize(("recommended", "name"), [("cls", "cls_embedding"), ("mean", "mean_embedding")])
def test_the_embedding_is_the_recommended_one(recommended: str, name: str) -> None:
    manifest = FakeEncoder().manifest.model_copy(update={"recommended": recommended})
    assert graph_name("embedding", manifest) == name
    assert graph_name("cls", manifest) == "cls_embedding"
    with pytest.raises(InvalidRequest, match="has no output 'both'; it has embedding, cls, mean"):
        graph_name("both", manifest)
    with pytest.raises(InvalidRequest, match="unknown output 'cls_embedding'"):
        graph_name("cls_embedding", manifest)


def test_both_embeddings_side_by_side_where_the_encoder_has_that() -> None:
    encoder = FakeEncoder(both=True)
    assert graph_name("embedding", encoder.manifest) == graph_name("both", encoder.manifest) == "both_embedding"
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    values = encoder.run(images, list(encoder.manifest.outputs))
    assert {name: v.shape[1:] for name, v in values.items()} == encoder.manifest.outputs
    assert values["both_embedding"].shape == (2, 2 * encoder.manifest.embedding_dim)


def test_unit_length() -> None:
    vectors = np.array([[3, 4], [0, 0], [-2, 0]], np.float32)
    np.testing.assert_allclose(to_unit_length(vectors), [[0.6, 0.8], [0, 0], [-1, 0]], rtol=1e-6)
    np.testing.assert_allclose(to_unit_length(vectors[0]), [0.6, 0.8], rtol=1e-6)
    assert to_unit_length(vectors).dtype == np.float32


def call(client: TestClient, work: Callable[[Service], object]) -> object:
    """Run a coroutine of the service where its queue lives, on the application's event loop."""
    assert client.portal is not None
    return client.portal.call(work, client.app.state.service)  # type: ignore[attr-defined]


def test_results_errors_and_times_of_a_mixed_request(client: TestClient, png: bytes) -> None:
    timing = Timing()
    broken = InvalidRequest("not base64")

    async def embed(service: Service) -> list[object]:
        return list(await service.embed_images([png, broken, b"junk", png], None, ["mean", "attention"], timing))

    first, second, third, last = call(client, embed)  # type: ignore[misc]
    assert second is broken
    assert isinstance(third, PatchsightError)
    assert third.status == 415
    assert {name: value.shape for name, value in first.items()} == {"mean": (16,), "attention": (2, 8, 8)}
    np.testing.assert_array_equal(first["mean"], last["mean"])
    assert min(timing.decode, timing.queue, timing.infer) > 0


def test_a_reader_s_bug_is_one_image_s_error(
    client: TestClient, png: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from patchsight_serve import service as module

    decode = module.decode

    def buggy(data: bytes, *rest: object) -> object:
        if data == b"bug":
            raise AssertionError("impossible")
        return decode(data, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "decode", buggy)

    async def embed(service: Service) -> list[object]:
        return list(await service.embed_images([b"bug", png]))

    bad, good = call(client, embed)  # type: ignore[misc]
    assert (bad.status, bad.message) == (500, "the image could not be read")
    assert "embedding" in good
    assert "impossible" in caplog.text


def test_an_unknown_encoder_is_refused_before_anything_is_decoded(client: TestClient) -> None:
    async def embed(service: Service) -> None:
        await service.embed_images([b""], "missing")

    with pytest.raises(NotFound, match="no encoder 'missing'"):
        call(client, embed)


def test_many_requests_at_once_get_their_own_results(client: TestClient, encode: Callable[..., bytes]) -> None:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (32, 32, 3), np.uint8) for _ in range(40)]
    blobs = [encode(image) for image in images]

    async def embed(service: Service) -> list[object]:
        return list(await asyncio.gather(*(service.embed_images([blob, blob]) for blob in blobs)))

    expected = FakeEncoder().run(np.stack(images), ["cls_embedding"])["cls_embedding"]
    for answer, value in zip(call(client, embed), expected, strict=True):  # type: ignore[call-overload]
        for result in answer:
            np.testing.assert_array_equal(result["embedding"], value)
