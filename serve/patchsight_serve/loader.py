"""Loads bundles onto the engine that the settings ask for, or that a short trial finds to be the faster one.

No trial changes an encoder's numbers unasked: OpenVINO in fp32 is taken where it gives ONNX Runtime's numbers, and bf16
only where somebody asked for it, and where the embeddings point in the same direction.
"""

import logging
import os
import platform
from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from patchsight_serve.encoder import Encoder
from patchsight_serve.errors import BundleError, PatchsightError
from patchsight_serve.manifest import Manifest, load_manifest
from patchsight_serve.openvino_encoder import OpenvinoEncoder, Precision
from patchsight_serve.ort_encoder import OrtEncoder
from patchsight_serve.repository import PROVIDERS, needed_bundles
from patchsight_serve.settings import ServeSettings
from patchsight_serve.trial import Trial, compare
from patchsight_serve.trial_record import TrialRecord

logger = logging.getLogger(__name__)

FASTER = 1.1  # times, from which on OpenVINO is worth it
SAME = 1e-4  # of the largest value: as far as the same numbers may be apart
LEAST_COSINE = 0.999  # of bf16's embeddings to those in fp32
RECORD = "engines.json"  # in the state's folder


class Loader:
    """Remembers its trials in `settings.state_dir`."""

    def __init__(self, settings: ServeSettings) -> None:
        self._settings = settings
        self._record = TrialRecord(settings.state_dir / RECORD)

    def load(self, bundle: Path) -> Encoder:
        """The encoder, on its engine.

        Raises:
            BundleError: the bundle is damaged, or what `--engine`, `--device` or `--inference-precision` asks for is
                not to be had on this machine.
        """
        asked = self._settings
        if asked.inference_precision == "bf16":
            return self._in_bf16(bundle)
        if asked.engine == "openvino":
            return self._tried(bundle, "fp32")[0]
        if asked.engine == "auto" and asked.device == "cpu" and find_spec("openvino") is not None:
            return self._faster(bundle)
        return self._on_onnxruntime(bundle)

    def changes(self, known: Mapping[str, Manifest]) -> dict[str, Encoder | PatchsightError | None]:
        """As `reload.Source`: what the model repository holds, beside what is known of it.

        Raises BundleError if it holds nothing.
        """
        found: dict[str, Encoder | PatchsightError | None] = {}
        for bundle in needed_bundles(self._settings.model_repository):
            try:
                same = load_manifest(bundle) == known.get(bundle.name)
                found[bundle.name] = None if same else self.load(bundle)
            except PatchsightError as error:
                found[bundle.name] = error
            except OSError as error:  # it went while it was read
                found[bundle.name] = BundleError(f"{bundle.name}: {error}")
        return found

    def _on_onnxruntime(self, bundle: Path) -> OrtEncoder:
        return OrtEncoder(bundle, self._settings.threads, (PROVIDERS[self._settings.device],))

    def _in_bf16(self, bundle: Path) -> Encoder:
        encoder, trial = self._tried(bundle, "bf16")
        if trial.cosine >= LEAST_COSINE:
            return encoder
        logger.warning(
            "encoder %s stays in fp32: in bf16 its embeddings have a cosine of %.5f to those in fp32, %g is the least",
            bundle.name, trial.cosine, LEAST_COSINE,
        )  # fmt: skip
        return self._tried(bundle, "fp32")[0] if self._settings.engine == "openvino" else self._faster(bundle)

    def _faster(self, bundle: Path) -> Encoder:
        manifest = load_manifest(bundle)
        known = self._record.get(self._key(manifest, "fp32"))
        if known is not None and not _worth_it(known):
            return self._on_onnxruntime(bundle)
        try:
            encoder, trial = self._tried(bundle, "fp32")
        except BundleError as error:
            fallback = self._on_onnxruntime(bundle)  # a damaged bundle ends here
            logger.warning("encoder %s stays with ONNX Runtime: %s", bundle.name, error.message)
            return fallback
        return encoder if _worth_it(trial) else self._on_onnxruntime(bundle)

    def _tried(self, bundle: Path, precision: Precision) -> tuple[Encoder, Trial]:
        """On OpenVINO, and what that is beside ONNX Runtime in fp32."""
        encoder = OpenvinoEncoder(bundle, self._settings.threads, precision)
        key = self._key(encoder.manifest, precision)
        trial = self._record.get(key)
        if trial is None:
            reference = OrtEncoder(bundle, self._settings.threads)
            if reference.manifest != encoder.manifest:
                raise BundleError(f"{bundle.name}: was replaced while it was loaded")
            try:
                trial = compare(reference, encoder)
            except RuntimeError as error:  # OpenVINO's
                raise BundleError(f"{bundle.name}: OpenVINO cannot run 1/model.onnx: {error}") from error
            self._record.put(key, trial)
            logger.info(
                "encoder %s: OpenVINO in %s is %.2f times as fast as ONNX Runtime; its numbers are within %.1e of the "
                "largest, cosine %.6f", bundle.name, precision, trial.speed, trial.difference, trial.cosine,
            )  # fmt: skip
        encoder.runtime = replace(encoder.runtime, cosine=round(trial.cosine, 6))
        return encoder, trial

    def _key(self, manifest: Manifest, precision: str) -> str:
        """Everything that a trial depends on."""
        threads = self._settings.threads or os.cpu_count()
        return f"{manifest.sha256} {precision} · {processor()} · threads {threads} · {_versions()}"


def _worth_it(trial: Trial) -> bool:
    return trial.speed >= FASTER and trial.difference <= SAME


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Its name, and a digest of what it can do: virtual machines with bf16 and without have the same name."""
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    told = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = told.get("model name") or platform.processor() or platform.machine()
    flags = told.get("flags") or told.get("Features", "")  # x86, Arm
    return f"{name} {sha256(flags.encode()).hexdigest()[:8]}"


def _versions() -> str:
    found = []
    for package in ("onnxruntime-gpu", "onnxruntime", "openvino"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)
