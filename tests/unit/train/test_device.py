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


@pytest.mark.parametrize(
    ("machine", "avx512_bf16", "amx", "onednn", "expected"),
    [
        ("x86_64", True, False, True, torch.bfloat16),
        ("AMD64", False, True, True, torch.bfloat16),
        ("x86_64", False, False, True, torch.float32),  # oneDNN emulates it
        ("aarch64", False, False, True, torch.bfloat16),
        ("aarch64", False, False, False, torch.float32),
    ],
)
def test_a_cpu_computes_in_bf16_where_it_has_it_in_hardware(
    machine: str, avx512_bf16: bool, amx: bool, onednn: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
    assert pick_precision("auto", torch.device("cpu")) == expected
