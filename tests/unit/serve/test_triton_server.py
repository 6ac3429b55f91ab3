"""What is said where the real Triton cannot be started; that it can is shown in tests/triton."""

import subprocess
import sys
from pathlib import Path

import pytest

from patchsight_serve.errors import InvalidRequest
from patchsight_serve.triton_server import TritonServerSettings, prepare


def settings(environment: Path, models: Path) -> TritonServerSettings:
    return TritonServerSettings.from_command_line("triton_server", [str(environment), str(models)])


@pytest.fixture
def models(tmp_path: Path) -> Path:
    (tmp_path / "models" / "a").mkdir(parents=True)
    (tmp_path / "models" / "a" / "config.pbtxt").touch()
    return tmp_path / "models"


def test_no_models(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="no models there; `patchsight-models triton` writes them"):
        prepare(settings(tmp_path, tmp_path / "nothing"), tmp_path)


def test_no_environment(tmp_path: Path, models: Path) -> None:
    with pytest.raises(InvalidRequest, match="not a virtual environment"):
        prepare(settings(tmp_path, models), tmp_path)


def test_an_environment_without_the_server(tmp_path: Path, models: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    with pytest.raises(InvalidRequest, match="has no nvidia-pytriton"):
        prepare(settings(tmp_path, models), tmp_path / "scratch")


def test_the_command_explains_itself(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "patchsight_serve.triton_server", str(tmp_path), str(tmp_path)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith("triton_server: error: ")
