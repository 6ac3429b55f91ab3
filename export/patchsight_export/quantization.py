"""A graph whose linear maps compute in int8: static quantization, its ranges learned from pictures beforehand.

Static, as ranges that are taken from each batch (dynamic quantization) make an embedding depend on what else is in the
batch. Weights have a scale for each output channel, activations uint8 with a scale and an offset for each
tensor; sums are exact, in int32, and leave as float32. What is quantized was chosen by measurement: docs/decisions.md.
"""

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static

from patchsight_serve.encoder import Pixels
from patchsight_serve.errors import InvalidRequest

BATCH = 8
CHOSEN: dict[str, Any] = {
    "quant_format": QuantFormat.QDQ,
    "op_types_to_quantize": ["MatMul"],
    "per_channel": True,
    "activation_type": QuantType.QUInt8,
    "weight_type": QuantType.QInt8,
    # Seven bits of weights: with eight, CPUs without VNNI cut off sums at 16 bits, and the same picture would get
    # another embedding on another machine.
    "reduce_range": True,
    "calibrate_method": CalibrationMethod.MinMax,
    "extra_options": {"MatMulConstBOnly": True, "OpTypesToExcludeOutputQuantization": ["MatMul"]},
}


class Pictures(CalibrationDataReader):  # type: ignore[misc]
    """uint8 `(N, S, S, 3)`, batch by batch, as the quantizer asks for them."""

    def __init__(self, images: Pixels) -> None:
        self._batches = iter([images[i : i + BATCH] for i in range(0, len(images), BATCH)])

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self._batches, None)
        return None if batch is None else {"image": batch}


def to_int8(model: onnx.ModelProto, images: Pixels, **options: Any) -> onnx.ModelProto:
    """The same graph, in fp32 so far, with its `linear_maps` in int8.

    images: uint8 `(N, S, S, 3)`, like those to come. options: of `quantize_static`, in place of `CHOSEN`.

    Raises:
        InvalidRequest: the graph has no linear map, as a ResNet's.
    """
    settings = CHOSEN | {"nodes_to_quantize": linear_maps(model)} | options
    if not settings["nodes_to_quantize"]:
        raise InvalidRequest("--precision int8 is for Vision Transformers: in this graph is no linear map to quantize")
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    with tempfile.TemporaryDirectory() as folder, _quiet():
        path = Path(folder) / "int8.onnx"
        quantize_static(copy, path, Pictures(images), **settings)
        return onnx.load(path)


def linear_maps(model: onnx.ModelProto) -> list[str]:
    """Names of the products with a constant matrix: all linear maps of a transformer's blocks. Not among them are the
    whitening, whose product leaves the graph, attention, and positions, which are resampled for pictures of any size.
    """
    outputs = {value.name for value in model.graph.output}
    matrices = {tensor.name for tensor in model.graph.initializer if len(tensor.dims) == 2}
    products = [node for node in model.graph.node if node.op_type == "MatMul" and node.input[1] in matrices]
    return [node.name for node in products if not outputs & set(node.output)]


@contextmanager
def _quiet() -> Iterator[None]:
    """The quantizer advises pre-processing on the root logger: shapes are known, and nothing needs to be fused."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
