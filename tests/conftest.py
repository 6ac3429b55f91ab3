"""What every test may use: the labelled images, a clean environment, and encoded pictures of all kinds."""

import os
from collections.abc import Generator
from pathlib import Path

import pytest

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
