"""Triton's `config.pbtxt` for a bundle: the same graph that the server runs in process, on Triton's ONNX Runtime.

One source for both backends: `onnxruntime` for production, `python` (with `triton_python_model.py`) for a Triton that
has no other. The manifest travels inside, so that a gateway needs nothing but Triton's address to know its encoders.
"""

import json
from collections.abc import Sequence
from typing import Literal

from pydantic import ValidationError
from tritonclient.grpc.model_config_pb2 import ModelConfig

from patchsight_serve.errors import BundleError
from patchsight_serve.manifest import Manifest

Backend = Literal["onnxruntime", "python"]

MAX_BATCH = 64  # images per run, as many as one request may bring to the server
QUEUE_SIZE = 256  # requests that wait; the next one is refused at once, so that overload stays short
QUEUE_TIMEOUT_S = 30  # as the server's own limit; a request may ask for less, and the gateway does
# Levels of priority, the first goes first. A probe that waits behind the load it is to judge would always fail.
PROBE, INTERACTIVE, BULK = 1, 2, 3
PARAMETER = "patchsight"  # the config's parameter that holds the manifest

HEADER = {
    "onnxruntime": "# What this encoder is: encoder.json.",
    "python": "# What this encoder is: encoder.json. 1/model.py runs 1/model.onnx: no onnxruntime backend here.",
}
KIND = {"onnxruntime": "KIND_AUTO", "python": "KIND_CPU"}


def config_pbtxt(manifest: Manifest, backend: Backend = "onnxruntime", tensorrt_cache: str | None = None) -> str:
    """The file's text, of its arguments alone.

    Batches form without waiting: what arrives during one run makes up the next. KIND_AUTO is one instance per GPU, or
    one on the CPU where there is none. The warm-up keeps the first request from paying for the engine's setting-up.

    tensorrt_cache: a folder on the machine of Triton; the graph then runs on TensorRT in fp16, layer norms in fp32, and
    its engines, which take minutes to build, are kept there.
    A size of -1 is any, where the graph takes any; Triton puts images of one size into one batch.
    """
    size = manifest.transform.crop
    side = -1 if manifest.dynamic_size else size
    outputs = ",\n".join(f"  {_tensor(name, 'TYPE_FP32', shape)}" for name, shape in _shapes(manifest).items())
    return f"""\
{HEADER[backend]}
name: "{manifest.name}"
backend: "{backend}"
max_batch_size: {MAX_BATCH}
input [
  {_tensor("image", "TYPE_UINT8", (side, side, 3))}
]
output [
{outputs}
]
instance_group [
  {{ kind: {KIND[backend]}, count: 1 }}
]
dynamic_batching {{
  priority_levels: {BULK}
  default_priority_level: {INTERACTIVE}
  default_queue_policy {{
    timeout_action: REJECT
    default_timeout_microseconds: {QUEUE_TIMEOUT_S * 1_000_000}
    allow_timeout_override: true
    max_queue_size: {QUEUE_SIZE}
  }}
}}
model_warmup [
  {{
    name: "one image"
    batch_size: 1
    inputs {{ key: "image", value {{ data_type: TYPE_UINT8, dims: [{size}, {size}, 3], zero_data: true }} }}
  }}
]
{_tensorrt(manifest, tensorrt_cache) if tensorrt_cache else ""}\
parameters {{ key: "{PARAMETER}", value {{ string_value: "{_escaped(_identity(manifest))}" }} }}
"""


def manifest_of(config: ModelConfig) -> Manifest | None:
    """The encoder that a model of Triton is; None for a model that is not ours.

    Raises:
        BundleError: it says that it is ours, but its config contradicts its manifest.
    """
    if PARAMETER not in config.parameters:
        return None
    try:
        manifest = Manifest.model_validate_json(config.parameters[PARAMETER].string_value)
    except ValidationError as error:
        raise BundleError(f"{config.name}: config.pbtxt's parameter {PARAMETER}: {error.errors()[0]['msg']}") from None
    if manifest.name != config.name:
        raise BundleError(f"{config.name}: config.pbtxt holds the manifest of {manifest.name!r}")
    have = {output.name: tuple(output.dims) for output in config.output}
    for name, shape in _shapes(manifest).items():
        if have.get(name) != shape:
            raise BundleError(f"{config.name}: config.pbtxt has output {name!r} as {have.get(name)}, not {shape}")
    return manifest


def _identity(manifest: Manifest) -> str:
    """Without what was measured, which may grow when this file is written already."""
    told = {"name": manifest.name, "sha256": manifest.sha256, **json.loads(manifest.metadata())}
    return json.dumps(told, separators=(",", ":"), ensure_ascii=False)


def _shapes(manifest: Manifest) -> dict[str, tuple[int, ...]]:
    """Of the outputs as Triton is told of them: -1 along an axis of any size."""
    return manifest.outputs_on(-1, -1) if manifest.dynamic_size else manifest.outputs


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')


def _tensor(name: str, data_type: str, dims: Sequence[int]) -> str:
    return f'{{ name: "{name}", data_type: {data_type}, dims: [{", ".join(map(str, dims))}] }}'


def _tensorrt(manifest: Manifest, cache: str) -> str:
    """With profiles for every batch size there can be: without them an engine is built anew for each that appears. A
    graph for any size gets them up to twice its own."""
    own, least, most = manifest.transform.crop, manifest.transform.crop, manifest.transform.crop
    if manifest.dynamic_size:
        least, most = manifest.size_least, 2 * own
    parameters = {
        "precision_mode": "FP16",
        "trt_layer_norm_fp32_fallback": "1",
        "max_workspace_size_bytes": str(4 << 30),
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": cache,
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": cache,
        **{
            f"trt_profile_{which}_shapes": f"image:{batch}x{side}x{side}x3"
            for which, batch, side in (("min", 1, least), ("opt", MAX_BATCH // 2, own), ("max", MAX_BATCH, most))
        },
    }
    lines = "\n".join(f'      parameters {{ key: "{k}", value: "{_escaped(v)}" }}' for k, v in parameters.items())
    return f"""\
optimization {{
  execution_accelerators {{
    gpu_execution_accelerator [ {{
      name: "tensorrt"
{lines}
    }} ]
  }}
}}
"""
