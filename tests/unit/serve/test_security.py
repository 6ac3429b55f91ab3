"""docs/security.md names every limit with the default that it has."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from patchsight_serve.connection import MAX_HEAD, MAX_PIPELINED
from patchsight_serve.decode import Limits
from patchsight_serve.filters import MAX_CONDITIONS, MAX_LABELS
from patchsight_serve.item import MAX_DEPTH, MAX_LABEL, MAX_METADATA
from patchsight_serve.settings import ServeSettings

PAGE = (Path(__file__).parents[3] / "docs" / "security.md").read_text()


def test_every_limit_stands_on_the_page() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| ([\d,.]+) \|", PAGE, re.MULTILINE))
    fields, settings = ServeSettings.model_fields, ServeSettings(threads=1)
    limits = {name for name in fields if name.startswith("max_") or name.endswith("timeout_s")}
    assert set(rows) == limits
    for name, said in rows.items():
        default = settings.batch if name == "max_batch" else fields[name].default
        assert float(said.replace(",", "")) == float(default), name


def test_what_cannot_be_set() -> None:
    text = " ".join(PAGE.split())
    assert f"{MAX_HEAD // 1024} KiB of a request's line and headers" in text
    assert f"{MAX_PIPELINED} requests of one connection that wait" in text
    assert f"{Limits().max_side:,} pixels on an image's longest side" in text
    assert f"{MAX_LABEL} characters of a label, {MAX_METADATA // 1024} KiB and {MAX_DEPTH} levels of metadata" in text
    assert f"{MAX_CONDITIONS} conditions of a filter, {MAX_LABELS} labels to choose from" in text


def test_what_is_closed_by_default() -> None:
    settings = ServeSettings()
    assert (settings.host, settings.allow_anonymous, settings.cors_origins) == ("127.0.0.1", False, "")
    assert "listens on 127.0.0.1" in PAGE


def test_nobody_is_told_of_a_request(
    serving: Callable[..., TestClient], png: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FastAPI would send traces, metrics and logs to an address from the environment, and look with each request for
    others who want them."""
    asked: list[str] = []
    monkeypatch.setenv("FASTAPI_OTEL_AUTO_CONFIGURE", "true")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    for name in ("trace.get_tracer_provider", "metrics.get_meter_provider", "_logs.get_logger_provider"):
        monkeypatch.setattr(f"opentelemetry.{name}", lambda name=name: asked.append(name))
    client = serving()
    assert client.post("/embed", content=png).status_code == 200
    assert not asked
