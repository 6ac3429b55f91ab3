"""`--precision`: the fp32 graph becomes one in fp16, bf16 or int8, is judged against it, and only then published.

It is made of the graph, not of the module: so a bundle that is published already will do as well as a run.
"""

import hashlib
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import onnx
import onnxruntime as ort
from rich.console import Console

from patchsight_export.agreement import Judges, agreement, check, table
from patchsight_export.half_compute import to_half
from patchsight_export.half_range import check_range
from patchsight_export.half_weights import store_half
from patchsight_export.quantization import to_int8
from patchsight_export.settings import ExportSettings
from patchsight_export.to_onnx import strip, with_metadata
from patchsight_export.verify import alone, load, refuse
from patchsight_serve.encoder import Pixels
from patchsight_serve.errors import BundleError, InvalidRequest
from patchsight_serve.manifest import Manifest, Transform
from patchsight_serve.trial_pictures import noise, photos
from patchsight_train.data import sample_images

CPU, GPU = "CPUExecutionProvider", "CUDAExecutionProvider"
CALIBRATING = 256  # images that int8's ranges are learned from
JUDGING = 1000  # images, others than those, that the result is judged on
LEAST = 64  # images to calibrate and judge with
RANGE = 64  # of those, that fp16's range is tried on
SAMPLES = 200  # photos of the sample gallery, that judge where no images are given
FOR_A_BUNDLE = {"source", "bundle", "precision", "calibrate", "weights", "config"}  # what can be said of one


def check_combination(settings: ExportSettings, published: bool) -> None:
    """Raises InvalidRequest for settings that contradict each other. published: whether the source is a bundle."""
    if settings.precision == "fp32":
        if published:
            raise InvalidRequest(
                f"{settings.source} is a bundle already; --precision fp16, bf16 or int8 makes another one of it"
            )
        if settings.calibrate is not None:
            raise InvalidRequest("--calibrate is for --precision fp16, bf16 and int8; fp32 has nothing to calibrate")
        return
    if settings.weights != "fp32":
        raise InvalidRequest(
            f"--weights {settings.weights} is for graphs that compute in fp32; --precision {settings.precision} stores "
            "its weights as it computes"
        )
    if settings.precision == "int8" and settings.calibrate is None:
        raise InvalidRequest(
            f"--precision int8 needs --calibrate IMAGES: a folder or Parquet with {LEAST} images or more like those to "
            "come, from which it learns the range of each activation"
        )
    if published and (other := sorted(settings.model_fields_set - FOR_A_BUNDLE)):
        raise InvalidRequest(
            f"--{other[0].replace('_', '-')} cannot be had of a bundle, whose graph is converted as it is; export the "
            "run folder with it"
        )


def at_precision(
    model: onnx.ModelProto, manifest: Manifest, settings: ExportSettings, console: Console
) -> tuple[Manifest, bytes]:
    """The file at `settings.precision`, and its manifest. Prints what it is worth.

    model: the graph in fp32. manifest: its manifest, with the name of the new bundle.

    Raises:
        InvalidRequest: too few images, or a weight beyond the range of fp16.
        BundleError: ONNX Runtime cannot run it here, a number is beyond the range of fp16 or not finite, an image
            alone differs from the same image in a batch, or the result is too far from fp32.
    """
    precision = cast(Literal["fp16", "bf16", "int8"], settings.precision)
    calibrating, judges, told = read_images(settings, manifest.transform, console)
    low = to_int8(model, calibrating) if precision == "int8" else to_half(model, precision)
    if precision == "fp16":
        check_range(model, low, np.concatenate([noise(manifest.transform.crop), judges.images[:RANGE]]))
    strip(low)
    store_half(low)
    line = f"# computes in {precision}{told}\n"
    lowered = manifest.model_copy(update={"precision": precision, "recipe": line + manifest.recipe, "measured": {}})
    content, original = with_metadata(low, lowered.metadata()), model.SerializeToString(deterministic=True)
    figures = judge(original, content, lowered, judges)
    console.print(table(precision, figures), markup=False, highlight=False, soft_wrap=True)
    check(precision, figures)
    sha256 = hashlib.sha256(content).hexdigest()
    return lowered.model_copy(update={"sha256": sha256, "measured": {"precision": figures}}), content


def judge(original: bytes, content: bytes, manifest: Manifest, judges: Judges) -> dict[str, Any]:
    """Figures of a file against that of the same encoder in fp32. Raises BundleError as `at_precision`."""
    (low, provider), outputs = load_here(content, manifest.precision), manifest.outputs
    figures = agreement(load(original, provider), low, outputs, f"{manifest.recommended}_embedding", judges)
    if provider == GPU:
        del figures["speed"]  # which is of CPU time
    trials = {"noise": noise(manifest.transform.crop), "photos": photos(manifest.transform)}
    refuse([check for kind, images in trials.items() for check in alone(low, kind, images, outputs)])
    return {"bytes": len(content), "fp32_bytes": len(original), "engine": provider} | figures


def load_here(content: bytes, precision: str) -> tuple[ort.InferenceSession, str]:
    """A session of the graph on this machine's CPU, or for bf16, which has no kernels there, on its GPU; and the
    provider.

    Raises:
        BundleError: neither can run it; nothing is published that was never run.
    """
    try:
        return load(content), CPU
    except BundleError as error:
        if precision != "bf16":
            raise
        ort.set_default_logger_severity(4)  # that there is no GPU is told below
        try:
            return load(content, GPU), GPU
        except BundleError:
            raise BundleError(
                "not published: ONNX Runtime has no bf16 on CPUs, and no GPU can be used here, so that the graph could "
                "not be tried. Export it where the CUDA provider runs, or use --precision fp16, which runs on both. "
                f"({error.__cause__})"
            ) from None
        finally:
            ort.set_default_logger_severity(2)


def read_images(settings: ExportSettings, transform: Transform, console: Console) -> tuple[Pixels, Judges, str]:
    """What int8 calibrates with, the images that judge, and a word about the former for the recipe.

    Raises as `sample_images`; InvalidRequest for fewer than `LEAST` images.
    """
    if settings.calibrate is None:
        judges = photos(transform, SAMPLES)
        return judges[:0], Judges(judges, None), ""
    found = sample_images([settings.calibrate], transform.crop, CALIBRATING + JUDGING, console)
    if len(found) < LEAST:
        raise InvalidRequest(f"--calibrate {settings.calibrate}: {len(found)} images can be read, {LEAST} are needed")
    images = np.ascontiguousarray(found.pixels.permute(0, 2, 3, 1).numpy())
    labels = None if found.labels is None else found.labels.numpy()
    if settings.precision != "int8":
        return images[:0], Judges(images, labels), ""
    # Spread over the set, which may lie class after class.
    chosen = np.linspace(0, len(images) - 1, min(CALIBRATING, len(images) // 4)).round().astype(int)
    rest = np.setdiff1d(np.arange(len(images)), chosen)
    told = f", ranges learned from {len(chosen)} images of {Path(settings.calibrate).name}"
    return images[chosen], Judges(images[rest], None if labels is None else labels[rest]), told
