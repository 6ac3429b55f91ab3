"""Nothing of patchsight tells others of its use. ONNX Runtime and OpenVINO would: at their import they write a number
for the machine below the home folder. So a home that stays empty shows that they were told not to."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from patchsight_serve.dataset import read_dataset
from patchsight_serve.sample_gallery import SAMPLES

ROOT = Path(__file__).resolve().parents[2]
ENCODER = ROOT / "model_repository" / "dino-vit-cifar10"
MODEL = ROOT / "serve" / "patchsight_serve" / "triton_python_model.py"
# In Triton's stub the file is run alone, with nothing of ours and this module of Triton's.
ON_TRITON = f"""
import runpy, sys, types
sys.modules["triton_python_backend_utils"] = types.ModuleType("triton_python_backend_utils")
runpy.run_path({str(MODEL)!r})
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home folder, and an environment that does not itself keep ONNX Runtime quiet, as `CI` would."""
    for name in list(os.environ):
        if name.startswith(("ORT_", "XDG_")) or name == "CI":
            monkeypatch.delenv(name)
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    return folder


def files(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("engine", "name"), [("onnxruntime", ".onnxruntime/deviceid"), ("openvino", "openvino_ga_cid")]
)
def test_left_alone_an_engine_numbers_the_machine(home: Path, engine: str, name: str) -> None:
    """Without this, the others could not fail."""
    subprocess.run([sys.executable, "-c", f"import {engine}"], check=True)
    assert any(file.endswith(name) for file in files(home))


@pytest.mark.parametrize("package", ["patchsight_serve", "patchsight_export", "patchsight_train"])
def test_after_any_of_our_packages_they_are_quiet(home: Path, package: str) -> None:
    subprocess.run([sys.executable, "-c", f"import {package}, onnxruntime, openvino"], check=True)
    assert files(home) == []


def test_on_triton_it_is_quiet(home: Path) -> None:
    subprocess.run([sys.executable, "-c", ON_TRITON], check=True)
    assert files(home) == []


def test_a_server_leaves_nothing_at_home(home: Path, serve: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / ENCODER.name).symlink_to(ENCODER)
    url = serve("--model-repository", tmp_path / "models", "--no-sample-gallery")
    photo = read_dataset(SAMPLES).read(0)
    assert httpx.post(f"{url}/embed", content=photo).status_code == 200
    assert httpx.post(f"{url}/gallery/images", content=photo).status_code == 200
    assert files(home) == []
