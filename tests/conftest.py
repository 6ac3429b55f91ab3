"""What every test may use: the labelled images, a clean environment, the commands, and a running server."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

# A test process runs on each core: a thread of OpenMP that has nothing to do must not keep another from working. Set
# before anything is imported that reads it.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import httpx
import pyarrow.parquet as pq
import pytest
from pages import commands

from patchsight_serve.manifest import Manifest, Transform

ROOT = Path(__file__).resolve().parent.parent


NO_SKIPS = bool(os.environ.get("PATCHSIGHT_NO_SKIPS"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """In CI a skip is a failure: what is skipped there is tested nowhere."""
    report = yield
    if NO_SKIPS and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped where nothing may be: {report.longrepr}"
    return report


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No `PATCHSIGHT_*` variable and no `patchsight.toml` of the person who runs the tests may change a result."""
    for name in list(os.environ):
        if name.startswith("PATCHSIGHT_") and name != "PATCHSIGHT_TEST_DATA":
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of labelled images: `PATCHSIGHT_TEST_DATA`, by default `../shared/data` beside the repository."""
    folder = Path(os.environ.get("PATCHSIGHT_TEST_DATA", ROOT.parent / "shared" / "data")).resolve()
    if not folder.is_dir():
        pytest.skip(f"no labelled images at {folder}; set PATCHSIGHT_TEST_DATA")
    return folder


@pytest.fixture(scope="session")
def first_of_cifar(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int], Path]:
    """`first_of_cifar(train, test)`: a folder with that many images of CIFAR-10, train.parquet and test.parquet."""

    def cut(train: int, test: int) -> Path:
        folder = tmp_path_factory.mktemp("cifar")
        for part, rows in (("train", train), ("test", test)):
            whole = pq.read_table(data / "cifar10" / f"{part}.parquet")
            pq.write_table(whole.slice(0, rows), folder / f"{part}.parquet")
        return folder

    return cut


@pytest.fixture(scope="session")
def readme_commands() -> Callable[[Path], list[str]]:
    """Every command in the `sh` blocks of a page, in order."""
    return commands


@pytest.fixture(scope="session")
def readme_answers() -> list[str]:
    """The README's `json` blocks, in order."""
    return re.findall(r"^```json\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="session")
def command() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run one of our commands as a user would: `command("patchsight-train", "simclr", "--data", …)`."""

    def run(name: str, *arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
        line = [str(Path(sys.executable).parent / name), *map(str, arguments)]
        options.setdefault("timeout", 240)
        return subprocess.run(line, capture_output=True, text=True, **options)  # type: ignore[call-overload]

    return run


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Start a real server as a process of its own and wait until it is ready: `url = serve("--max-images", 8)`.

    Every server that a test starts must leave with exit code 0 when told to, at the latest at the test's end.
    """
    with _servers(tmp_path) as start:
        yield start


@pytest.fixture(scope="module")
def shared_serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., str]]:
    """`serve` for a server that all tests of a module use: none of them may change what it keeps."""
    with _servers(tmp_path_factory.mktemp("shared")) as start:
        yield start


@pytest.fixture(scope="session")
def serve_in() -> Callable[[Path], AbstractContextManager[Callable[..., str]]]:
    """`with serve_in(folder) as serve:` for a server that keeps its state in `folder/state`, and is gone afterwards."""
    return _servers


@contextmanager
def _servers(folder: Path) -> Iterator[Callable[..., str]]:
    """What `serve` promises. State and logs go to `folder`, where the processes run too."""
    running: list[subprocess.Popen[bytes]] = []

    def start(*arguments: object) -> str:
        # A module's fixture is made before `clean_environment`.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PATCHSIGHT_")}
        log = folder / f"serve-{len(running)}.log"
        program = str(Path(sys.executable).parent / "patchsight-serve")
        line = [program, "--port", "0", "--state-dir", str(folder / "state"), *map(str, arguments)]
        with log.open("wb") as file:
            process = subprocess.Popen(line, stdout=file, stderr=file, cwd=folder, env=environment)
        running.append(process)
        return _address(process, log)

    yield start
    for process in running:
        process.send_signal(signal.SIGTERM)
    assert [process.wait(timeout=40) for process in running] == [0] * len(running)


def _address(process: subprocess.Popen[bytes], log: Path, patience_s: float = 60) -> str:
    """The URL that a starting server reports, once /readyz answers 200."""
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline and process.poll() is None:
        said = [word for word in log.read_text().split() if word.startswith("http://127.0.0.1:")]
        if said:
            url = said[0].rstrip("/")
            try:
                if httpx.get(f"{url}/readyz", timeout=5).status_code == 200:
                    return url
            except httpx.TransportError:
                pass  # not listening yet
        time.sleep(0.1)
    raise AssertionError(f"the server did not become ready:\n{log.read_text()}")


@pytest.fixture
def manifest() -> Manifest:
    """A manifest whose numbers all differ, so that one in another's place shows."""
    return Manifest(
        name="tiny", sha256="0" * 64, objective="dino", architecture="ViT", parameters=1000, image_size=32,
        patch_size=4, embedding_dim=96, num_heads=3, prefix_tokens=1, recommended="cls",
        transform=Transform(resize=36, crop=32), data="noise", recipe="none", commit="none", license="CC0-1.0",
    )  # fmt: skip
