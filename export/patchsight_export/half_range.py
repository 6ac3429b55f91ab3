"""Does every number inside a graph fit into fp16? To be asked of the fp32 graph.

ONNX Runtime computes fp16 on a CPU in fp32 from one node to the next, and rounds only where it must: what is too large
for fp16 is not seen there, and becomes infinite on a GPU.
"""

import numpy as np
import onnx
from onnx import TensorProto

from patchsight_export.verify import load
from patchsight_serve.encoder import Pixels
from patchsight_serve.errors import BundleError

LARGEST = 65_504
BATCH = 2  # images at a time: every tensor of the graph is held at once


def check_range(full: onnx.ModelProto, half: onnx.ModelProto, images: Pixels) -> None:
    """full: the graph in fp32. half: what `to_half` made of it. images: uint8 `(N, S, S, 3)`.

    Raises:
        BundleError: a tensor that is fp16 in `half` holds more than that for one of the images.
    """
    made = {name for node in full.graph.node for name in node.output}
    rounded = [
        value
        for value in onnx.shape_inference.infer_shapes(half).graph.value_info
        if value.type.tensor_type.elem_type == TensorProto.FLOAT16 and value.name in made
    ]
    names = [value.name for value in rounded]
    shown = onnx.ModelProto()
    shown.CopyFrom(full)
    shown.graph.output.extend(rounded)
    for value in shown.graph.output:
        value.type.tensor_type.elem_type = TensorProto.FLOAT
    session = load(shown.SerializeToString())
    for i in range(0, len(images), BATCH):
        for name, value in zip(names, session.run(names, {"image": images[i : i + BATCH]}), strict=True):
            largest = float(np.abs(value).max())
            if not largest <= LARGEST:
                raise BundleError(
                    f"not published: {name}, inside the graph, reaches {largest:,.0f}, beyond fp16's {LARGEST:,}; "
                    "--precision bf16 has the range of fp32"
                )
