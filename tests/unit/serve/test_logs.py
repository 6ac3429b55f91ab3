"""One line per request, of what is harmless, in text or JSON; none where none is wanted."""

import io
import json
import logging
import re
from collections.abc import Callable, Iterator

import pytest
from starlette.testclient import TestClient

from patchsight_serve.logs import JsonLines, access, set_up

RAW = {"Content-Type": "application/octet-stream", "X-Request-ID": "r-1", "Authorization": "Bearer very-secret"}


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., io.StringIO]]:
    """`log(level, form, requests)`: set up as a process would; what it writes."""
    root = logging.getLogger()
    handlers, level, access_level = root.handlers[:], root.level, access.level

    def start(*arguments: object) -> io.StringIO:
        stream = io.StringIO()
        root.handlers.clear()
        monkeypatch.setattr("sys.stderr", stream)
        set_up(*arguments)  # type: ignore[arg-type]
        return stream

    yield start
    root.handlers[:] = handlers
    root.setLevel(level)
    access.setLevel(access_level)


def of_requests(stream: io.StringIO) -> list[str]:
    return [line for line in stream.getvalue().splitlines() if access.name in line]


def test_json(log: Callable[..., io.StringIO], client: TestClient, png: bytes) -> None:
    stream = log("info", "json", True)
    client.post("/embed?normalize=false", content=png, headers=RAW)
    client.post("/embed", files=[("images", ("a", png)), ("images", ("b", b"junk"))])
    client.get("/encoders/missing", headers=RAW)
    client.get("/livez")
    lines = [json.loads(line) for line in of_requests(stream)]
    assert [(line["method"], line["route"], line["status"], line["images"]) for line in lines] == [
        ("POST", "/embed", 200, 1), ("POST", "/embed", 200, 2), ("GET", "/encoders/{name}", 404, 0)
    ]  # fmt: skip
    assert [line.get("error") for line in lines] == [None, None, "not_found"]
    assert lines[0]["request_id"] == "r-1"
    assert lines[0]["level"] == "info"
    assert 0 <= lines[0]["ms"] < 60_000
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", lines[0]["time"])
    assert "secret" not in stream.getvalue()
    for chosen in ("normalize", "missing"):  # by the client
        assert chosen not in "".join(of_requests(stream))


def test_text(log: Callable[..., io.StringIO], client: TestClient) -> None:
    stream = log("debug", "text", True)
    client.post("/embed", content=b"junk", headers=RAW)
    client.get("/livez")
    first, second = of_requests(stream)
    said = r"INFO patchsight_serve.access: POST /embed 415 unsupported_image in [0-9.]+ ms, images: 1, request r-1"
    assert re.search(said, first)
    assert re.search("DEBUG patchsight_serve.access: GET /livez 200 in", second)


@pytest.mark.parametrize(("level", "requests"), [("info", False), ("warning", True)])
def test_none_are_wanted(
    level: str, requests: bool, log: Callable[..., io.StringIO], client: TestClient, png: bytes
) -> None:
    stream = log(level, "json", requests)
    client.post("/embed", content=png, headers=RAW)
    assert not of_requests(stream)


def test_an_exception_is_one_line() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError as error:
        record = logging.LogRecord("x", logging.ERROR, "", 0, "failed: %s", ("a",), (ValueError, error, None))
    line = JsonLines().format(record)
    assert "\n" not in line
    assert json.loads(line)["message"] == "failed: a"
    assert json.loads(line)["exception"] == "ValueError: two\nlines"
