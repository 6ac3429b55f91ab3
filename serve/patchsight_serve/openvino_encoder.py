"""An encoder in this process, run by OpenVINO on the CPU. Needs the extra `openvino`."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np

from patchsight_serve.encoder import Pixels, Runtime, Values
from patchsight_serve.errors import BundleError
from patchsight_serve.graph_check import Port, check_graph
from patchsight_serve.manifest import METADATA_KEY, Manifest, read_bundle

Precision = Literal["fp32", "bf16"]
HINTS = {"fp32": "f32", "bf16": "bf16"}  # OpenVINO's names of them
KINDS = {"u8": "uint8", "f32": "float32"}


class OpenvinoEncoder:
    """A bundle's graph, loaded and checked against its manifest.

    bundle: the folder `model_repository/<name>`.
    threads: of one run; None takes one per core.
    precision: what it computes in, whatever the processor could do; what follows the last block is fp32 in any case.

    Raises:
        BundleError: the bundle is damaged, its ONNX file says something else than encoder.json, OpenVINO is not
            installed or cannot read the graph, or the processor has no bf16. OpenVINO itself would emulate it, thirty
            times slower, and say nothing.
    """

    def __init__(self, bundle: Path, threads: int | None = None, precision: Precision = "fp32") -> None:
        ov = _openvino()
        self.manifest: Manifest
        self.manifest, graph = read_bundle(bundle)
        core = ov.Core()
        if precision == "bf16" and "BF16" not in capabilities(core):
            raise BundleError(
                f"{bundle.name}: this processor computes nothing in bf16 (it has neither AVX512-BF16 nor AMX); "
                "leave --inference-precision at fp32"
            )
        try:
            model = core.read_model(graph)
            self._check(model)
            if precision == "bf16":
                _end_in_fp32(model)
            options = {
                "INFERENCE_PRECISION_HINT": HINTS[precision],  # always: by itself OpenVINO takes bf16 where there is
                "INFERENCE_NUM_THREADS": threads or 0,
                "PERFORMANCE_HINT": "LATENCY",  # one run at a time, by all threads
                "ENABLE_CPU_PINNING": False,  # several encoders, decoding and the event loop share the cores
            }
            # OpenVINO gives the thread that loads a graph another stack for signals. At the graph's end it puts back
            # the one of before, though that may be of a graph that is gone, and the next signal would end the process.
            # A thread of its own has none before.
            with ThreadPoolExecutor(1) as thread:
                compiled = thread.submit(core.compile_model, model, "CPU", options).result()
            self._request = compiled.create_infer_request()
        except RuntimeError as error:
            raise BundleError(f"{bundle.name}: OpenVINO cannot load 1/model.onnx: {error}") from error
        self._outputs = {name: port for port in compiled.outputs for name in port.get_names()}
        self.runtime = Runtime("openvino", precision if self.manifest.precision == "fp32" else self.manifest.precision)

    def run(self, images: Pixels, outputs: Sequence[str]) -> dict[str, Values]:
        """As in `Encoder`. The whole graph is run: what attention and patch tokens add to it is 1 to 4 %."""
        self._request.infer({0: np.ascontiguousarray(images)}, share_inputs=True, share_outputs=True)
        # The next run writes into the same memory.
        return {name: np.array(self._request.get_tensor(self._outputs[name]).data) for name in outputs}

    def _check(self, model: Any) -> None:
        key = ["framework", METADATA_KEY]
        inside = model.get_rt_info(key).value if model.has_rt_info(key) else None
        check_graph(self.manifest, inside, _ports(model.inputs), _ports(model.outputs))


def capabilities(core: Any) -> list[str]:
    """What the processor has arithmetic for, for example FP32, BF16, INT8."""
    found: list[str] = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return found


def _end_in_fp32(model: Any) -> None:
    """Have embeddings whitened in fp32. OpenVINO computes every product of matrices in bf16, and from 16 rows on by
    other kernels, so that an embedding would depend on how many images are run with it. What comes after the last
    product it leaves in fp32: the whitening is written as a sum.
    """
    import openvino.opset13 as ops

    for product in [op for op in model.get_ops() if op.get_type_name() == "MatMul"]:
        (result,) = product.outputs()
        if not any(name.endswith("_embedding") for name in result.get_names()):
            continue
        vectors, weights = product.input_values()  # (N, D) and (D, D')
        terms = ops.multiply(ops.unsqueeze(vectors, ops.constant(np.array(2))), weights)
        total = ops.reduce_sum(terms, ops.constant(np.array([1])), keep_dims=False).output(0)
        total.set_names(result.get_names())
        for reader in result.get_target_inputs():
            reader.replace_source_output(total)


def _openvino() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise BundleError(f"--engine openvino: {error}; pip install 'patchsight[openvino]'") from error
    return openvino


def _ports(ports: Sequence[Any]) -> dict[str, Port]:
    found: dict[str, Port] = {}
    for port in ports:
        kind = port.get_element_type().get_type_name()
        shape = tuple(side.get_length() if side.is_static else None for side in port.get_partial_shape())
        found |= {name: Port(KINDS.get(kind, kind), shape) for name in port.get_names()}
    return found
