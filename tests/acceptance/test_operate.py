"""What deploy/ says of watching: a real Prometheus watches a real server on a real Triton, and every panel has
something to show; the alerts. Containers have a file of their own."""

import json
import math
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import yaml
from debian import install
from triton_process import ENVIRONMENT, TritonProcess, free_port

from patchsight_serve.dataset import read_dataset
from patchsight_serve.sample_gallery import SAMPLES
from patchsight_serve.triton_models import write_triton_models

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
KEY = "right"
LOAD_S = 60
LARGEST = 600e6  # bytes of the environment that goes into the image
WINDOW = "30s"  # of the panels' rates

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def tools() -> None:
    """Debian's Prometheus, with promtool."""
    install({"prometheus": "prometheus"})


def test_alerts(tools: None) -> None:  # noqa: ARG001
    for line in (["check", "rules", "alerts.yml"], ["test", "rules", "alerts_test.yml"]):
        done = subprocess.run(["promtool", *line], cwd=DEPLOY, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    (group,) = yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"]
    tests = yaml.safe_load((DEPLOY / "alerts_test.yml").read_text())["tests"]
    fired = {case["alertname"] for test in tests for case in test["alert_rule_test"] if case.get("exp_alerts")}
    assert fired == {rule["alert"] for rule in group["rules"]}  # each is seen to fire


def test_the_unit_is_one_for_systemd(tmp_path: Path) -> None:
    unit = tmp_path / "patchsight.service"
    unit.write_text(
        (DEPLOY / "patchsight.service").read_text().replace("/opt/patchsight/bin/patchsight-serve", "/bin/true")
    )
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.fixture(scope="module")
def triton(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonProcess]:
    if not any(ENVIRONMENT.glob("lib/python*/site-packages/pytriton")):
        pytest.skip(f"no Triton in {ENVIRONMENT}: `make .triton-venv/.built` installs it, on x86-64 Linux")
    folder = tmp_path_factory.mktemp("triton")
    write_triton_models([ROOT / "model_repository" / "dino-vit-cifar10"], folder / "models", "python")
    server = TritonProcess(folder / "models", folder / "log")
    server.start()
    yield server
    assert server.stop() == 0


@pytest.fixture
def prometheus(
    tools: None,  # noqa: ARG001
    tmp_path: Path,
) -> Iterator[Callable[[dict[str, str]], str]]:
    """`prometheus(targets)`: a running one's URL, by deploy/prometheus.yml with other targets by job, and our key."""
    running: list[subprocess.Popen[bytes]] = []

    def start(targets: dict[str, str]) -> str:
        config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
        jobs = {job["job_name"]: job for job in config["scrape_configs"]}
        assert set(jobs) == set(targets)
        for name, target in targets.items():
            jobs[name]["static_configs"] = [{"targets": [target]}]
        (tmp_path / "key").write_text(f"{KEY}\n")
        jobs["patchsight"]["authorization"]["credentials_file"] = str(tmp_path / "key")
        (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
        shutil.copy(DEPLOY / "alerts.yml", tmp_path)
        port = free_port()
        config_file, storage = tmp_path / "prometheus.yml", tmp_path / "tsdb"
        line = ["prometheus", f"--config.file={config_file}", f"--storage.tsdb.path={storage}",
                f"--web.listen-address=127.0.0.1:{port}"]  # fmt: skip
        with (tmp_path / "prometheus.log").open("wb") as log:
            running.append(subprocess.Popen(line, stdout=log, stderr=log))
        return f"http://127.0.0.1:{port}"

    yield start
    for process in running:
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0


def load(url: str, seconds: float) -> None:
    """A little of everything: good images, equal ones, bad ones, unknown galleries, more than is taken at once."""
    samples = read_dataset(SAMPLES)
    end = time.monotonic() + seconds
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=url, headers=headers, timeout=60) as http:
        turn = 0
        while time.monotonic() < end:
            photo = samples.read(turn % 200)
            http.post("/gallery/images", content=photo)
            http.post("/embed", files=[("images", photo), ("images", photo)])
            http.post("/attention", content=photo)
            http.post("/neighbors", content=photo)
            http.post("/embed", content=b"no image")
            http.get("/gallery", params={"gallery": "none"})
            http.get("/readyz")
            turn += 1


def answered(prometheus: str, query: str) -> list[float]:
    reply = httpx.get(f"{prometheus}/api/v1/query", params={"query": query})
    assert reply.status_code == 200, (query, reply.text)
    return [float(series["value"][1]) for series in reply.json()["data"]["result"]]


def test_every_panel_has_something_to_show(
    triton: TritonProcess,
    serve: Callable[..., str],
    prometheus: Callable[[dict[str, str]], str],
    tmp_path: Path,
) -> None:
    (tmp_path / "patchsight.toml").write_text(f'[serve]\napi_keys = "{KEY}"\n')
    url = serve("--triton", triton.address, "--no-sample-gallery")
    targets = {"patchsight": url.removeprefix("http://"), "triton": f"127.0.0.1:{triton.ports[2]}"}
    assert httpx.get(f"{url}/metrics").status_code == 401
    watch = prometheus(targets)
    load(url, LOAD_S)
    assert answered(watch, "up") == [1, 1]
    dashboard = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text())
    empty, count = [], 0
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            values = answered(watch, target["expr"].replace("$__rate_interval", WINDOW))
            count += 1
            if not any(math.isfinite(value) for value in values):
                empty.append((panel["title"], target["expr"], values))
    assert empty == []
    assert count >= 25
    for query in ("rate(patchsight_images_total[30s])", "patchsight_gallery_images", "process_resident_memory_bytes"):
        assert max(answered(watch, query)) > 0
    told = httpx.get(f"{watch}/api/v1/rules").json()["data"]["groups"][0]["rules"]
    assert {rule["health"] for rule in told} == {"ok"}
    assert [rule["name"] for rule in told if rule["state"] != "inactive"] == []
