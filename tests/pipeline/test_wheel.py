"""`pip install patchsight` alone can serve: the wheel holds the server, one encoder and the sample gallery."""

import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's content in a folder of its own, to be found before the source tree."""
    out = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = out.glob("*.whl")
    site = out / "site"
    zipfile.ZipFile(wheel).extractall(site)
    return site


def test_packages(installed: Path) -> None:
    top = {p.name for p in installed.iterdir() if not p.name.endswith(".dist-info")}
    assert top == {"patchsight_train", "patchsight_export", "patchsight_serve"}  # no generic name in site-packages
    assert len(list(installed.glob("patchsight_serve/model_repository/*/1/model.onnx"))) == 1
    assert (installed / "patchsight_serve/samples/NOTICE").is_file()


def test_serves_from_an_empty_folder(
    installed: Path, serve: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(installed))
    monkeypatch.chdir(tmp_path)
    where = "import patchsight_serve; print(patchsight_serve.__file__)"
    found = subprocess.run([sys.executable, "-c", where], capture_output=True, text=True, check=True, env=os.environ)
    assert Path(found.stdout.strip()).is_relative_to(installed)
    url = serve()
    photo = (ROOT / "docs" / "images" / "shoes.jpg").read_bytes()
    (encoder,) = httpx.get(f"{url}/encoders").json()["encoders"]
    reply = httpx.post(f"{url}/embed", content=photo, headers={"Content-Type": "image/jpeg"}).json()
    assert reply["encoder"]["sha256"] == encoder["sha256"]
    assert encoder["manifest"]["recommended"] == "both"
    assert len(reply["results"][0]["embedding"]) == 2 * encoder["manifest"]["embedding_dim"]


def test_without_an_encoder(tmp_path: Path, command: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    (tmp_path / "empty").mkdir()
    for missing in (tmp_path / "empty", tmp_path / "nowhere"):
        result = command("patchsight-serve", "--model-repository", missing)
        assert result.returncode == 1
        assert f"--model-repository {missing}" in result.stderr
        assert "Traceback" not in result.stderr
