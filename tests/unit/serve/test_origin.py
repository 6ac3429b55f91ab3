"""Pages of elsewhere: what they may send to a server without keys, and what CORS lets them read."""

from collections.abc import Callable

import pytest
from starlette.testclient import TestClient

from patchsight_serve.settings import ServeSettings

PAGE = "https://photos.example"


def post(client: TestClient, png: bytes, **headers: str) -> int:
    reply = client.post("/embed", content=png, headers={"Content-Type": "text/plain", **headers})
    if reply.status_code == 403:
        assert reply.json()["error"]["code"] == "forbidden"
        assert reply.json()["error"]["param"] == "Origin"
    return reply.status_code


@pytest.mark.parametrize(
    ("origin", "host", "may"),
    [
        (None, "localhost:8000", True),  # a program
        ("http://localhost:8000", "localhost:8000", True),
        ("http://127.0.0.1:8000", "127.0.0.1:8000", True),
        ("http://[::1]:8000", "[::1]:8000", True),
        ("http://localhost:9000", "localhost:8000", False),  # another server of this machine
        (PAGE, "localhost:8000", False),
        ("https://rebound.example", "rebound.example", False),  # a name that was made to point here
        ("null", "localhost:8000", False),
        ("http://[", "[", False),
        ("", "", False),
    ],
)
def test_who_may_post(origin: str | None, host: str, may: bool, client: TestClient, png: bytes) -> None:
    headers = {"Host": host} | ({} if origin is None else {"Origin": origin})
    assert post(client, png, **headers) == (415 if may else 403)
    assert client.get("/livez", headers=headers).status_code == 200


def test_beyond_loopback_any_name_is_its_own(serving: Callable[..., TestClient], png: bytes) -> None:
    client = serving(host="0.0.0.0", allow_anonymous=True)
    assert post(client, png, Origin="https://images.example", Host="images.example") == 415
    assert post(client, png, Origin=PAGE, Host="images.example") == 403


def test_with_keys_the_key_decides(serving: Callable[..., TestClient], png: bytes) -> None:
    client = serving(api_keys="key")
    assert post(client, png, Origin=PAGE) == 401
    assert post(client, png, Origin=PAGE, Authorization="Bearer key") == 415


def test_cors_is_closed(client: TestClient) -> None:
    asked = {"Origin": PAGE, "Access-Control-Request-Method": "POST"}
    for reply in (client.get("/livez", headers={"Origin": PAGE}), client.options("/embed", headers=asked)):
        assert not [name for name in reply.headers if name.startswith("access-control")]


@pytest.mark.parametrize("keys", ["", "key"])
def test_cors_for_named_origins(keys: str, serving: Callable[..., TestClient], png: bytes) -> None:
    client = serving(api_keys=keys, cors_origins=f"{PAGE}, http://localhost:3000")
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    allowed = client.options("/embed", headers=asked | {"Origin": PAGE})
    assert allowed.status_code == 200  # without a key
    assert allowed.headers["access-control-allow-origin"] == PAGE
    assert client.options("/embed", headers=asked | {"Origin": "https://other.example"}).status_code == 400
    headers = {"Authorization": "Bearer key", "Content-Type": "image/png"}
    reply = client.post("/embed", content=png, headers=headers | {"Origin": PAGE})
    assert reply.status_code == 200
    assert reply.headers["access-control-allow-origin"] == PAGE
    exposed = reply.headers["access-control-expose-headers"]
    assert {"X-Request-ID", "Server-Timing", "Retry-After", "X-Shape", "X-Dtype"} <= set(exposed.split(", "))
    assert "access-control-allow-credentials" not in reply.headers
    other = client.get("/livez", headers={"Origin": "https://other.example"})
    assert "access-control-allow-origin" not in other.headers
    denied = client.post("/embed", content=b"", headers={"Origin": PAGE, "Content-Type": "image/png"})
    assert denied.headers["access-control-allow-origin"] == PAGE  # a page may read errors, too


def test_every_origin_needs_keys() -> None:
    assert ServeSettings(cors_origins="*", api_keys="key").origins == ("*",)
    with pytest.raises(ValueError, match="without an API key"):
        ServeSettings(cors_origins="*")


@pytest.mark.parametrize("wrong", ["photos.example", "https://photos.example/", "https://*.example", "null", "ftp://x"])
def test_what_is_no_origin(wrong: str) -> None:
    with pytest.raises(ValueError, match="an origin is https://HOST"):
        ServeSettings(cors_origins=f"{PAGE},{wrong}")
