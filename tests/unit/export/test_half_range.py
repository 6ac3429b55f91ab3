"""Numbers too large for fp16 are found, also where ONNX Runtime's CPU does not round to it."""

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch

from patchsight_export.half_compute import to_half
from patchsight_export.half_range import check_range
from patchsight_export.source import read_run
from patchsight_export.to_onnx import served, to_onnx
from patchsight_serve.errors import BundleError
from patchsight_serve.trial_pictures import noise


@pytest.mark.parametrize("factor", [1.0, 3e4])
def test_a_feed_forward_of_large_numbers(run: Path, factor: float) -> None:
    encoder = read_run(run).encoder
    with torch.no_grad():  # the same function, but for what stands between its two maps
        encoder.blocks[1].mlp.fc1.weight.mul_(factor)
        encoder.blocks[1].mlp.fc2.weight.div_(factor)
    graph, images = to_onnx(served(encoder), 16), noise(16)
    half = to_half(graph, "fp16")
    values = ort.InferenceSession(half.SerializeToString()).run(None, {"image": images})
    assert all(np.isfinite(value).all() for value in values)  # on a CPU nothing shows
    if factor == 1:
        check_range(graph, half, images)
    else:
        with pytest.raises(BundleError, match=r"inside the graph, reaches \d{2,3},\d{3}.*, beyond fp16's 65,504"):
            check_range(graph, half, images)
