"""The model repository as export writes it: a bundle appears whole or not at all, and its graph never changes.

A bundle is written in `.<name>.partial` beside its place, every file and folder is fsynced, and the folder renamed.
Readers look at nothing that begins with a dot. What a killed export leaves is removed by the next one of that name.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from patchsight_serve.durable import sync
from patchsight_serve.errors import Conflict, InvalidRequest
from patchsight_serve.manifest import BUNDLE_NAME, Manifest, load_manifest
from patchsight_serve.triton_config import config_pbtxt


def check_free(bundle: Path) -> None:
    """Raises InvalidRequest for a path that can be no bundle's, Conflict where something is there already."""
    if ".." in bundle.parts or not BUNDLE_NAME.fullmatch(bundle.name):
        raise InvalidRequest(
            f"{bundle}: not the name of a bundle; write MODEL_REPOSITORY/NAME without `..`, where NAME is of letters, "
            "digits and `._-`, begins with a letter or digit, and has at most 128 characters"
        )
    if bundle.exists() or bundle.is_symlink():
        raise Conflict(f"{bundle} exists, and a bundle never changes: choose another name for the new one")


def publish(bundle: Path, manifest: Manifest, model: bytes) -> None:
    """Write `bundle/{config.pbtxt, encoder.json, 1/model.onnx}`.

    Raises:
        InvalidRequest, Conflict: as `check_free`.
        OSError: a file cannot be written; nothing is left of the bundle.
    """
    check_free(bundle)
    bundle.parent.mkdir(parents=True, exist_ok=True)
    with _alone(bundle.parent):
        check_free(bundle)  # again: another export may just have finished
        partial = bundle.parent / f".{bundle.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            (partial / "1").mkdir(parents=True)
            _write(partial / "1" / "model.onnx", model)
            _write(partial / "encoder.json", _json(manifest))
            _write(partial / "config.pbtxt", config_pbtxt(manifest).encode())
            sync(partial / "1")
            sync(partial)
            partial.rename(bundle)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        sync(bundle.parent)


def record(bundle: Path, measurement: Path) -> None:
    """Put a measurement into `encoder.json`, named as its file: `cifar10-knn.json` is `measured["cifar10-knn"]`.

    Everything else stays, the bundle's identity with it. An older measurement of the same name is replaced.

    Raises:
        BundleError: `bundle` is no bundle, or damaged.
        InvalidRequest: `measurement` is no JSON object, or its `encoder` is another than this bundle.
    """
    try:
        values = json.loads(measurement.read_bytes())
    except FileNotFoundError:
        raise InvalidRequest(f"{measurement}: no such file") from None
    except ValueError as error:
        raise InvalidRequest(f"{measurement}: not JSON: {error}") from None
    if not isinstance(values, dict):
        raise InvalidRequest(f"{measurement}: holds no JSON object")
    if not bundle.is_dir():
        raise InvalidRequest(f"{bundle}: no such bundle; a measurement belongs to one that is published")
    with _alone(bundle.parent):
        manifest = load_manifest(bundle)
        encoder = values.get("encoder")
        if isinstance(encoder, dict) and encoder.get("sha256", manifest.sha256) != manifest.sha256:
            raise InvalidRequest(
                f"{measurement}: its encoder is {encoder.get('name')!r} of sha256 {encoder['sha256']}, but {bundle} "
                f"has sha256 {manifest.sha256}"
            )
        measured = {**manifest.measured, measurement.stem: values}
        partial = bundle / ".encoder.json.partial"
        _write(partial, _json(manifest.model_copy(update={"measured": measured})))
        partial.replace(bundle / "encoder.json")
        sync(bundle)


def _json(manifest: Manifest) -> bytes:
    return (json.dumps(manifest.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n").encode()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One writer at a time; the kernel lets go of the lock when the process ends, however it ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
