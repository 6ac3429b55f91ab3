"""Which layer learns how fast, and what is trained at all: against a loop from the paper, and whole gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from patchsight_serve.errors import InvalidRequest
from patchsight_train.architecture import ResNetConfig, ViTConfig
from patchsight_train.build import build_encoder
from patchsight_train.classification import Classification
from patchsight_train.encoder import Encoder
from patchsight_train.finetune_settings import FineTuneSettings
from patchsight_train.layers import freeze, rate_scale, set_modes, tokens
from patchsight_train.optimizer import adamw, set_rates
from patchsight_train.update import Updater
from patchsight_train.vit import ViT

DEPTH = 3
ALL: list[Any] = ["all", 3.0, 2.0, 1.0, 0.5, 0.0]

Settings = Callable[..., FineTuneSettings]


@pytest.fixture
def finetune(tiny: Callable[..., dict[str, Any]]) -> Settings:
    def finetune(**changes: Any) -> FineTuneSettings:
        chosen = {"test": ["unread"], "scratch": True, "depth": DEPTH, "registers": 1, "weight_decay": 0.0} | changes
        return FineTuneSettings(**tiny("finetune", **chosen))

    return finetune


@pytest.fixture
def vit() -> ViT:
    torch.manual_seed(0)
    encoder = build_encoder(ViTConfig(16, 4, 16, DEPTH, 2, registers=1))
    assert isinstance(encoder, ViT)
    return encoder


@pytest.fixture
def images(generator: Generator) -> Tensor:
    return torch.randn(5, 3, 16, 16, generator=generator)


def by_the_paper(encoder: Encoder, decay: float) -> dict[str, float]:
    """From the last layer to the first, each one learning by `decay` more slowly: final norm, blocks, embeddings."""
    blocks = [f"blocks.{i}." for i in range(DEPTH)]
    layers = [("patch_embed.", "cls_token", "reg_token", "pos_embed"), *((block,) for block in blocks), ("norm.",)]
    found, scale = {}, 1.0
    for layer in reversed(layers):
        found |= {name: scale for name, _ in encoder.named_parameters() if name.startswith(layer)}
        scale *= decay
    return found


def test_rates_decay_from_the_last_layer_to_the_first(vit: ViT) -> None:
    wanted = by_the_paper(vit, 0.65)
    assert wanted.keys() == dict(vit.named_parameters()).keys()
    assert {name: rate_scale(name, vit.config, 0.65) for name in wanted} == pytest.approx(wanted)
    assert rate_scale("cls_token", vit.config, 0.65) == pytest.approx(0.65 ** (DEPTH + 1))


def test_a_resnets_stages_are_its_layers() -> None:
    config = ResNetConfig()
    names = ["conv1.weight", "bn1.bias", "layer1.0.conv1.weight", "layer4.1.bn2.weight"]
    assert [rate_scale(name, config, 0.5) for name in names] == [0.5**5, 0.5**5, 0.5**4, 0.5]


def test_the_optimizer_goes_by_these_rates(vit: ViT, finetune: Settings) -> None:
    settings = finetune(layer_decay=0.5, lr=0.1, warmup_epochs=0, weight_decay=0.3)
    objective = Classification(vit, 4, settings)
    optimizer = adamw(objective, settings)
    assert set_rates(optimizer, settings, 0, 100, 10) == {"lr": 0.1, "weight_decay": 0.3}
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    wanted = {f"encoder.{name}": scale for name, scale in by_the_paper(vit, 0.5).items()}
    wanted |= {"head.weight": 1.0, "head.bias": 1.0}
    found = {name: rates[id(p)] for name, p in objective.named_parameters()}
    assert found == pytest.approx({name: 0.1 * scale for name, scale in wanted.items()})


@pytest.mark.parametrize("blocks", ALL)
def test_tokens_are_those_of_the_whole_encoder(blocks: Any, vit: ViT, images: Tensor) -> None:
    torch.testing.assert_close(tokens(vit, images, blocks), vit(images), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("blocks", ALL)
@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_are_those_of_the_whole_where_it_is_trained_and_none_elsewhere(
    blocks: Any, recompute: bool, vit: ViT, images: Tensor
) -> None:
    vit.recompute = recompute
    target = torch.randn(vit(images).shape, generator=Generator().manual_seed(1))
    torch.autograd.backward((vit(images) * target).sum())
    whole = {name: p.grad for name, p in vit.named_parameters()}
    vit.zero_grad()
    freeze(vit, blocks)
    out = tokens(vit, images, blocks)
    if blocks == 0:
        assert not out.requires_grad
        return
    torch.autograd.backward((out * target).sum())
    for name, parameter in vit.named_parameters():
        if trained(name, blocks):
            torch.testing.assert_close(parameter.grad, whole[name], rtol=1e-4, atol=1e-5)
        else:
            assert parameter.grad is None


def trained(name: str, blocks: Any) -> bool:
    """By the definition: the last blocks, or the last one's second half, and the final norm."""
    if blocks in ("all", 0):
        return blocks == "all"
    last = f"blocks.{DEPTH - 1}."
    parts = (
        [f"{last}norm2.", f"{last}mlp."] if blocks == 0.5 else [f"blocks.{DEPTH - 1 - i}." for i in range(int(blocks))]
    )
    return name.startswith(("norm.", *parts))


@pytest.mark.parametrize("blocks", ALL)
def test_frozen_is_unchanged_to_the_bit_and_the_rest_is_changed(
    blocks: Any, vit: ViT, finetune: Settings, random_pixels: Tensor
) -> None:
    settings = finetune(blocks=blocks, warmup_epochs=0)
    objective = Classification(vit, 4, settings)
    torch.nn.init.normal_(objective.head.weight)  # else the first step's gradient ends there
    before = {name: p.detach().clone() for name, p in objective.named_parameters()}
    updater = Updater(objective, settings, torch.device("cpu"), torch.float32, 10, 5)
    for step in range(2):
        objective.labels.append(torch.arange(20) % 4)
        updater.update(random_pixels, step)
    for name, parameter in objective.named_parameters():
        kind, _, rest = name.partition(".")
        assert torch.equal(parameter, before[name]) != (kind == "head" or trained(rest, blocks)), name


def test_what_is_frozen_is_in_evaluation_mode(vit: ViT) -> None:
    freeze(vit, 1.0)
    set_modes(vit, True)
    assert [block.training for block in vit.blocks] == [False, False, True]
    assert (vit.patch_embed.training, vit.norm.training) == (False, True)
    set_modes(vit, False)
    assert not any(module.training for module in vit.modules())


@pytest.mark.parametrize("blocks", ["all", 0.0])
def test_a_frozen_resnet_keeps_its_statistics(blocks: Any, finetune: Settings, random_pixels: Tensor) -> None:
    settings = finetune(blocks=blocks, backbone="resnet18", width=None, depth=None, heads=None, registers=0)
    objective = Classification(build_encoder(settings.architecture), 4, settings)
    before = {name: value.clone() for name, value in objective.encoder.named_buffers()}
    objective.labels.append(torch.arange(4))
    updater = Updater(objective, settings, torch.device("cpu"), torch.float32, 10, 5)
    updater.update(random_pixels[:4], 0)
    same = [torch.equal(value, before[name]) for name, value in objective.encoder.named_buffers()]
    assert all(same) if blocks == 0 else not any(same)


def test_what_cannot_be_trained_is_refused(vit: ViT) -> None:
    with pytest.raises(InvalidRequest, match="--blocks 4: the encoder has 3 blocks"):
        freeze(vit, 4.0)
    with pytest.raises(InvalidRequest, match="--blocks 0.5: of a ResNet all is trained, or nothing"):
        freeze(build_encoder(ResNetConfig()), 0.5)
