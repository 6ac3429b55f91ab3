"""Triton's `config.pbtxt` for a bundle: the same graph that the server runs in process, on Triton's ONNX Runtime."""

from collections.abc import Sequence

from patchsight_serve.manifest import Manifest

MAX_BATCH = 64  # images per run, as many as one request may bring to the server
QUEUE_SIZE = 256  # requests that wait; the next one is refused at once, so that overload stays short
QUEUE_TIMEOUT_S = 5  # a request may ask for less


def config_pbtxt(manifest: Manifest) -> str:
    """The file's text, of manifest alone.

    Batches form without waiting: what arrives during one run makes up the next. KIND_AUTO is one instance per GPU, or
    one on the CPU where there is none. The warm-up keeps the first request from paying for the engine's setting-up.
    A size of -1 is any, where the graph takes any; Triton puts images of one size into one batch.
    """
    size = manifest.transform.crop
    side, shapes = (-1, manifest.outputs_on(-1, -1)) if manifest.dynamic_size else (size, manifest.outputs)
    outputs = ",\n".join(f"  {_tensor(name, 'TYPE_FP32', shape)}" for name, shape in shapes.items())
    return f"""\
# Written by patchsight-export. What this encoder is: encoder.json.
name: "{manifest.name}"
backend: "onnxruntime"
max_batch_size: {MAX_BATCH}
input [
  {_tensor("image", "TYPE_UINT8", (side, side, 3))}
]
output [
{outputs}
]
instance_group [
  {{ kind: KIND_AUTO, count: 1 }}
]
dynamic_batching {{
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
"""


def _tensor(name: str, data_type: str, dims: Sequence[int]) -> str:
    return f'{{ name: "{name}", data_type: {data_type}, dims: [{", ".join(map(str, dims))}] }}'
