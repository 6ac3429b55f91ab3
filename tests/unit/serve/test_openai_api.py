"""`/v1` as OpenAI's own client sees it, with `/embed` as the oracle."""

import base64
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import openai
import pytest
from starlette.testclient import TestClient

from patchsight_serve.fake_encoder import FakeEncoder
from patchsight_serve.openai_api import EmbeddingList, ModelList


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def bits(numbers: Any) -> bytes:
    return np.array(numbers, np.float32).tobytes()


def official(client: TestClient, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{client.base_url}/v1", api_key=key, max_retries=0, http_client=client)


def by_embed(client: TestClient, images: list[bytes], encoder: str = "fake") -> list[list[float]]:
    reply = client.post(f"/embed?encoder={encoder}", json={"images": [b64(image) for image in images]})
    return [result["embedding"] for result in reply.json()["results"]]


@pytest.fixture
def pictures(odd_images: dict[str, bytes], png: bytes) -> list[bytes]:
    return [png, *odd_images.values()]


@pytest.mark.parametrize("form", [{}, {"encoding_format": "float"}, {"encoding_format": "base64"}])
def test_the_official_client_gets_what_embed_gives_bit_for_bit(
    form: dict[str, Any], client: TestClient, pictures: list[bytes]
) -> None:
    expected = by_embed(client, pictures)
    reply = official(client).embeddings.create(input=[b64(p) for p in pictures], model="fake", **form)
    got = [row.embedding for row in reply.data]
    if form.get("encoding_format") == "base64":  # asked for by name, it is left as it came
        got = [np.frombuffer(base64.b64decode(text), "<f4").tolist() for text in got]  # type: ignore[arg-type]
    assert bits(got) == bits(expected)
    assert [row.index for row in reply.data] == list(range(len(pictures)))
    assert (reply.object, reply.model) == ("list", "fake")
    assert reply.usage.prompt_tokens == reply.usage.total_tokens == len(pictures)
    np.testing.assert_allclose(np.linalg.norm(np.array(got), axis=1), 1, rtol=1e-6)


def test_one_string_may_be_a_data_uri(client: TestClient, png: bytes) -> None:
    for text in (b64(png), f"data:image/png;base64,{b64(png)}"):
        reply = official(client).embeddings.create(input=text, model="fake", user="somebody", dimensions=16)
        assert bits(reply.data[0].embedding) == bits(by_embed(client, [png])[0])


def test_the_encoder_is_the_one_asked_for(serving: Callable[..., TestClient], png: bytes) -> None:
    client = serving(FakeEncoder(), FakeEncoder("other", embedding_dim=24, both=True))
    reply = official(client).embeddings.create(input=b64(png), model="other", dimensions=48)
    assert bits(reply.data[0].embedding) == bits(by_embed(client, [png], "other")[0])
    assert [m.id for m in official(client).models.list()] == ["fake", "other"]
    assert official(client).models.retrieve("other").id == "other"
    with pytest.raises(openai.NotFoundError, match="no encoder 'dino' is loaded; there are fake, other") as error:
        official(client).models.retrieve("dino")
    assert error.value.param == "model"


PNG_1 = "<png>"


@pytest.mark.parametrize(
    ("body", "status", "code", "param", "says"),
    [
        ({"model": "fake"}, 400, "invalid_request", "input", "list of at least one"),
        ({"model": "fake", "input": []}, 400, "invalid_request", "input", "at least one"),
        ({"model": "fake", "input": {}}, 400, "invalid_request", "input", "at least one"),
        ({"model": "fake", "input": "a red dress"}, 400, "invalid_request", "input", "not base64"),
        ({"model": "fake", "input": "a red dress"}, 400, "invalid_request", "input", "no text or tokens"),
        ({"model": "fake", "input": "word"}, 415, "unsupported_image", "input", "not an image format"),
        ({"model": "fake", "input": [PNG_1, [1, 2]]}, 400, "invalid_request", "input[1]", "not list"),
        ({"model": "fake", "input": [PNG_1, 7]}, 400, "invalid_request", "input[1]", "not int"),
        ({"model": "fake", "input": [PNG_1, "http://x/a.png"]}, 400, "invalid_request", "input[1]", "never fetched"),
        ({"model": "fake", "input": [PNG_1] * 5}, 413, "too_large", "input", "5 images, the limit is 4"),
        ({"model": "text-embedding-3-small", "input": PNG_1}, 404, "not_found", "model", "there are fake"),
        ({"input": PNG_1}, 400, "invalid_request", "model", "there are fake"),
        ({"model": 3, "input": PNG_1}, 400, "invalid_request", "model", "name of an encoder"),
        ({"model": "fake", "input": PNG_1, "dimensions": 8}, 400, "invalid_request", "dimensions", "is 8; .* have 16"),
        ({"model": "fake", "input": PNG_1, "dimensions": True}, 400, "invalid_request", "dimensions", "is True"),
        ({"model": "fake", "input": PNG_1, "encoding_format": "i8"}, 400, "invalid_request", "encoding_format", "i8"),
        ({"model": "fake", "input": PNG_1, "encoding_format": {}}, 400, "invalid_request", "encoding_format", "is {}"),
        ({"model": "fake", "input": PNG_1, "stream": True}, 400, "invalid_request", "stream", "unknown key 'stream'"),
        ({"model": "fake", "input": PNG_1, "user": None, "dimensions": None, "encoding_format": None}, 200, "", "", ""),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(
    body: dict[str, Any], status: int, code: str, param: str, says: str, serving: Callable[..., TestClient], png: bytes
) -> None:
    client = serving(max_images=4)
    given = body.get("input")
    if isinstance(given, list):
        body = body | {"input": [b64(png) if each == PNG_1 else each for each in given]}
    elif given == PNG_1:
        body = body | {"input": b64(png)}
    reply = client.post("/v1/embeddings", json=body)
    assert reply.status_code == status, reply.text
    if status != 200:
        error = reply.json()["error"]
        assert (error["code"], error["param"]) == (code, param)
        assert re.search(says, error["message"]), error


def test_one_image_that_fails_is_named_and_fails_them_all(
    client: TestClient, png: bytes, bad_images: dict[str, tuple[bytes, int, str]]
) -> None:
    for data, status, code in bad_images.values():
        with pytest.raises(openai.APIStatusError) as error:
            official(client).embeddings.create(input=[b64(png)] * 3 + [b64(data)], model="fake")
        assert (error.value.status_code, error.value.code, error.value.param) == (status, code, "input[3]")
    damaged, _, _ = bad_images["truncated"]
    body = {"model": "fake", "input": [b64(png), b64(damaged), "no base64!"]}
    assert client.post("/v1/embeddings", json=body).json()["error"]["param"] == "input[1]"


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"null", b'{"model": "fake", "input": NaN}'])
def test_a_body_that_is_no_json_object(client: TestClient, content: bytes) -> None:
    for headers in ({"Content-Type": "application/json"}, {}):
        assert client.post("/v1/embeddings", content=content, headers=headers).status_code == 400
    assert client.post("/v1/embeddings", files={"input": content}).status_code == 415


def test_the_key_is_the_servers(serving: Callable[..., TestClient], png: bytes) -> None:
    client = serving(api_keys="right")
    with pytest.raises(openai.AuthenticationError):
        official(client, "wrong").embeddings.create(input=b64(png), model="fake")
    assert len(official(client, "right").embeddings.create(input=b64(png), model="fake").data) == 1


def test_openapi_describes_it(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    post = paths["/v1/embeddings"]["post"]
    assert {"200", "400", "404", "413", "415", "422", "429", "503", "504"} <= set(post["responses"])
    body = post["requestBody"]["content"]["application/json"]
    assert set(body["schema"]["properties"]) == {"input", "model", "encoding_format", "dimensions", "user"}
    assert {"/v1/models", "/v1/models/{model}"} <= set(paths)
    example = body["example"] | {"model": "fake"}
    for form in ("float", "base64"):
        reply = client.post("/v1/embeddings", json=example | {"encoding_format": form})
        EmbeddingList.model_validate(reply.json(), strict=True)
        assert reply.headers["X-Encoder-Sha256"] == FakeEncoder().manifest.sha256
    ModelList.model_validate(client.get("/v1/models").json(), strict=True)
