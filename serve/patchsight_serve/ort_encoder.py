"""An encoder in this process, run by ONNX Runtime."""

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnxruntime as ort

from patchsight_serve.encoder import Pixels, Runtime, Values
from patchsight_serve.errors import BundleError
from patchsight_serve.graph_check import Port, check_graph
from patchsight_serve.manifest import METADATA_KEY, Manifest, read_bundle

ERROR_SEVERITY = 3
KINDS = {"tensor(uint8)": "uint8", "tensor(float)": "float32"}
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
        manifest, graph = read_bundle(bundle)
        self.manifest: Manifest = manifest
        self.runtime = Runtime("onnxruntime", manifest.precision)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.log_severity_level = ERROR_SEVERITY
        # Spinning threads fight with decoding and with the event loop for the cores, and lose.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        _require(providers, ort.get_available_providers(), bundle.name)
        missing = _load_cuda() if CUDA in providers else ""
        try:
            self._session = ort.InferenceSession(
                graph, options, providers=list(providers),
                provider_options=[OPTIONS.get(provider, {}) for provider in providers],
            )  # fmt: skip
        except Exception as error:  # ONNX Runtime's exceptions have no common base
            needs = "; bf16 needs a GPU" if self.manifest.precision == "bf16" else ""
            raise BundleError(f"{bundle.name}: ONNX Runtime cannot load 1/model.onnx: {error}{needs}") from error
        _require(providers, self._session.get_providers(), bundle.name, missing)
        self._check()

    def run(self, images: Pixels, outputs: Sequence[str]) -> dict[str, Values]:
        """As in `Encoder`."""
        return dict(zip(outputs, self._session.run(list(outputs), {"image": images}), strict=True))

    def _check(self) -> None:
        inside = self._session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
        check_graph(self.manifest, inside, _ports(self._session.get_inputs()), _ports(self._session.get_outputs()))


def _ports(arguments: Sequence[Any]) -> dict[str, Port]:
    """An axis of no fixed size has a name there, or none."""
    return {
        a.name: Port(KINDS.get(a.type, a.type), tuple(s if isinstance(s, int) else None for s in a.shape))
        for a in arguments
    }


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
