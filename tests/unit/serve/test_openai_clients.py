"""Programs that speak OpenAI's protocol against a real server on a real socket: the `openai` package, with and without
asyncio, and LangChain by way of it. `/embed` is the oracle."""

import asyncio
import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from langchain_openai import OpenAIEmbeddings
from on_socket import on_socket

from patchsight_serve.app import create_app
from patchsight_serve.fake_encoder import FakeEncoder
from patchsight_serve.settings import ServeSettings

KEY = "right"


class OftenBusy:
    """An application that answers every other request to /v1/embeddings with 429 while `busy`."""

    def __init__(self, app: Any) -> None:
        self.app, self.busy, self.asked = app, False, 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if self.busy and scope["type"] == "http" and scope["path"] == "/v1/embeddings":
            self.asked += 1
            if self.asked % 2:
                headers = [(b"retry-after", b"0"), (b"content-type", b"application/json")]
                body = b'{"error": {"code": "overloaded", "message": "256 images are in work", "param": null}}'
                await send({"type": "http.response.start", "status": 429, "headers": headers})
                return await send({"type": "http.response.body", "body": body})
        return await self.app(scope, receive, send)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, OftenBusy]]:
    encoders = {name: FakeEncoder(name, embedding_dim=dim) for name, dim in (("alpha", 16), ("beta", 24))}
    settings = ServeSettings(sample_gallery=False, state_dir=tmp_path, api_keys=KEY, max_images=4)
    app = OftenBusy(create_app(encoders, settings))
    with on_socket(app, "critical") as url:
        yield url, app


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def data_uri(data: bytes) -> str:
    return f"data:image/png;base64,{b64(data)}"


@pytest.fixture
def pictures(png: bytes, odd_images: dict[str, bytes]) -> list[bytes]:
    return [png, odd_images["gray 16"], odd_images["1 x 1"]]


def by_embed(url: str, pictures: list[bytes], encoder: str) -> np.ndarray:
    reply = httpx.post(
        f"{url}/embed", params={"encoder": encoder}, headers={"Authorization": f"Bearer {KEY}"},
        json={"images": [b64(picture) for picture in pictures]},
    )  # fmt: skip
    return np.array([result["embedding"] for result in reply.json()["results"]], np.float32)


def same(got: list[list[float]], expected: np.ndarray) -> None:
    assert np.array(got, np.float32).tobytes() == expected.tobytes()


@pytest.mark.parametrize("form", [{}, {"encoding_format": "float"}], ids=["base64, unpacked by it", "float"])
def test_openai_with_and_without_asyncio(
    form: dict[str, Any], server: tuple[str, OftenBusy], pictures: list[bytes]
) -> None:
    url, _ = server
    asked = {"input": [data_uri(picture) for picture in pictures], "model": "beta", **form}
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY) as client:
        same([row.embedding for row in client.embeddings.create(**asked).data], by_embed(url, pictures, "beta"))
        assert [model.id for model in client.models.list()] == ["alpha", "beta"]

    async def in_loop() -> None:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY) as client:
            reply = await client.embeddings.create(**asked)
            same([row.embedding for row in reply.data], by_embed(url, pictures, "beta"))
            assert [model.id async for model in client.models.list()] == ["alpha", "beta"]

    asyncio.run(in_loop())


def test_errors_are_those_that_openai_names(
    server: tuple[str, OftenBusy], png: bytes, bad_images: dict[str, tuple[bytes, int, str]]
) -> None:
    url, app = server
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
        damaged, _, _ = bad_images["truncated"]
        for changed, kind, code, param in [
            ({"input": [data_uri(png), b64(damaged)]}, openai.UnprocessableEntityError, "damaged_image", "input[1]"),
            ({"input": "a red dress"}, openai.BadRequestError, "invalid_request", "input"),
            ({"input": ["word"] * 5}, openai.APIStatusError, "too_large", "input"),
            ({"model": "text-embedding-3-small"}, openai.NotFoundError, "not_found", "model"),
        ]:
            with pytest.raises(kind) as caught:
                client.embeddings.create(**{"input": data_uri(png), "model": "alpha", **changed})
            assert (caught.value.code, caught.value.param) == (code, param)
            assert caught.value.body["message"] in str(caught.value)
        app.busy = True
        with pytest.raises(openai.RateLimitError) as busy:
            client.embeddings.create(input=data_uri(png), model="alpha")
        assert busy.value.code == "overloaded"
        app.asked = 0
        patient = client.with_options(max_retries=1)
        assert len(patient.embeddings.create(input=data_uri(png), model="alpha").data) == 1
        assert app.asked == 2  # a busy server is asked again
    with (
        openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError) as unknown,
    ):
        stranger.models.list()
    assert unknown.value.code == "unauthorized"


def test_langchain_embeds_data_uris_in_place_of_text(server: tuple[str, OftenBusy], pictures: list[bytes]) -> None:
    url, _ = server
    uris = [data_uri(picture) for picture in pictures]
    expected = by_embed(url, pictures, "alpha")

    async def asked(way: httpx.AsyncClient, embeddings: OpenAIEmbeddings) -> None:
        async with way:
            same(await embeddings.aembed_documents(uris), expected)
            same([await embeddings.aembed_query(uris[2])], expected[2:])

    in_loop = httpx.AsyncClient()
    with httpx.Client() as here:  # only for the test: LangChain never closes its own
        embeddings = OpenAIEmbeddings(
            base_url=f"{url}/v1", api_key=KEY, model="alpha", check_embedding_ctx_length=False, chunk_size=2,
            http_client=here, http_async_client=in_loop,
        )  # fmt: skip
        same(embeddings.embed_documents(uris), expected)
        same([embeddings.embed_query(uris[1])], expected[1:2])
        asyncio.run(asked(in_loop, embeddings))
