"""Is a bundle what it says? Its files against each other, and its graph by what it computes.

Needs no torch, so that it can be asked where the bundle is served. That the numbers are those of the trained encoder
was shown when it was exported; here it is shown that they are still numbers, and depend on the image alone.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from patchsight_serve.encoder import Pixels, Values
from patchsight_serve.errors import BundleError
from patchsight_serve.manifest import Manifest
from patchsight_serve.ort_encoder import OrtEncoder
from patchsight_serve.trial_pictures import BATCHES, noise, photos, unseen_sizes
from patchsight_serve.triton_config import manifest_of

LIMIT = 1e-4  # of max|a − b| / max|b|, of an image alone and in a batch


def check(bundle: Path) -> list[str]:
    """What was found, a line each.

    Raises:
        BundleError: a file is missing or was changed, files contradict each other, the graph does not load, or what it
            computes is not finite, not an attention, or depends on the batch.
    """
    encoder = OrtEncoder(bundle, threads=None)  # the manifest, the sha256, the metadata inside, the signature
    manifest = encoder.manifest
    _check_triton(bundle, manifest)
    lines = [
        f"sha256 {manifest.sha256}",
        f"encoder.json, the graph's metadata and config.pbtxt agree; {len(manifest.outputs)} outputs, computed in "
        f"{manifest.precision}",
    ]
    for kind, images in (("noise", noise(manifest.transform.crop)), ("photos", photos(manifest.transform))):
        worst = max(_differences(encoder, images))
        if not worst <= LIMIT:
            raise BundleError(
                f"{manifest.name}: on {kind} an image alone and in a batch differ by {worst:.2g} of the largest value, "
                f"the limit is {LIMIT:g}"
            )
        lines.append(
            f"{kind}, batches of {', '.join(map(str, BATCHES))}: finite; alone and in a batch within {worst:.1e}"
        )
    if manifest.dynamic_size:
        lines.append(_check_sizes(encoder))
    return lines


def _check_sizes(encoder: OrtEncoder) -> str:
    manifest, step = encoder.manifest, encoder.manifest.size_step
    sizes = unseen_sizes(manifest)
    for height, width in sizes:
        try:
            found = encoder.run(noise(height, 2, width), list(manifest.outputs))
        except Exception as error:  # ONNX Runtime's exceptions have no common base
            raise BundleError(f"{manifest.name}: cannot run pictures of {height} × {width} pixels: {error}") from error
        for name, shape in manifest.outputs_on(height // step, width // step).items():
            _check_values(manifest, name, found[name], (2, *shape))
    return f"takes any size, tried on {', '.join(f'{height} × {width}' for height, width in sizes)}: finite"


def _check_triton(bundle: Path, manifest: Manifest) -> None:
    path = bundle / "config.pbtxt"
    if not path.is_file():
        raise BundleError(f"{manifest.name}: config.pbtxt is missing, Triton cannot serve it; export the encoder again")
    try:
        told = manifest_of(text_format.Parse(path.read_text(), ModelConfig()))
    except text_format.ParseError as error:
        raise BundleError(f"{manifest.name}: config.pbtxt is no configuration of a model: {error}") from None
    if told is None or told.metadata() != manifest.metadata() or told.sha256 != manifest.sha256:
        raise BundleError(f"{manifest.name}: config.pbtxt tells of another encoder; export the encoder again")


def _differences(encoder: OrtEncoder, images: Pixels) -> Iterator[float]:
    """max|a − b| / max|b| of each batch size and output, a from images one by one."""
    outputs = list(encoder.manifest.outputs)
    alone = [encoder.run(images[i : i + 1], outputs) for i in range(len(images))]
    for batch in BATCHES:
        together = encoder.run(images[:batch], outputs)
        for name in outputs:
            values = together[name]
            _check_values(encoder.manifest, name, values, (batch, *encoder.manifest.outputs[name]))
            single = np.concatenate([run[name] for run in alone[:batch]])
            yield float(np.abs(single - values).max() / max(np.abs(values).max(), np.finfo(np.float32).tiny))


def _check_values(manifest: Manifest, name: str, values: Values, shape: tuple[int, ...]) -> None:
    if values.shape != shape or values.dtype != np.float32:
        raise BundleError(f"{manifest.name}: {name} is {values.dtype} {values.shape}, not float32 {shape}")
    if not np.isfinite(values).all():
        raise BundleError(f"{manifest.name}: {name} holds a value that is not finite")
    if name == "attention" and not (values.min() >= 0 and values.sum(axis=(2, 3)).max() <= 1 + 1e-5):
        raise BundleError(
            f"{manifest.name}: attention is not one: values from {values.min():.3g}, sums up to "
            f"{values.sum(axis=(2, 3)).max():.3g}"
        )
