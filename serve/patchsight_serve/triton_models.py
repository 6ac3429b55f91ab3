"""Bundles as a model repository of Triton: for its python backend, or with TensorRT. A repository of bundles is already
one for Triton's onnxruntime backend as it is."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from patchsight_serve.errors import Conflict
from patchsight_serve.manifest import load_manifest
from patchsight_serve.triton_config import Backend, config_pbtxt

PYTHON_MODEL = Path(__file__).with_name("triton_python_model.py")


def write_triton_models(
    bundles: Sequence[Path], folder: Path, backend: Backend, tensorrt_cache: str | None = None
) -> list[Path]:
    """One model per bundle in `folder`: config.pbtxt, 1/model.onnx, and 1/model.py for the python backend.

    A graph is linked where that is possible and copied where it is not. A model appears whole or not at all, and what
    was there under its name is replaced: it holds nothing that the bundle does not.

    Raises:
        BundleError: a bundle is damaged; nothing is written for any of them then.
        Conflict: a folder of that name is there and holds something that this function did not write.
    """
    manifests = [(bundle, load_manifest(bundle)) for bundle in bundles]
    written = []
    for bundle, manifest in manifests:
        target = folder / manifest.name
        if target.exists() and not (target / "config.pbtxt").is_file():
            raise Conflict(f"{target} is there, and is no model of Triton: choose another folder")
        if target.exists() and target.resolve() == bundle.resolve():
            raise Conflict(f"{target} is the bundle itself: choose another folder")
        partial = folder / f".{manifest.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "1").mkdir(parents=True)
        (partial / "config.pbtxt").write_text(config_pbtxt(manifest, backend, tensorrt_cache))
        _link(bundle / "1" / "model.onnx", partial / "1" / "model.onnx")
        if backend == "python":
            shutil.copyfile(PYTHON_MODEL, partial / "1" / "model.py")
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        written.append(target)
    return written


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
