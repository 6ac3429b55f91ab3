"""Dockerfile, compose.yaml and deploy/ as far as they can be read: what they copy, mount, set and ask for is there. The
acceptance suite starts them."""

import importlib.util
import json
import re
import shlex
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import generate_latest

from patchsight_serve.metrics import Metrics
from patchsight_serve.settings import ServeSettings

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """Of a Dockerfile: instruction and the rest, comments left out, continued lines joined."""
    lines = [line for line in dockerfile.read_text().splitlines() if line.strip() and not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(line.split()[0], line.split(maxsplit=1)[1].strip()) for line in joined.splitlines()]


def of(kind: str) -> list[str]:
    return [rest for name, rest in instructions(ROOT / "Dockerfile") if name == kind]


def reaches_docker(path: str) -> bool:
    """Whether .dockerignore lets a path through: the last line that fits it decides."""
    there = True
    for line in (ROOT / ".dockerignore").read_text().split():
        pattern = line.removeprefix("!")
        if pattern == "*" or fnmatch(path, pattern) or path.startswith(f"{pattern}/"):
            there = line.startswith("!")
    return there


def settings_of(arguments: list[str], config: Path) -> ServeSettings:
    """As patchsight-serve reads them; it ends with status 2 for a flag that it does not know."""
    own = [str(config) if argument.startswith("/run/secrets/") else argument for argument in arguments]
    return ServeSettings.from_command_line("patchsight-serve", own)


@pytest.fixture
def services() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
    return found


def test_what_the_image_copies_is_there_and_is_sent() -> None:
    sources = [source for rest in of("COPY") if "--from" not in rest for source in rest.split()[:-1]]
    assert len(sources) >= 6
    for source in sources:
        assert (ROOT / source).exists(), source
        assert reaches_docker(source), f".dockerignore keeps {source} away"
    assert reaches_docker("serve/patchsight_serve/web/page.css")
    for kept in (".git/config", "state/galleries", "secrets/gateway.toml", "tests/conftest.py", ".venv/bin/python"):
        assert not reaches_docker(kept), kept


def test_the_image_runs_as_nobody_special_and_says_whether_it_is_ready() -> None:
    assert of("USER") == ["10001"]
    assert "/readyz" in of("HEALTHCHECK")[0]
    assert json.loads(of("ENTRYPOINT")[0]) == ["patchsight-serve"]
    variables = dict(pair.split("=", 1) for rest in of("ENV") for pair in shlex.split(rest))
    ours = {name for name in variables if name.startswith("PATCHSIGHT_")}
    assert {name.removeprefix("PATCHSIGHT_").lower() for name in ours} <= set(ServeSettings.model_fields)
    assert "PATCHSIGHT_API_KEYS" not in ours


def test_the_gateway_takes_what_compose_tells_it(
    services: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = services["services"]["gateway"]
    secret = tmp_path / "gateway.toml"
    secret.write_text('[serve]\napi_keys = "a, b"\n')
    monkeypatch.setenv("PATCHSIGHT_HOST", "0.0.0.0")
    for name in gateway["environment"]:
        assert name.removeprefix("PATCHSIGHT_").lower() in ServeSettings.model_fields
    seconds = int(gateway["stop_grace_period"].removesuffix("s"))
    triton = yaml.safe_load((DEPLOY / "triton.yaml").read_text())["services"]["gateway"]
    for command in (gateway["command"], triton["command"]):
        settings = settings_of(command, secret)
        assert settings.keys == ("a", "b")
        assert settings.drain_delay_s + settings.drain_timeout_s < seconds
    assert settings.triton == "grpc://triton:8001"
    secret.write_text("[serve]\n")
    with pytest.raises(SystemExit):  # without a key nobody is let in
        settings_of(gateway["command"], secret)


def test_what_compose_mounts_is_there(services: dict[str, Any]) -> None:
    for name, service in services["services"].items():
        for mount in service["volumes"]:
            source = mount.split(":")[0]
            if source.startswith("."):
                assert (ROOT / source).exists(), f"{name}: {source}"
                assert mount.endswith(":ro")
            else:
                assert source in services["volumes"]
        assert set(service["secrets"]) <= set(services["secrets"])
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        assert service["mem_limit"]
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:")


def test_prometheus_and_grafana_find_each_other(services: dict[str, Any]) -> None:
    mounts = [mount.split(":") for s in services["services"].values() for mount in s["volumes"]]
    at = {inside: outside for outside, inside, *_ in mounts}
    config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    assert at["/etc/prometheus/alerts.yml"] == f"./deploy/{config['rule_files'][0]}"
    by_name = {job["job_name"]: job for job in config["scrape_configs"]}
    assert by_name["patchsight"]["static_configs"][0]["targets"] == ["gateway:8000"]
    secret = Path(by_name["patchsight"]["authorization"]["credentials_file"])
    assert secret.name in services["services"]["prometheus"]["secrets"]
    (source,) = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yaml").read_text())["datasources"]
    (provider,) = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/patchsight.yaml").read_text())["providers"]
    dashboard = json.loads((DEPLOY / "grafana/dashboard.json").read_text())
    assert source["url"] == "http://prometheus:9090"
    assert {target["datasource"]["uid"] for p in dashboard["panels"] for target in p["targets"]} == {source["uid"]}
    assert any(inside.startswith(provider["options"]["path"] + "/") for inside in at)


def test_the_dashboard_is_as_its_script_writes_it() -> None:
    spec = importlib.util.spec_from_file_location("write_dashboard", DEPLOY / "grafana" / "write_dashboard.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.FILE.read_text() == module.text(), "run `make dashboard` and commit it"
    titles = [panel["title"] for panel in module.dashboard()["panels"]]
    assert len(set(titles)) == len(titles)


def test_panels_and_alerts_ask_for_metrics_that_there_are(tmp_path: Path) -> None:
    metrics = Metrics()
    metrics.watch_galleries(lambda: (1, 2), tmp_path)
    there = set(re.findall(r"^# TYPE (\w+)", generate_latest(metrics.registry).decode(), re.MULTILINE))
    for file in ("grafana/dashboard.json", "alerts.yml"):
        asked = set(re.findall(r"\bpatchsight_\w+", (DEPLOY / file).read_text()))
        assert len(asked) >= 4
        assert {re.sub(r"_(bucket|sum|count)$", "", name) for name in asked} <= there


def test_the_unit_of_systemd(tmp_path: Path) -> None:
    unit = (DEPLOY / "patchsight.service").read_text()
    (line,) = re.findall(r"^ExecStart=\S+/patchsight-serve (.*)$", unit, re.MULTILINE)
    for name in re.findall(r"PATCHSIGHT_([A-Z_]+)=", unit):
        assert name.lower() in ServeSettings.model_fields
    settings = settings_of(line.split(), tmp_path)
    (seconds,) = re.findall(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)
    assert settings.drain_delay_s + settings.drain_timeout_s < int(seconds)
