"""The ResNets against torchvision's with the same weights; two ranks against one."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor, nn

from patchsight_train import checkpoint
from patchsight_train.architecture import ResNetConfig
from patchsight_train.resnet import ResNet

CONFIGS = [ResNetConfig(image_size=40, depth=depth, stem=stem) for depth in (18, 50) for stem in ("imagenet", "cifar")]


def scrambled(module: nn.Module) -> nn.Module:
    """Norms and their statistics far from their start, so that none can be forgotten."""
    generator = Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if "running" in name or value.ndim == 1:
                value.copy_(0.7 + 0.6 * torch.rand(value.shape, generator=generator))
    return module


def torchvision_resnet(config: ResNetConfig) -> nn.Module:
    """torchvision's; for small pictures changed as SimCLR's App. B.9 says, in the usual way."""
    theirs = getattr(torchvision.models, f"resnet{config.depth}")()
    if config.stem == "cifar":
        theirs.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
        theirs.maxpool = nn.Identity()
    theirs.avgpool, theirs.fc = nn.Identity(), nn.Identity()  # it then ends in the map, flat: (N, D · h · w)
    return theirs


def pair(config: ResNetConfig) -> tuple[ResNet, nn.Module]:
    """Ours and torchvision's with the same weights, float64; the loading is strict both ways."""
    torch.manual_seed(0)
    ours, theirs = ResNet(config).double(), scrambled(torchvision_resnet(config).double())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


def images(N: int, height: int, width: int) -> Tensor:
    return torch.randn(N, 3, height, width, generator=Generator().manual_seed(2), dtype=torch.float64)


def cells(flat: Tensor, D: int, h: int, w: int) -> Tensor:
    """torchvision's flat map, cell by cell: `(N, h · w, D)`."""
    grid = flat.reshape(-1, D, h, w)
    return torch.stack([grid[:, :, row, column] for row in range(h) for column in range(w)], dim=1)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_tokens_and_gradients_are_those_of_torchvision(config: ResNetConfig) -> None:
    """In training, then in evaluation with the statistics that training moved; of a picture that is no square."""
    ours, theirs = pair(config)
    x, h, w = (images(2, 40, 72), 2, 3) if config.stem == "imagenet" else (images(2, 20, 36), 3, 5)
    found, wanted = ours.train()(x), cells(theirs.train()(x), config.width, h, w)
    torch.testing.assert_close(found, wanted, atol=1e-9, rtol=1e-9)
    target = torch.randn(wanted.shape, generator=Generator().manual_seed(3), dtype=torch.float64)
    for tokens in (found, wanted):
        ((tokens - target) ** 2).mean().backward()
    for (name, parameter), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert other.grad is not None, name
        assert other.grad.abs().max() > 0, name
        torch.testing.assert_close(parameter.grad, other.grad, atol=1e-9, rtol=1e-7, msg=name)
    for (name, buffer), other in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(buffer, other, atol=1e-9, rtol=1e-9, msg=name)
    with torch.no_grad():
        found, wanted = ours.eval()(x), cells(theirs.eval()(x), config.width, h, w)
    torch.testing.assert_close(found, wanted, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(ours.pooled(x, "mean"), wanted.mean(dim=1), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("size", [32, 33, 47, 96])
def test_the_configuration_knows_the_grid(config: ResNetConfig, size: int) -> None:
    config = ResNetConfig(size, config.depth, config.stem)
    with torch.device("meta"):
        tokens = ResNet(config)(torch.empty(2, 3, size, size))
    assert tokens.shape == (2, config.grid**2, config.width)


@pytest.mark.parametrize("depth", [18, 50])
def test_a_block_is_at_first_its_shortcut(depth: int) -> None:
    """The same tokens come out with every residual branch taken away."""
    resnet = ResNet(ResNetConfig(32, depth, "cifar")).eval()
    x = images(2, 32, 32).float()
    with torch.no_grad():
        y = resnet.bn1(resnet.conv1(x)).relu()
        for stage in (resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4):
            for block in stage:
                y = block.downsample(y).relu()
        torch.testing.assert_close(resnet(x), y.flatten(2).transpose(1, 2))
    assert y.std() > 0.01


def test_an_image_is_evaluated_as_if_alone() -> None:
    resnet = scrambled(ResNet(ResNetConfig(16, 18, "cifar")).double()).eval()
    x = images(3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(resnet(x), torch.cat([resnet(picture[None]) for picture in x]))


def test_all_of_it_is_channels_last() -> None:
    """Weights and activations, also from a batch that is not; and loading weights leaves it so."""
    resnet = ResNet(ResNetConfig(32, 18, "cifar"))
    resnet.load_state_dict({k: v.contiguous() for k, v in resnet.state_dict().items()})
    layouts: list[bool] = []

    def look(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        tensors = (inputs[0], module.weight, output)
        layouts.append(all(t.is_contiguous(memory_format=torch.channels_last) for t in tensors))

    for module in resnet.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(look)
    assert resnet(images(2, 32, 32).float()).is_contiguous()
    assert layouts == [True] * 20


RANK = """
import sys
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from patchsight_train import checkpoint
from patchsight_train.architecture import ResNetConfig
from patchsight_train.distributed import average_gradients, mean_over_ranks
from patchsight_train.resnet import ResNet

folder, rank = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
given = load_file(f"{folder}/given.safetensors")
x, target = given.pop("x").chunk(2)[rank], given.pop("target").chunk(2)[rank]
resnet = ResNet(ResNetConfig(16, 18, "cifar")).double()
resnet.load_state_dict(given)
loss = ((resnet(x) - target) ** 2).mean()
loss.backward()
average_gradients(resnet)
found = {"loss": mean_over_ranks(loss), **dict(resnet.named_buffers())}
found |= {f"{name}.grad": parameter.grad for name, parameter in resnet.named_parameters()}
save_file({k: v.contiguous() for k, v in found.items()}, f"{folder}/rank{rank}.safetensors")
dist.destroy_process_group()
"""


def test_two_ranks_are_one(tmp_path: Path) -> None:
    """Loss, gradients and running statistics of half a batch on each of two ranks are those of the whole on one."""
    ours = scrambled(ResNet(ResNetConfig(16, 18, "cifar")).double())
    x = images(4, 16, 16) * torch.arange(1, 5).view(4, 1, 1, 1)  # the halves have different statistics
    target = torch.randn(4, 4, 512, generator=Generator().manual_seed(3), dtype=torch.float64)
    save_file(
        {"x": x, "target": target, **{k: v.contiguous() for k, v in ours.state_dict().items()}},
        tmp_path / "given.safetensors",
    )
    program = [sys.executable, "-c", RANK, str(tmp_path)]
    ranks = [subprocess.Popen([*program, str(rank)], stderr=subprocess.PIPE, text=True) for rank in (0, 1)]
    errors = [process.communicate(timeout=240)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], errors

    loss = ((ours(x) - target) ** 2).mean()
    loss.backward()
    wanted = {"loss": loss.detach(), **dict(ours.named_buffers())}
    wanted |= {f"{name}.grad": parameter.grad for name, parameter in ours.named_parameters()}
    for rank in (0, 1):
        found = load_file(tmp_path / f"rank{rank}.safetensors")
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, atol=1e-10, rtol=1e-7, msg=name)


def test_a_resumed_run_equals_one_that_was_not_stopped(tmp_path: Path) -> None:
    """Weights and both moments of AdamW go on in the memory layout of the convolutions."""
    x = images(6, 16, 16).float()

    def made() -> tuple[ResNet, torch.optim.AdamW]:
        torch.manual_seed(0)
        resnet = ResNet(ResNetConfig(16, 18, "cifar"))
        return resnet, torch.optim.AdamW(resnet.parameters(), lr=1e-3, fused=True)

    def step(resnet: ResNet, optimizer: torch.optim.AdamW) -> None:
        optimizer.zero_grad()
        ((resnet(x) - 1) ** 2).mean().backward()
        optimizer.step()

    through = made()
    step(*through)
    checkpoint.save(tmp_path, 1, *through)
    resumed = made()
    checkpoint.restore(checkpoint.load(tmp_path), *resumed, tmp_path)
    for run in (through, resumed):
        step(*run)
    for (name, a), b in zip(through[0].state_dict().items(), resumed[0].state_dict().values(), strict=True):
        assert torch.equal(a, b), name
