"""What the server says of itself, and where the vendored files of its documentation come from."""

from collections.abc import Callable
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from patchsight_serve.fake_encoder import FakeEncoder
from patchsight_serve.ort_encoder import OrtEncoder


def test_encoders(serving: Callable[..., TestClient], tiny_bundle: Path) -> None:
    tiny = OrtEncoder(tiny_bundle, threads=1)
    client = serving(FakeEncoder(), tiny, encoder="tiny")
    listed = client.get("/encoders").json()["encoders"]
    assert [(e["name"], e["default"]) for e in listed] == [("fake", False), ("tiny", True)]
    one = client.get("/encoders/tiny").json()
    assert one == listed[1]
    assert one["sha256"] == tiny.manifest.sha256
    assert one["manifest"] == tiny.manifest.model_dump(mode="json")
    assert one["runtime"] == {"engine": "onnxruntime", "precision": "fp32", "cosine": None}
    assert one["outputs"] == {
        "embedding": [8], "cls": [8], "mean": [8], "attention": [2, 4, 4], "patch_tokens": [4, 4, 8],
    }  # fmt: skip
    missing = client.get("/encoders/none")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")


def test_a_resnet_offers_its_mean_alone(serving: Callable[..., TestClient], mean_bundle: Path) -> None:
    one = serving(OrtEncoder(mean_bundle, threads=1)).get("/encoders/resnet").json()
    assert one["outputs"] == {"embedding": [8], "mean": [8]}
    assert (one["manifest"]["patch_size"], one["manifest"]["num_heads"]) == (None, None)


def test_alive_and_ready(client: TestClient) -> None:
    assert client.get("/livez").json() == {"status": "alive"}
    assert client.get("/readyz").json() == {"status": "ready"}


def test_not_ready_while_draining_though_requests_are_answered(client: TestClient, png: bytes) -> None:
    client.app.state.service.draining = True  # type: ignore[attr-defined]
    reply = client.get("/readyz")
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "not_ready")
    assert client.post("/embed", content=png, headers={"Content-Type": "image/png"}).status_code == 200


def test_not_ready_when_the_worker_is_dead(client: TestClient, png: bytes) -> None:
    batcher = client.app.state.service.loaded["fake"].engine  # type: ignore[attr-defined]
    with batcher._wake:
        batcher._stopping = True
        batcher._wake.notify()
    batcher._thread.join(10)
    assert client.get("/readyz").status_code == 503
    assert client.get("/livez").status_code == 200
    assert client.post("/embed", content=png, headers={"Content-Type": "image/png"}).status_code == 503


def test_license_of_the_vendored_page_comes_with_it(client: TestClient) -> None:
    assert "Apache License" in client.get("/static/swagger/LICENSE").text


@pytest.mark.parametrize("path", ["/static/../app.py", "/static/%2e%2e/app.py", "/static/swagger"])
def test_static_serves_only_its_files(path: str, client: TestClient) -> None:
    assert client.get(path).status_code == 404
