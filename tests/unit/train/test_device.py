import pytest
import torch

from patchsight_serve.errors import InvalidRequest
from patchsight_train.device import pick_device, pick_precision


def test_a_gpu_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto").type == "cpu"
    with pytest.raises(InvalidRequest, match="--device cuda: torch finds no GPU"):
        pick_device("cuda")


def test_precision_is_as_asked_and_never_fp16() -> None:
    cpu = torch.device("cpu")
    assert pick_precision("fp32", cpu) == torch.float32
    assert pick_precision("bf16", cpu) == torch.bfloat16
    assert pick_precision("auto", cpu) in (torch.float32, torch.bfloat16)
