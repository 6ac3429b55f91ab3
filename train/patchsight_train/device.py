"""Where and in which precision to compute."""

import platform

import torch

from patchsight_serve.errors import InvalidRequest
from patchsight_train import distributed


def pick_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one, and this rank's own of several.

    Raises:
        InvalidRequest: a GPU is asked for that is not there.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise InvalidRequest("--device cuda: torch finds no GPU here; use --device auto or cpu")
    if name == "cpu" or not available:
        return torch.device("cpu")
    device = torch.device("cuda", distributed.local_rank())
    torch.cuda.set_device(device)
    return device


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bf16 where the device computes it in hardware, else fp32; never fp16."""
    if name != "auto":
        return torch.bfloat16 if name == "bf16" else torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if _cpu_computes_bf16() else torch.float32


def _cpu_computes_bf16() -> bool:
    """In hardware: oneDNN also says that it can where it emulates, which is slower than fp32 (docs/decisions.md)."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
