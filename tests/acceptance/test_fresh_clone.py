"""As a new user: a fresh clone, then every command of README.md and of each page of docs/, word by word."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pyarrow.parquet as pq
import pytest
from pages import ROOT, commands, name, pages
from reader import READY_S, Reader, clean_environment, wait_until_ready

from patchsight_serve.dataset import read_dataset

URL = "http://127.0.0.1:8000"
FULL = "make .venv/.built"

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The committed state in a folder of its own, with some photos beside the README for its own-data path."""
    folder = tmp_path_factory.mktemp("new-user") / "patchsight"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    samples = folder / "serve/patchsight_serve/samples/clothing.parquet"
    dataset = read_dataset(samples)
    (folder / "photos").mkdir()
    for i in range(len(dataset)):  # whitening wants twice as many as an embedding has numbers
        (folder / "photos" / f"{i}.jpg").write_bytes(dataset.read(i))
    table = pq.read_table(samples)
    pq.write_table(table.slice(0, 150), folder / "train.parquet")
    pq.write_table(table.slice(150), folder / "test.parquet")
    return folder


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """Training is cut short: two epochs, a small encoder; what the defaults pick takes hours."""
    small = {"EPOCHS": "2", "BATCH_SIZE": "32", "WIDTH": "48", "DEPTH": "2", "HEADS": "2"}
    return clean_environment() | {f"PATCHSIGHT_TRAIN_{k}": v for k, v in small.items()}


@pytest.fixture(scope="module")
def served(clone: Path, environment: dict[str, str]) -> Iterator[dict[str, float]]:
    """`make serve`, as printed. Gives the seconds that its environment took, and the server until it was ready."""
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", 8000)) == 0:
            pytest.fail("port 8000, which the README names, is taken: stop what listens there")
    built = seconds("make .serve-venv/.built", clone, environment)
    process = subprocess.Popen(["make", "serve"], cwd=clone, env=environment, start_new_session=True)
    try:
        ready = wait_until_ready(process, URL)
        yield {"built": built, "ready": ready, "make serve": built + ready}
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=60)


@pytest.fixture(scope="module")
def full(clone: Path, environment: dict[str, str]) -> dict[str, float]:
    """The whole environment, and the seconds that it took."""
    return {FULL: seconds(FULL, clone, environment)}


def seconds(line: str, clone: Path, environment: dict[str, str]) -> float:
    began = time.monotonic()
    subprocess.run(line, shell=True, cwd=clone, env=environment, check=True, timeout=1500)
    return time.monotonic() - began


def test_serve(served: dict[str, float], capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(f"\nenvironment {served['built']:.1f} s, ready after {served['ready']:.1f} s more")
    assert served["ready"] < READY_S
    assert httpx.get(URL).status_code == 200


@pytest.mark.parametrize("page", [page for page in pages() if commands(page)], ids=name)
def test_every_command(
    page: Path,
    clone: Path,
    environment: dict[str, str],
    served: dict[str, float],
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    """A page that says where the commands are is left to that; on the others they are on the path."""
    own = any(line.startswith("export PATH=") for line in commands(page))
    if not own:
        environment = environment | {"PATH": f"{clone / '.venv/bin'}:{environment['PATH']}"}
    known = served | (request.getfixturevalue("full") if FULL in commands(page) or not own else {})
    reader = Reader(clone, environment, known)
    try:
        reader.follow(clone / page.relative_to(ROOT))
    finally:
        with capsys.disabled():
            print(f"\n{name(page)}\n{reader.table()}")
