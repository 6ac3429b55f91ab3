"""Which paths are open, and that only a whole key in the right scheme opens the others."""

from collections.abc import Callable

import pytest
from starlette.testclient import TestClient

KEYS = "first-key,second-key"


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/docs", "/openapi.json", "/static/swagger/swagger-ui.css", "/"])
def test_open_paths(path: str, serving: Callable[..., TestClient]) -> None:
    assert serving(api_keys=KEYS).get(path, follow_redirects=False).status_code in (200, 307)


@pytest.mark.parametrize("path", ["/embed", "/encoders", "/metrics", "/gallery", "/neighbors", "/unknown", "/livez/"])
def test_everything_else_needs_a_key(path: str, serving: Callable[..., TestClient], png: bytes) -> None:
    reply = serving(api_keys=KEYS).post(path, content=png)
    assert reply.status_code == 401
    assert reply.json()["error"]["code"] == "unauthorized"
    assert reply.headers["www-authenticate"] == "Bearer"
    assert reply.headers["x-request-id"]


@pytest.mark.parametrize(
    ("authorization", "status"),
    [
        ("Bearer first-key", 200),
        ("bearer second-key", 200),
        ("Bearer first-ke", 401),
        ("Bearer first-keyy", 401),
        ("Bearer first-key,second-key", 401),
        ("Bearer ", 401),
        ("Bearer", 401),
        ("Basic first-key", 401),
        ("first-key", 401),
        ("", 401),
        (b"Bearer \xff\xfe", 401),
    ],
)
def test_keys(authorization: str | bytes, status: int, serving: Callable[..., TestClient]) -> None:
    client = serving(api_keys=KEYS)
    assert client.get("/encoders", headers={"Authorization": authorization}).status_code == status


def test_without_keys_everybody_may_call(client: TestClient) -> None:
    assert client.get("/encoders", headers={"Authorization": "Bearer whatever"}).status_code == 200
