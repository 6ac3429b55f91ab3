"""config.pbtxt as text, and as Triton's own schema reads it."""

from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig, ModelInstanceGroup, ModelQueuePolicy

from patchsight_serve.manifest import Manifest
from patchsight_serve.triton_config import config_pbtxt

GOLDEN = """\
# Written by patchsight-export. What this encoder is: encoder.json.
name: "tiny"
backend: "onnxruntime"
max_batch_size: 64
input [
  { name: "image", data_type: TYPE_UINT8, dims: [32, 32, 3] }
]
output [
  { name: "cls_embedding", data_type: TYPE_FP32, dims: [96] },
  { name: "mean_embedding", data_type: TYPE_FP32, dims: [96] },
  { name: "attention", data_type: TYPE_FP32, dims: [3, 8, 8] },
  { name: "patch_tokens", data_type: TYPE_FP32, dims: [8, 8, 96] }
]
instance_group [
  { kind: KIND_AUTO, count: 1 }
]
dynamic_batching {
  default_queue_policy {
    timeout_action: REJECT
    default_timeout_microseconds: 5000000
    allow_timeout_override: true
    max_queue_size: 256
  }
}
model_warmup [
  {
    name: "one image"
    batch_size: 1
    inputs { key: "image", value { data_type: TYPE_UINT8, dims: [32, 32, 3], zero_data: true } }
  }
]
"""


def test_golden(manifest: Manifest) -> None:
    assert config_pbtxt(manifest) == GOLDEN


def test_triton_reads_what_was_meant(manifest: Manifest) -> None:
    config = text_format.Parse(config_pbtxt(manifest), ModelConfig())
    assert (config.name, config.backend, config.max_batch_size) == ("tiny", "onnxruntime", 64)
    assert [(i.name, i.data_type, tuple(i.dims)) for i in config.input] == [("image", DataType.TYPE_UINT8, (32, 32, 3))]
    assert {o.name: tuple(o.dims) for o in config.output} == manifest.outputs
    assert {o.data_type for o in config.output} == {DataType.TYPE_FP32}
    assert [(g.kind, g.count) for g in config.instance_group] == [(ModelInstanceGroup.KIND_AUTO, 1)]
    assert config.HasField("dynamic_batching")
    policy = config.dynamic_batching.default_queue_policy
    assert policy.timeout_action == ModelQueuePolicy.REJECT
    assert (policy.default_timeout_microseconds, policy.max_queue_size) == (5_000_000, 256)
    assert config.dynamic_batching.max_queue_delay_microseconds == 0
    (warmup,) = config.model_warmup
    assert tuple(warmup.inputs["image"].dims) == (32, 32, 3)
    assert warmup.inputs["image"].WhichOneof("input_data_type") == "zero_data"


def test_a_resnet_has_one_output(manifest: Manifest) -> None:
    plain = manifest.model_copy(update={"patch_size": None, "num_heads": None})
    config = text_format.Parse(config_pbtxt(plain), ModelConfig())
    assert [(o.name, tuple(o.dims)) for o in config.output] == [("mean_embedding", (96,))]


def test_a_graph_of_any_size(manifest: Manifest) -> None:
    """-1 is any size to Triton; the warm-up keeps the encoder's own, as it must name one."""
    config = text_format.Parse(config_pbtxt(manifest.model_copy(update={"dynamic_size": True})), ModelConfig())
    assert tuple(config.input[0].dims) == (-1, -1, 3)
    assert {o.name: tuple(o.dims) for o in config.output} == {
        "cls_embedding": (96,), "mean_embedding": (96,), "attention": (3, -1, -1), "patch_tokens": (-1, -1, 96),
    }  # fmt: skip
    assert tuple(config.model_warmup[0].inputs["image"].dims) == (32, 32, 3)


def test_rollout_is_one_head(manifest: Manifest) -> None:
    config = text_format.Parse(config_pbtxt(manifest.model_copy(update={"attention": "rollout"})), ModelConfig())
    assert {o.name: tuple(o.dims) for o in config.output}["attention"] == (1, 8, 8)
