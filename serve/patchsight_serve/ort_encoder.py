"""An encoder in this process, run by ONNX Runtime."""

import contextlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnxruntime as ort

from patchsight_serve.encoder import Pixels, Values
from patchsight_serve.errors import BundleError
from patchsight_serve.manifest import METADATA_KEY, Manifest, load_manifest

ERROR_SEVERITY = 3
CUDA = "CUDAExecutionProvider"
OPTIONS = {CUDA: {
    # Batches are of any size: to try every algorithm for each new one would hold requests up.
    "cudnn_conv_algo_search": "HEURISTIC",
}}  # fmt: skip


class OrtEncoder:
    """A bundle's graph, loaded and checked against its manifest.

    bundle: the folder `model_repository/<name>`.
    threads: of one run; None takes one per core.
    providers: ONNX Runtime's execution providers, best first. Every one of them must be usable.

    Raises:
        BundleError: the bundle is damaged, its ONNX file says something else than encoder.json, or a provider is
            missing. ONNX Runtime itself would go on with the next provider, and be slow without saying so.
    """

    def __init__(
        self, bundle: Path, threads: int | None = None, providers: Sequence[str] = ("CPUExecutionProvider",)
    ) -> None:
        self.manifest: Manifest = load_manifest(bundle)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.log_severity_level = ERROR_SEVERITY
        # Spinning threads fight with decoding and with the event loop for the cores, and lose.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        _require(providers, ort.get_available_providers(), bundle.name)
        missing = _load_cuda() if CUDA in providers else ""
        try:
            self._session = ort.InferenceSession(
                (bundle / "1" / "model.onnx").read_bytes(), options, providers=list(providers),
                provider_options=[OPTIONS.get(provider, {}) for provider in providers],
            )  # fmt: skip
        except Exception as error:  # ONNX Runtime's exceptions have no common base
            needs = "; bf16 needs a GPU" if self.manifest.precision == "bf16" else ""
            raise BundleError(f"{bundle.name}: ONNX Runtime cannot load 1/model.onnx: {error}{needs}") from error
        _require(providers, self._session.get_providers(), bundle.name, missing)
        self._check_metadata()
        self._check_signature()

    def run(self, images: Pixels, outputs: Sequence[str]) -> dict[str, Values]:
        """As in `Encoder`."""
        return dict(zip(outputs, self._session.run(list(outputs), {"image": images}), strict=True))

    def _check_metadata(self) -> None:
        inside = self._session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
        if inside is None:
            raise BundleError(f"{self.manifest.name}: 1/model.onnx has no metadata {METADATA_KEY!r}; export it again")
        told, found = json.loads(self.manifest.metadata()), _object(inside)
        if different := sorted(key for key in told | found if told.get(key) != found.get(key)):
            key = different[0]
            raise BundleError(
                f"{self.manifest.name}: encoder.json says {key} = {told.get(key)!r}, "
                f"the ONNX file says {found.get(key)!r}"
            )

    def _check_signature(self) -> None:
        manifest = self.manifest
        side = None if manifest.dynamic_size else manifest.transform.crop  # an axis of no size has a name
        inputs = {i.name: (i.type, i.shape[1:]) for i in self._session.get_inputs()}
        sizes = {n: (kind, [s if isinstance(s, int) else None for s in shape]) for n, (kind, shape) in inputs.items()}
        if sizes != {"image": ("tensor(uint8)", [side, side, 3])}:
            told = "[N, H, W, 3]" if side is None else f"[N, {side}, {side}, 3]"
            raise BundleError(f"{manifest.name}: the graph's input is {inputs}, not uint8 {told}")
        have = {o.name: (o.type, len(o.shape)) for o in self._session.get_outputs()}
        for name, shape in self.manifest.outputs.items():
            if have.get(name) != ("tensor(float)", len(shape) + 1):
                raise BundleError(f"{self.manifest.name}: output {name!r} is {have.get(name)}, not float [N, {shape}]")


def _require(providers: Sequence[str], usable: Sequence[str], name: str, why: str = "") -> None:
    if missing := sorted(set(providers) - set(usable)):
        raise BundleError(f"{name}: ONNX Runtime has no usable {', '.join(missing)} on this machine{why}")


def _load_cuda() -> str:
    """Find CUDA's and cuDNN's libraries in NVIDIA's wheels; what is missing of them, for the end of a message."""
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        ort.preload_dlls()
    first = next((line for line in told.getvalue().splitlines() if line.startswith("Failed")), "")
    return f": {first}; pip install 'patchsight[gpu]'" if first else ": is there an NVIDIA GPU, and its driver?"


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
