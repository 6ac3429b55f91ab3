"""Data parallelism under `torchrun`: every rank holds the same weights and its share of each batch.

Gradients are averaged here and not by `DistributedDataParallel`: its reducer counts on one forward and one backward a
step, and our steps have as many as the memory asks for (`Objective.parts`). Without torchrun everything here is the
identity.
"""

import os
from datetime import timedelta

import torch
import torch.distributed as dist

# Its functions have the default group as a default argument. Imported after `start` (as optimizers do, by way of
# torch._dynamo) they would hold the group beyond `stop`, and gloo's threads abort one exit in six.
import torch.distributed.nn
from torch import Tensor, nn

BUCKET = 32 * 2**20  # bytes of gradients sent at once


def start(device: torch.device) -> None:
    """Join the group that torchrun's environment describes; nothing without it."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=30))


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def local_rank() -> int:
    """This process's number on its machine: which GPU is its own."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


class _Gather(torch.autograd.Function):
    """Concatenate over ranks; the gradient of a rank's rows is the sum of what all ranks have for them."""

    @staticmethod
    def forward(_: object, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(world())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(_: object, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].contiguous().clone()
        dist.all_reduce(gradient)
        return gradient.chunk(world())[rank()]


def gather(x: Tensor) -> Tensor:
    """`(b, …)` of every rank to `(B, …)`, in the order of ranks, with gradients. All ranks hold equally many rows."""
    return x if world() == 1 else _Gather.apply(x)


def mean_over_ranks(x: Tensor) -> Tensor:
    """The same tensor on every rank; no gradient."""
    if world() == 1:
        return x
    x = x.detach().clone()
    dist.all_reduce(x)
    return x / world()


@torch.no_grad()
def average_gradients(module: nn.Module) -> None:
    """Each gradient becomes its mean over the ranks. A parameter has one on all ranks or on none."""
    if world() == 1:
        return
    bucket: list[Tensor] = []
    size = 0
    for gradient in [p.grad for p in module.parameters() if p.grad is not None]:
        if bucket and (size > BUCKET or gradient.dtype != bucket[0].dtype):
            _average(bucket)
            bucket, size = [], 0
        bucket.append(gradient)
        size += gradient.numel() * gradient.element_size()
    if bucket:
        _average(bucket)


def _average(tensors: list[Tensor]) -> None:
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    flat /= world()
    for tensor, part in zip(tensors, torch.split(flat, [t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def any_rank(flag: bool, device: torch.device) -> bool:
    """True on every rank as soon as it is true on one: all stop at the same step."""
    if world() == 1:
        return flag
    value = torch.tensor(float(flag), device=device)
    dist.all_reduce(value)
    return bool(value.item() > 0)


def barrier() -> None:
    if world() > 1:
        dist.barrier()
