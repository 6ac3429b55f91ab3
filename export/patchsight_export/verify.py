"""Does the graph compute what torch computes? Nothing is published that does not pass."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from torch import nn

from patchsight_serve.encoder import Pixels, Values
from patchsight_serve.errors import BundleError
from patchsight_serve.trial_pictures import BATCHES

LIMIT = 1e-4  # of max|a − b| / max|b|, per output


@dataclass(frozen=True)
class Check:
    """One comparison: `error` is max|a − b| / max|b|, with a from ONNX Runtime."""

    what: str
    output: str
    error: float


def verify(
    model: bytes, served: nn.Module, outputs: Mapping[str, tuple[int, ...]], pictures: Mapping[str, Pixels],
    others: Mapping[str, tuple[Mapping[str, tuple[int, ...]], Pixels]] | None = None,
) -> list[Check]:  # fmt: skip
    """Compare the ONNX file with the module it was made of.

    model: the whole file.
    served: the module; gives its outputs in the order of `outputs`.
    outputs: names and shapes without the batch axis, as in `Manifest.outputs`.
    pictures: by name, at least 8 images each.
    others: by name, images of another size, and the outputs' shapes for it; compared with torch in one batch.

    Returns one check for each kind of picture, batch size and output.

    Raises:
        BundleError: the file is not valid ONNX, ONNX Runtime cannot run it, an output has another shape, or a value
            differs by more than `LIMIT`, from torch or between an image alone and the same image in a batch.
    """
    session = load(model)
    checks = []
    for kind, images in pictures.items():
        apart = alone(session, kind, images, outputs)
        for batch in BATCHES:
            found, wanted = _run(session, images[:batch], outputs), _torch(served, images[:batch])
            checks += _compare(f"torch, {kind}, batch {batch}", outputs, found, wanted)
        checks += apart
    for kind, (shapes, images) in (others or {}).items():
        checks += _compare(kind, shapes, _run(session, images, shapes), _torch(served, images))
    refuse(checks)
    return checks


def alone(
    session: ort.InferenceSession, kind: str, images: Pixels, outputs: Mapping[str, tuple[int, ...]]
) -> list[Check]:
    """The same images one by one and in a batch, by output. Raises BundleError as `verify`, but for the limit."""
    whole = _run(session, images[: max(BATCHES)], outputs)
    single = [_run(session, images[i : i + 1], outputs) for i in range(max(BATCHES))]
    joined = [np.concatenate(values) for values in zip(*single, strict=True)]
    return _compare(f"one by one, {kind}", outputs, joined, whole)


def refuse(checks: Sequence[Check]) -> None:
    """Raises BundleError where a value differs by more than `LIMIT`."""
    if failed := [c for c in checks if not c.error <= LIMIT]:  # also where the error is NaN
        worst = max(failed, key=lambda c: np.nan_to_num(c.error, nan=np.inf))
        raise BundleError(
            f"not published: {worst.output} differs by {worst.error:.2g} of its largest value ({worst.what}), the "
            f"limit is {LIMIT:g}; {len(failed)} of {len(checks)} comparisons fail"
        )


def load(model: bytes, provider: str = "CPUExecutionProvider") -> ort.InferenceSession:
    """A session of the file. Raises BundleError if it is not valid ONNX, or this provider cannot run it."""
    try:
        onnx.checker.check_model(model, full_check=True)
        options = ort.SessionOptions()
        options.log_severity_level = 3  # errors
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = ort.InferenceSession(model, options, providers=[provider])
    except Exception as error:  # neither library's exceptions have a base that leaves out the rest
        raise BundleError(f"not published: the ONNX file is not valid: {error}") from error
    if provider not in session.get_providers():  # ONNX Runtime goes on without it, and says nothing
        raise BundleError(f"not published: ONNX Runtime has no usable {provider} here")
    return session


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
