"""A bundle that is published already as the source of another one: its fp32 graph, to be had at another precision."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from patchsight_serve.errors import InvalidRequest
from patchsight_serve.manifest import Manifest, load_manifest


def read_bundle(bundle: Path) -> tuple[Manifest, onnx.ModelProto]:
    """Its manifest, and its graph with every weight in float32, whatever the file stores.

    Raises:
        BundleError: the bundle is damaged.
        InvalidRequest: it computes in something else than fp32 already.
    """
    manifest = load_manifest(bundle)
    if manifest.precision != "fp32":
        raise InvalidRequest(
            f"{bundle} computes in {manifest.precision}, and rounding does not become less by rounding again; give the "
            "bundle in fp32 that it was made of"
        )
    model = onnx.load(bundle / "1" / "model.onnx")
    unfold(model)
    return manifest, model


def unfold(model: onnx.ModelProto) -> None:
    """Take back what `half_weights.store_half` did, without loss."""
    graph = model.graph
    stored = {tensor.name: tensor for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT16}
    nodes = []
    for node in graph.node:
        if node.op_type == "Cast" and node.input[0] in stored and node.attribute[0].i == TensorProto.FLOAT:
            tensor = stored[node.input[0]]
            value = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(value, node.output[0]))
        else:
            nodes.append(node)
    graph.ClearField("node")
    graph.node.extend(nodes)
