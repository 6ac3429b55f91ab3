"""Batch norm over two ranks against torch's on the whole batch in one."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor, nn

from patchsight_train.batch_norm import BatchNorm

SHARES = (3, 5)  # images of each rank

# What every rank runs: for each case one forward and backward in training, then evaluation.
RANK = """
import sys
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from patchsight_train.batch_norm import BatchNorm

folder, rank = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
found = {}
for case in ("double", "offset", "bf16"):
    given = load_file(f"{folder}/{case}.safetensors")
    norm = BatchNorm(4).to(torch.float64 if case == "double" else torch.float32)
    norm.load_state_dict({k.removeprefix("norm."): v for k, v in given.items() if k.startswith("norm.")})
    x = given["x"].split([3, 5])[rank].clone().requires_grad_()
    g = given["g"].split([3, 5])[rank]
    y = norm(x)
    (y * g).sum().backward()
    found |= {f"{case}.y": y.detach(), f"{case}.x.grad": x.grad}
    found |= {f"{case}.{name}.grad": parameter.grad for name, parameter in norm.named_parameters()}
    found |= {f"{case}.{name}": buffer for name, buffer in norm.named_buffers()}
    found[f"{case}.evaluated"] = norm.eval()(x.detach()[:1])
save_file({k: v.contiguous() for k, v in found.items()}, f"{folder}/rank{rank}.safetensors")
dist.destroy_process_group()
"""


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=Generator().manual_seed(seed), dtype=torch.float64)


def cases() -> dict[str, tuple[nn.BatchNorm2d, Tensor, Tensor]]:
    """By name: a norm whose parameters and statistics all differ from their start, its input, and dL/dy."""
    norm = nn.BatchNorm2d(4).double()
    with torch.no_grad():
        norm.weight.copy_(random(4, seed=1))
        norm.bias.copy_(random(4, seed=2))
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean.copy_(random(4, seed=3))
        norm.running_var.copy_(random(4, seed=4).exp())
    spread = torch.tensor([0.3, 1.0, 5.0, 1.0], dtype=torch.float64).view(4, 1, 1)
    x = (random(8, 4, 5, 6, seed=5) + 1) * spread
    g = random(8, 4, 5, 6, seed=6)
    return {
        "double": (norm, x, g),
        "offset": (norm, (x + 1000).float(), g.float()),  # E[x²] − E[x]² would keep no digit of the variance
        "bf16": (norm, x.bfloat16(), g.bfloat16()),
    }


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    """What each of two processes found for `cases`."""
    folder = tmp_path_factory.mktemp("ranks")
    for name, (norm, x, g) in cases().items():
        tensors = {"x": x, "g": g, **{f"norm.{k}": v for k, v in norm.state_dict().items()}}
        save_file(tensors, folder / f"{name}.safetensors")
    program = [sys.executable, "-c", RANK, str(folder)]
    ranks = [subprocess.Popen([*program, str(rank)], stderr=subprocess.PIPE, text=True) for rank in (0, 1)]
    errors = [process.communicate(timeout=240)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], errors
    return [load_file(folder / f"rank{rank}.safetensors") for rank in (0, 1)]


@pytest.mark.parametrize(("case", "tolerance"), [("double", 1e-11), ("offset", 2e-3), ("bf16", 4e-2)])
def test_two_ranks_are_one(case: str, tolerance: float, two_ranks: list[dict[str, Tensor]]) -> None:
    """Outputs, all gradients and the running statistics; of uneven shares, against torch in float64."""
    norm, x, g = cases()[case]
    x = x.double().requires_grad_()
    y = norm.train()(x)
    (y * g.double()).sum().backward()

    def joined(name: str) -> Tensor:
        return torch.cat([found[f"{case}.{name}"] for found in two_ranks])

    def near(found: Tensor, wanted: Tensor | None) -> None:
        assert wanted is not None
        torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max()))

    assert joined("y").dtype == joined("x.grad").dtype == cases()[case][1].dtype
    near(joined("y"), y.detach())
    near(joined("x.grad"), x.grad)
    for name, parameter in norm.named_parameters():  # each rank has its own images' share
        near(sum(found[f"{case}.{name}.grad"].double() for found in two_ranks), parameter.grad)  # type: ignore[arg-type]
    for found in two_ranks:
        near(found[f"{case}.running_mean"], norm.running_mean)
        near(found[f"{case}.running_var"], norm.running_var)
        assert found[f"{case}.num_batches_tracked"] == 1
    evaluated = norm.eval()(x.detach()[[0, SHARES[0]]])  # the first image of each rank
    near(joined("evaluated"), evaluated.detach())


def test_a_rank_alone_would_differ(two_ranks: list[dict[str, Tensor]]) -> None:
    """The comparison above can fail: with each rank's own statistics it does, by far."""
    norm, x, _ = cases()["double"]
    alone = torch.cat([norm.train()(part) for part in x.split(SHARES)])
    found = torch.cat([rank["double.y"] for rank in two_ranks])
    assert (alone - found).abs().max() > 0.1


def test_one_rank_is_torch() -> None:
    norm, x, g = cases()["double"]
    ours = BatchNorm(4).double()
    ours.load_state_dict(norm.state_dict(), strict=True)
    results = []
    for module in (ours, norm):
        leaf = x.clone().requires_grad_()
        y = module.train()(leaf)
        (y * g).sum().backward()
        results.append([y, leaf.grad, module.weight.grad, module.bias.grad, *module.buffers(), module.eval()(x)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
