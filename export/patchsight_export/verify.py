"""Does the graph compute what torch computes? Nothing is published that does not pass."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from torch import nn

from patchsight_serve.dataset import read_dataset
from patchsight_serve.decode import decode
from patchsight_serve.errors import BundleError
from patchsight_serve.manifest import Transform

LIMIT = 1e-4  # of max|a − b| / max|b|, per output
BATCHES = (1, 3, 8)

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
Values = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class Check:
    """One comparison: `error` is max|a − b| / max|b|, with a from ONNX Runtime."""

    what: str
    output: str
    error: float


def photos(transform: Transform, count: int = max(BATCHES)) -> Pixels:
    """uint8 `(count, S, S, 3)`: real pictures, from the server's sample gallery, spread over its classes."""
    with as_file(files("patchsight_serve") / "samples" / "clothing.parquet") as path:
        samples = read_dataset(path)
        chosen = np.linspace(0, len(samples) - 1, count).round().astype(int)
        return np.stack([decode(samples.read(i), transform) for i in chosen])


def noise(size: int, count: int = max(BATCHES)) -> Pixels:
    """uint8 `(count, size, size, 3)`, every pixel at random, the same in every run."""
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def verify(
    model: bytes, served: nn.Module, outputs: Mapping[str, tuple[int, ...]], pictures: Mapping[str, Pixels]
) -> list[Check]:
    """Compare the ONNX file with the module it was made of.

    model: the whole file.
    served: the module; gives its outputs in the order of `outputs`.
    outputs: names and shapes without the batch axis, as in `Manifest.outputs`.
    pictures: by name, at least 8 images each.

    Returns one check for each kind of picture, batch size and output.

    Raises:
        BundleError: the file is not valid ONNX, ONNX Runtime cannot run it, an output has another shape, or a value
            differs by more than `LIMIT`, from torch or between an image alone and the same image in a batch.
    """
    session = _load(model)
    checks = []
    for kind, images in pictures.items():
        whole = _run(session, images[: max(BATCHES)], outputs)
        for batch in BATCHES:
            found, wanted = _run(session, images[:batch], outputs), _torch(served, images[:batch])
            checks += _compare(f"torch, {kind}, batch {batch}", outputs, found, wanted)
        alone = [_run(session, images[i : i + 1], outputs) for i in range(max(BATCHES))]
        joined = [np.concatenate(values) for values in zip(*alone, strict=True)]
        checks += _compare(f"one by one, {kind}", outputs, joined, whole)
    if failed := [c for c in checks if not c.error <= LIMIT]:  # also where the error is NaN
        worst = max(failed, key=lambda c: np.nan_to_num(c.error, nan=np.inf))
        raise BundleError(
            f"not published: {worst.output} differs by {worst.error:.2g} of its largest value ({worst.what}), the "
            f"limit is {LIMIT:g}; {len(failed)} of {len(checks)} comparisons fail"
        )
    return checks


def _load(model: bytes) -> ort.InferenceSession:
    try:
        onnx.checker.check_model(model, full_check=True)
        options = ort.SessionOptions()
        options.log_severity_level = 3  # errors
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # neither library's exceptions have a base that leaves out the rest
        raise BundleError(f"not published: the ONNX file is not valid: {error}") from error


def _run(session: ort.InferenceSession, images: Pixels, outputs: Mapping[str, tuple[int, ...]]) -> list[Values]:
    try:
        values = session.run(list(outputs), {"image": images})
    except Exception as error:  # ONNX Runtime's exceptions have no common base
        raise BundleError(f"not published: ONNX Runtime cannot run a batch of {len(images)}: {error}") from error
    for (name, shape), value in zip(outputs.items(), values, strict=True):
        if value.dtype != np.float32 or value.shape != (len(images), *shape):
            raise BundleError(
                f"not published: {name} is {value.dtype} {value.shape} instead of float32 {(len(images), *shape)}"
            )
    return list(values)


def _torch(served: nn.Module, images: Pixels) -> list[Values]:
    with torch.no_grad():
        return [value.numpy() for value in served(torch.from_numpy(images))]


def _compare(what: str, names: Mapping[str, Any], found: Sequence[Values], wanted: Sequence[Values]) -> list[Check]:
    with np.errstate(invalid="ignore", divide="ignore"):  # NaN is a failure like any other
        return [
            Check(what, name, float(np.abs(a - b).max() / np.abs(b).max()))
            for name, a, b in zip(names, found, wanted, strict=True)
        ]
