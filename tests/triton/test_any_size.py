"""A graph for pictures of any size, on a real Triton: torch's numbers at sizes that it was not traced with."""

from collections.abc import Callable
from typing import Any

import public_encoders
import public_on_triton
import pytest
from public_layouts import vit

from patchsight_export.public_encoder import wrap
from patchsight_export.to_onnx import OUTPUTS
from patchsight_train.views import MEAN, STD


def test_torch_s_numbers_at_any_size(start_triton: Callable[..., Any]) -> None:
    assert start_triton  # skips where there is none
    encoder = wrap(vit(dynamic_img_size=True), 28, MEAN, STD, "timm")
    error, case = public_encoders.any_size("vit", encoder, OUTPUTS, ((14, 14), (42, 42), (56, 21)))
    assert error < 1e-5
    assert public_on_triton.errors([case])["vit"] == pytest.approx(error, rel=0.01)
