"""config.pbtxt as text, and as Triton's own schema reads it."""

import json
from typing import Any

import pytest
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig, ModelInstanceGroup, ModelQueuePolicy

from patchsight_serve.errors import BundleError
from patchsight_serve.manifest import Manifest
from patchsight_serve.triton_config import config_pbtxt, manifest_of

GOLDEN = """\
# What this encoder is: encoder.json.
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
  priority_levels: 3
  default_priority_level: 2
  default_queue_policy {
    timeout_action: REJECT
    default_timeout_microseconds: 30000000
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
parameters { key: "patchsight", value { string_value: "MANIFEST" } }
"""


def test_golden(manifest: Manifest) -> None:
    told = {"name": "tiny", "sha256": "0" * 64, **json.loads(manifest.metadata())}
    escaped = json.dumps(told, separators=(",", ":")).replace('"', '\\"')
    assert config_pbtxt(manifest) == GOLDEN.replace("MANIFEST", escaped)


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
    assert (policy.default_timeout_microseconds, policy.max_queue_size) == (30_000_000, 256)
    assert config.dynamic_batching.max_queue_delay_microseconds == 0
    (warmup,) = config.model_warmup
    assert tuple(warmup.inputs["image"].dims) == (32, 32, 3)
    assert warmup.inputs["image"].WhichOneof("input_data_type") == "zero_data"


def test_a_resnet_has_one_output(manifest: Manifest) -> None:
    plain = manifest.model_copy(update={"patch_size": None, "num_heads": None})
    config = text_format.Parse(config_pbtxt(plain), ModelConfig())
    assert [(o.name, tuple(o.dims)) for o in config.output] == [("mean_embedding", (96,))]


def parsed(manifest: Manifest, **options: Any) -> ModelConfig:
    return text_format.Parse(config_pbtxt(manifest, **options), ModelConfig())


def test_the_manifest_comes_back_whatever_stands_in_it(manifest: Manifest) -> None:
    odd = manifest.model_copy(update={"recipe": 'a = "b\\n"\n# ZCA, 64×64 „ü“\t{}', "measured": {"cifar10": 1}})
    assert manifest_of(parsed(odd)) == odd.model_copy(update={"measured": {}})


def test_the_python_backend_differs_in_what_runs_it_alone(manifest: Manifest) -> None:
    python, onnx = parsed(manifest, backend="python"), parsed(manifest)
    assert python.backend == "python"
    assert python.instance_group[0].kind == ModelInstanceGroup.KIND_CPU
    python.backend, python.instance_group[0].kind = onnx.backend, onnx.instance_group[0].kind
    assert python == onnx


def test_tensorrt_has_a_profile_for_every_batch_and_keeps_its_engines(manifest: Manifest) -> None:
    config = parsed(manifest, tensorrt_cache='/cache "a"')
    (accelerator,) = config.optimization.execution_accelerators.gpu_execution_accelerator
    told = dict(accelerator.parameters)
    assert (accelerator.name, told["precision_mode"], told["trt_layer_norm_fp32_fallback"]) == ("tensorrt", "FP16", "1")
    assert told["trt_profile_min_shapes"] == "image:1x32x32x3"
    assert told["trt_profile_max_shapes"] == f"image:{config.max_batch_size}x32x32x3"
    assert (told["trt_engine_cache_enable"], told["trt_engine_cache_path"]) == ("1", '/cache "a"')


def test_a_model_of_somebody_else_is_none_of_ours() -> None:
    assert manifest_of(ModelConfig(name="resnet")) is None


def test_a_config_that_contradicts_its_manifest(manifest: Manifest) -> None:
    config = parsed(manifest)
    config.name = "other"
    with pytest.raises(BundleError, match="other: config.pbtxt holds the manifest of 'tiny'"):
        manifest_of(config)
    config = parsed(manifest)
    config.output[0].dims[0] = 95
    with pytest.raises(BundleError, match=r"output 'cls_embedding' as \(95,\), not \(96,\)"):
        manifest_of(config)
    config.parameters["patchsight"].string_value = "{}"
    with pytest.raises(BundleError, match="parameter patchsight: Field required"):
        manifest_of(config)


def test_a_graph_of_any_size(manifest: Manifest) -> None:
    """-1 is any size to Triton; the warm-up keeps the encoder's own, as it must name one."""
    config = text_format.Parse(config_pbtxt(manifest.model_copy(update={"dynamic_size": True})), ModelConfig())
    assert tuple(config.input[0].dims) == (-1, -1, 3)
    assert {o.name: tuple(o.dims) for o in config.output} == {
        "cls_embedding": (96,), "mean_embedding": (96,), "attention": (3, -1, -1), "patch_tokens": (-1, -1, 96),
    }  # fmt: skip
    assert tuple(config.model_warmup[0].inputs["image"].dims) == (32, 32, 3)
    assert manifest_of(config) == manifest.model_copy(update={"dynamic_size": True})
    tensorrt = parsed(manifest.model_copy(update={"dynamic_size": True}), tensorrt_cache="/cache")
    told = dict(tensorrt.optimization.execution_accelerators.gpu_execution_accelerator[0].parameters)
    shapes = [told[f"trt_profile_{which}_shapes"] for which in ("min", "opt", "max")]
    assert shapes == ["image:1x4x4x3", "image:32x32x32x3", "image:64x64x64x3"]


def test_rollout_is_one_head(manifest: Manifest) -> None:
    config = text_format.Parse(config_pbtxt(manifest.model_copy(update={"attention": "rollout"})), ModelConfig())
    assert {o.name: tuple(o.dims) for o in config.output}["attention"] == (1, 8, 8)
