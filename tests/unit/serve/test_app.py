"""Errors of the framework itself, and the OpenAPI description."""

from collections.abc import Callable

import pytest
from starlette.testclient import TestClient

from patchsight_serve.app import create_app
from patchsight_serve.errors import BundleError
from patchsight_serve.fake_encoder import FakeEncoder
from patchsight_serve.settings import ServeSettings


@pytest.mark.parametrize(
    ("method", "path", "status", "code", "param"),
    [
        ("GET", "/nowhere", 404, "not_found", None),
        ("GET", "/embed", 405, "method_not_allowed", None),
        ("DELETE", "/encoders", 405, "method_not_allowed", None),
        ("POST", "/embed?normalize=maybe", 400, "invalid_request", "normalize"),
        ("POST", "/attention?mass=much", 400, "invalid_request", "mass"),
    ],
)
def test_every_error_has_one_shape(
    method: str, path: str, status: int, code: str, param: str | None, client: TestClient
) -> None:
    reply = client.request(method, path)
    error = reply.json()["error"]
    assert list(reply.json()) == ["error"]
    assert list(error) == ["code", "message", "param"]
    assert (reply.status_code, error["code"], error["param"]) == (status, code, param)


def test_405_names_the_methods(client: TestClient) -> None:
    assert client.get("/embed").headers["allow"] == "POST"


def test_a_default_encoder_that_is_not_there_is_said_at_the_start() -> None:
    with pytest.raises(BundleError, match="--encoder 'dino' is not among the loaded: fake"):
        create_app({"fake": FakeEncoder()}, ServeSettings(encoder="dino"))


def test_openapi_describes_bodies_and_replies(client: TestClient) -> None:
    schema = client.get("/openapi.json").json()
    for path in ("/embed", "/attention"):
        post = schema["paths"][path]["post"]
        bodies = ["multipart/form-data", "image/*", "application/octet-stream", "application/json"]
        assert list(post["requestBody"]["content"]) == bodies
        assert {"400", "404", "413", "415", "422", "429", "503", "504"} <= set(post["responses"])
    replies = schema["paths"]["/embed"]["post"]["responses"]["200"]["content"]
    assert set(replies) == {"application/json", "application/x-npy", "application/x-npz", "application/octet-stream"}
    assert "image/png" in schema["paths"]["/attention"]["post"]["responses"]["200"]["content"]
    assert "HTTPValidationError" not in schema["components"]["schemas"]
    assert schema["components"]["securitySchemes"] == {"key": {"type": "http", "scheme": "bearer"}}


def test_the_example_of_the_description_works(client: TestClient) -> None:
    content = client.get("/openapi.json").json()["paths"]["/embed"]["post"]["requestBody"]["content"]
    reply = client.post("/embed", json=content["application/json"]["example"])
    assert reply.status_code == 200, reply.text


def test_replies_are_as_described(client: TestClient, png: bytes) -> None:
    from patchsight_serve.schemas import AttentionReply, EmbedReply, EncoderList, ErrorReply

    files = [("images", ("a", png)), ("images", ("b", b"junk"))]
    outputs = "embedding,cls,mean,attention,patch_tokens"
    EmbedReply.model_validate(client.post(f"/embed?outputs={outputs}", files=files).json(), strict=True)
    accept = {"Accept": "application/json", "Content-Type": "image/png"}
    AttentionReply.model_validate(client.post("/attention", content=png, headers=accept).json(), strict=True)
    EncoderList.model_validate(client.get("/encoders").json(), strict=True)
    ErrorReply.model_validate(client.get("/nowhere").json(), strict=True)


def test_a_server_whose_encoder_fails_starts_and_says_it_is_not_ready(serving: Callable[..., TestClient]) -> None:
    class Broken(FakeEncoder):
        def run(self, *_: object) -> dict[str, object]:  # type: ignore[override]
            raise RuntimeError("no device")

    client = serving(Broken())
    assert client.get("/livez").status_code == 200
    assert client.get("/readyz").status_code == 503
