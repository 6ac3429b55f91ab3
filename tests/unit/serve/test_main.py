"""The command: helps without loading anything heavy, and explains what keeps it from starting."""

import subprocess
import sys
from pathlib import Path

import pytest


def python(code: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("module", ["app", "server", "__main__", "repository"])
def test_importing_the_server_loads_no_torch(module: str) -> None:
    done = python(
        f"import patchsight_serve.{module}, sys\n"
        "sys.exit(','.join(m for m in ('torch', 'patchsight_train', 'patchsight_export') if m in sys.modules) or 0)"
    )
    assert done.returncode == 0, done.stderr


def test_help_loads_no_engine_and_no_framework() -> None:
    done = python(
        "import sys\n"
        "from patchsight_serve.__main__ import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as exit: assert exit.code == 0\n"
        "sys.exit(','.join(m for m in ('numpy', 'onnxruntime', 'fastapi', 'faiss') if m in sys.modules) or 0)"
    )
    assert done.returncode == 0, done.stderr
    for flag in ("--host", "--model-repository", "--api-keys", "--max-queue"):
        assert flag in done.stdout


def command(*flags: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "patchsight_serve", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_no_encoder_is_explained(tmp_path: Path) -> None:
    done = command("--model-repository", str(tmp_path))
    assert done.returncode == 1
    assert f"--model-repository {tmp_path} has no encoder" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_wrong_flag_is_explained() -> None:
    done = command("--max-batch", "none")
    assert done.returncode == 2
    assert "max_batch" in done.stderr
    assert "Traceback" not in done.stderr
