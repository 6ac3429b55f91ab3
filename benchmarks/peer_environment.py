"""An environment of its own for each peer, under `.peers/`, made by uv when it is first needed."""

import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import onnxruntime
from measure import ROOT

FOLDER = ROOT / ".peers"
PACKAGES = {
    "fastapi": ["fastapi", "uvicorn[standard]", "python-multipart"],
    "litserve": ["litserve", "python-multipart"],
    "bentoml": ["bentoml"],
    "ray_serve": ["ray[serve]"],
    "triton": ["nvidia-pytriton"],
    "usearch": ["usearch"],
    "milvus_lite": ["milvus-lite", "pymilvus"],
    "pgvector": ["pgserver", "psycopg[binary]", "pgvector"],  # pgserver: a PostgreSQL with the extension in it
}
STORES = ("usearch", "milvus_lite", "pgvector")  # of vectors: they see no image and run no encoder
PROBE = "import importlib.metadata as m, sys; print(m.version(sys.argv[1]))"


def python_of(peer: str) -> Path:
    """The interpreter of a peer's environment, with numpy at our own version, and for whoever runs an encoder the
    decoder's and the engine's packages.

    Raises RuntimeError with uv's words where it cannot be made.
    """
    folder = FOLDER / peer
    python, built = folder / "bin" / "python", folder / ".built"
    wanted = "\n".join(_requirements(peer))
    if built.exists() and built.read_text() == wanted:
        return python
    _uv("venv", "--allow-existing", "--python", sys.executable, str(folder))
    install = ("pip", "install", "--python", str(python))
    if peer == "triton":  # of nvidia-pytriton nothing but the server in it is used
        _uv(*install, "--no-deps", *PACKAGES[peer])
        _uv(*install, *_requirements(peer)[:-1])
    else:
        _uv(*install, *_requirements(peer))
    built.write_text(wanted)
    return python


def version_of(peer: str) -> str:
    """Of the package that gives the peer its name."""
    package = PACKAGES[peer][0].partition("[")[0]
    line = [str(python_of(peer)), "-c", PROBE, package]
    return subprocess.run(line, capture_output=True, text=True, check=True).stdout.strip()


def _requirements(peer: str) -> list[str]:
    numpy = "numpy<2" if peer == "triton" else f"numpy=={version('numpy')}"  # its backend gives empty outputs under 2
    if peer in STORES:
        return [numpy, *PACKAGES[peer]]
    common = [numpy, f"pillow=={version('pillow')}", f"pydantic=={version('pydantic')}"]
    return [*common, f"onnxruntime=={onnxruntime.__version__}", *PACKAGES[peer]]


def _uv(*arguments: str) -> None:
    uv = shutil.which("uv") or str(ROOT / ".uv" / "bin" / "uv")
    done = subprocess.run([uv, *arguments, "--quiet"], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"uv {arguments[0]}: {done.stderr.strip()[-300:]}")
