"""As a new user: a fresh clone, then every command of the README, word by word."""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pyarrow.parquet as pq
import pytest

from patchsight_serve.dataset import read_dataset

ROOT = Path(__file__).resolve().parents[2]
URL = "http://127.0.0.1:8000"
READY_S = 60

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The committed state in a folder of its own, with some photos beside the README for its own-data path."""
    folder = tmp_path_factory.mktemp("new-user") / "patchsight"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    samples = folder / "serve/patchsight_serve/samples/clothing.parquet"
    dataset = read_dataset(samples)
    (folder / "photos").mkdir()
    for i in range(60):
        (folder / "photos" / f"{i}.jpg").write_bytes(dataset.read(i))
    table = pq.read_table(samples)
    pq.write_table(table.slice(0, 150), folder / "train.parquet")
    pq.write_table(table.slice(150), folder / "test.parquet")
    return folder


@pytest.fixture(scope="module")
def environment(clone: Path) -> dict[str, str]:
    """A shell in which the project's commands are on the path. Training is cut short: one epoch, a small encoder."""
    small = {"EPOCHS": "1", "BATCH_SIZE": "32", "WIDTH": "48", "DEPTH": "2", "HEADS": "2"}
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PATCHSIGHT_")}
    path = f"{clone / '.venv/bin'}:{os.environ['PATH']}"
    return clean | {f"PATCHSIGHT_TRAIN_{k}": v for k, v in small.items()} | {"PATH": path}


@pytest.fixture(scope="module")
def served(clone: Path, environment: dict[str, str]) -> Iterator[float]:
    """`make serve`, as printed; gives the seconds from the environment being there to the first 200 of /readyz."""
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", 8000)) == 0:
            pytest.fail("port 8000, which the README names, is taken: stop what listens there")
    subprocess.run(["make", ".serve-venv/.built"], cwd=clone, env=environment, check=True, timeout=900)
    start = time.monotonic()
    process = subprocess.Popen(["make", "serve"], cwd=clone, env=environment, start_new_session=True)
    try:
        yield wait_until_ready(process, start)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=60)


def wait_until_ready(process: subprocess.Popen[bytes], start: float) -> float:
    while time.monotonic() - start < READY_S and process.poll() is None:
        try:
            if httpx.get(f"{URL}/readyz", timeout=2).status_code == 200:
                return time.monotonic() - start
        except httpx.TransportError:
            time.sleep(0.1)
    raise AssertionError(f"no 200 from /readyz within {READY_S} s")


def test_serve(served: float) -> None:
    print(f"ready {served:.1f} s after the environment was there")
    assert served < READY_S
    assert httpx.get(URL).status_code == 200


def test_every_command(
    served: float,  # noqa: ARG001 - the requests need the server
    clone: Path,
    environment: dict[str, str],
    readme_commands: Callable[[Path], list[str]],
) -> None:
    """`make serve` runs already, `make test` would run this; a second server gets a port of its own."""
    subprocess.run(["make", ".venv/.built"], cwd=clone, env=environment, check=True, timeout=900)
    shutil.rmtree(clone / "runs", ignore_errors=True)
    environment = environment | {"PATCHSIGHT_TRAIN_EPOCHS": "2"}  # what the defaults pick takes hours
    for line in readme_commands(clone / "README.md"):
        if line in ("make serve", "make test"):
            continue
        if line.startswith("patchsight-serve"):
            check_server(line, clone, environment)
            continue
        result = subprocess.run(line, shell=True, cwd=clone, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, f"{line}\n{result.stdout}{result.stderr}"


def check_server(line: str, clone: Path, environment: dict[str, str]) -> None:
    """A command that serves until told to stop: it becomes ready, and leaves with 0."""
    process = subprocess.Popen(
        f"exec {line} --port 8001 --state-dir other", shell=True, cwd=clone, env=environment, start_new_session=True
    )
    for _ in range(600):
        try:
            if httpx.get("http://127.0.0.1:8001/readyz", timeout=2).status_code == 200:
                break
        except httpx.TransportError:
            time.sleep(0.1)
    assert httpx.get("http://127.0.0.1:8001/readyz").status_code == 200
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
