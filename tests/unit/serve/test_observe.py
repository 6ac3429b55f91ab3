"""A request's id and times, the counters that Prometheus reads, and the answer to what nobody expected."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

RAW = {"Content-Type": "application/octet-stream"}


def metrics(client: TestClient) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(client.get("/metrics").text)
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for f in families for s in f.samples}


def labels(**pairs: str) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(pairs.items()))


@pytest.mark.parametrize("given", ["abc-1.2_3", "x" * 128])
def test_a_request_id_comes_back(given: str, client: TestClient) -> None:
    for path in ("/livez", "/unknown"):
        assert client.get(path, headers={"X-Request-ID": given}).headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["", "x" * 129, "a b", "<script>", "ä".encode()])
def test_another_request_id_is_replaced(given: str | bytes, client: TestClient) -> None:
    ids = [client.get("/livez", headers={"X-Request-ID": given}).headers["x-request-id"] for _ in range(2)]
    assert all(re.fullmatch("[0-9a-f]{32}", i) for i in ids)
    assert ids[0] != ids[1]


def test_times_of_each_stage(client: TestClient, png: bytes) -> None:
    header = client.post("/embed", content=png, headers=RAW).headers["server-timing"]
    stages = dict(re.findall(r"(\w+);dur=([0-9.]+)", header))
    assert list(stages) == ["decode", "queue", "infer", "encode"]
    assert all(0 < float(ms) < 60_000 for ms in stages.values())
    assert "server-timing" not in client.get("/livez").headers


def test_requests_are_counted_by_template_and_code(client: TestClient, png: bytes) -> None:
    client.post("/embed", content=png, headers=RAW)
    client.post("/embed", content=b"junk", headers=RAW)
    client.get("/encoders/fake")
    client.get("/encoders/missing")
    client.get("/embed")
    tag = client.get("/static/page.js").headers["etag"]
    client.get("/static/page.js", headers={"If-None-Match": tag})
    for path in ("/a", "/b", "/static/d"):
        client.get(path)
    counted = metrics(client)
    total = "patchsight_requests_total"
    assert counted[total, labels(method="POST", route="/embed", code="200")] == 1
    assert counted[total, labels(method="POST", route="/embed", code="415")] == 1
    assert counted[total, labels(method="GET", route="/encoders/{name}", code="200")] == 1
    assert counted[total, labels(method="GET", route="/encoders/{name}", code="404")] == 1
    for code in ("200", "304"):
        assert counted[total, labels(method="GET", route="/static/{file}", code=code)] == 1
    assert counted[total, labels(method="any", route="unknown", code="404")] == 3
    assert counted["patchsight_request_duration_seconds_count", labels(route="/embed")] >= 2


def test_images_batches_and_stages_are_counted(client: TestClient, png: bytes) -> None:
    before = metrics(client)
    files = [("images", ("a", data)) for data in (png, b"junk", png, b"")]
    assert client.post("/embed", files=files).status_code == 200
    after = metrics(client)

    def grown(name: str, **pairs: str) -> float:
        return after[name, labels(**pairs)] - before.get((name, labels(**pairs)), 0)

    assert grown("patchsight_images_total", encoder="fake") == 1
    assert grown("patchsight_shared_images_total", encoder="fake") == 1
    assert grown("patchsight_rejected_images_total", reason="unsupported_image") == 1
    assert grown("patchsight_rejected_images_total", reason="invalid_request") == 1
    assert grown("patchsight_batch_size_sum", encoder="fake") == 1
    for stage in ("decode", "queue", "infer", "encode"):
        assert grown(f"patchsight_{stage}_seconds_count") == 1
    assert after["patchsight_admitted_images", labels(encoder="fake")] == 0


def test_errors_are_counted_by_their_code(serving: Callable[..., TestClient]) -> None:
    client = serving(api_keys="key")
    client.headers["Authorization"] = "Bearer key"
    client.post("/embed", content=b"junk", headers=RAW)
    client.get("/encoders/missing")
    client.get("/unknown")
    client.get("/embed")
    client.get("/gallery/images?limit=0")
    client.get("/encoders", headers={"Authorization": "Bearer other"})
    counted = metrics(client)
    for reason, times in {
        "unsupported_image": 1, "not_found": 2, "method_not_allowed": 1, "invalid_request": 1, "unauthorized": 1
    }.items():  # fmt: skip
        assert counted["patchsight_rejected_requests_total", labels(reason=reason)] == times


def test_no_reply_is_taken_for_another_type(client: TestClient, png: bytes) -> None:
    for reply in (client.post("/embed", content=png, headers=RAW), client.get("/unknown"), client.get("/metrics")):
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert reply.headers["cross-origin-resource-policy"] == "same-origin"


def test_a_path_cannot_forge_a_line_of_the_log(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(*_: object) -> None:
        raise RuntimeError

    monkeypatch.setattr("patchsight_serve.visits.Visiting.__call__", broken)
    assert client.get("/a%0Aforged").status_code == 500
    assert "GET /a%0Aforged" in caplog.text
    assert "\nforged" not in caplog.text


def test_two_servers_count_apart(serving: Callable[..., TestClient]) -> None:
    one, two = serving(), serving()
    one.get("/livez")
    assert ("patchsight_requests_total", labels(method="GET", route="/livez", code="200")) not in metrics(two)


def test_what_nobody_expected_is_a_bare_500(
    client: TestClient, png: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a secret of the inside")

    monkeypatch.setattr("patchsight_serve.service.graph_name", broken)
    reply = client.post("/embed", content=png, headers=RAW | {"X-Request-ID": "r-1"})
    assert reply.status_code == 500
    assert reply.json() == {"error": {"code": "internal", "message": "internal error", "param": None}}
    assert reply.headers["x-request-id"] == "r-1"
    assert "request r-1 failed: POST /embed" in caplog.text
    assert "a secret of the inside" in caplog.text
    assert metrics(client)["patchsight_requests_total", labels(method="POST", route="/embed", code="500")] == 1


def test_metrics_tell_of_galleries_and_their_disk(
    serving: Callable[..., TestClient], png: bytes, tmp_path: Path
) -> None:
    def told(client: TestClient) -> list[float]:
        found = metrics(client)
        return [found[f"patchsight_{name}", ()] for name in ("open_galleries", "gallery_images", "free_bytes")]

    client = serving(state_dir=tmp_path / "not" / "there yet")
    assert told(client) == [0, 0, pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1)]
    for name, id in (("a", "1"), ("a", "2"), ("b", "1")):
        assert client.post("/gallery/images", content=png, params={"gallery": name, "id": id}).status_code == 200
    assert told(client)[:2] == [2, 3]
    client.delete("/gallery", params={"gallery": "a"})
    assert told(client)[:2] == [1, 1]
