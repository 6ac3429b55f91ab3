"""Checkpoints as DINO, MAE, DINOv2, lightly and others lay them out, small and with random weights, each beside the
network of timm or torchvision whose weights they are: the oracle of the tests and of `public_encoders.py`."""

import argparse
import re
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from lightly.models import ResNetGenerator
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

State = dict[str, Any]


def randomized(model: nn.Module) -> Any:
    """Weights far from their start, so that nothing is uniform, and statistics of batch norm that are not 0 and 1."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-0.2, 0.2)  # type: ignore[union-attr]
                module.running_var.uniform_(0.7, 1.4)  # type: ignore[union-attr]
    return model.eval()


def vit(**settings: Any) -> Any:
    torch.manual_seed(0)
    small = {"img_size": 28, "patch_size": 7, "embed_dim": 128, "depth": 3, "num_heads": 2, "num_classes": 0}
    return randomized(VisionTransformer(**(small | settings)))


def prefixed(state: State, prefix: str) -> State:
    return {f"{prefix}{name}": x for name, x in state.items()}


def dinov2(model: Any) -> State:
    """Meta's names: registers, and a position for CLS, which timm has added to CLS where there are registers."""
    state = dict(model.state_dict())
    if "reg_token" in state:
        state["register_tokens"] = state.pop("reg_token")
        position = torch.full_like(state["cls_token"], 0.3)
        state["cls_token"] = state["cls_token"] - position
        state["pos_embed"] = torch.cat([position, state["pos_embed"]], dim=1)
    return state | {"mask_token": torch.zeros(1, 128)}


def chunked(state: State) -> State:
    """Blocks in two chunks, as a training with block_chunks keeps them."""
    chunk = {"0": "blocks.0.0", "1": "blocks.0.1", "2": "blocks.1.2"}
    return {
        f"{chunk[name.split('.')[1]]}.{name.split('.', 2)[2]}" if name.startswith("blocks.") else name: x
        for name, x in state.items()
    }


def plain_dino() -> tuple[Any, State]:
    model = vit()
    return model, model.state_dict()


def full_dino() -> tuple[Any, State]:
    teacher, student = vit(), vit().state_dict()
    student = {name: x + 1 for name, x in student.items()}
    head = {"head.mlp.0.weight": torch.ones(4, 128), "head.last_layer.weight_g": torch.ones(9, 1)}
    return teacher, {
        "student": prefixed(student | head, "module."),  # not `backbone.`, so that only the name tells them apart
        "teacher": prefixed(teacher.state_dict(), "backbone.") | head,
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        "epoch": 100,
        "args": argparse.Namespace(arch="vit_small", lr=0.0005),
    }


def mae() -> tuple[Any, State]:
    model = vit()
    decoder = {"mask_token": torch.zeros(1, 1, 64), "decoder_embed.weight": torch.ones(64, 128),
               "decoder_blocks.0.norm1.weight": torch.ones(64)}  # fmt: skip
    return model, {"model": model.state_dict() | decoder, "epoch": 3, "scaler": {"scale": 2.0}}


def plain_dinov2() -> tuple[Any, State]:
    model = vit(init_values=1.0)
    return model, dinov2(model)


def registers() -> tuple[Any, State]:
    model = vit(init_values=1.0, reg_tokens=4, no_embed_class=True)
    return model, dinov2(model)


def dinov2_teacher() -> tuple[Any, State]:
    model = vit(init_values=1.0)
    return model, {
        "teacher": prefixed(chunked(dinov2(model)), "backbone.") | {"dino_head.mlp.0.weight": torch.ones(2, 2)}
    }


def gated() -> tuple[Any, State]:
    from timm.layers import SwiGLUPacked  # type: ignore[attr-defined]

    model = vit(init_values=1.0, mlp_layer=SwiGLUPacked, act_layer=nn.SiLU)
    names = {"fc1": "w12", "fc2": "w3"}
    state = {}
    for name, x in dinov2(model).items():
        for ours, theirs in names.items():
            name = name.replace(f".mlp.{ours}.", f".mlp.{theirs}.")
        state[name] = x
    return model, state


def lightning() -> tuple[Any, State]:
    """lightly's benchmarks: a Lightning checkpoint with two networks and heads."""
    model = vit()
    other = {name: x * 2 for name, x in model.state_dict().items()}
    state = prefixed(model.state_dict(), "teacher_backbone.vit.") | prefixed(other, "backbone.vit.")
    return model, {
        "state_dict": state | {"projection_head.layers.0.weight": torch.ones(3, 128)},
        "pytorch-lightning_version": "2",
    }


def solo() -> tuple[Any, State]:
    model = vit()
    other = {name: x * 2 for name, x in model.state_dict().items()}
    return model, {"state_dict": prefixed(model.state_dict(), "backbone.") | prefixed(other, "momentum_backbone.")}


VITS: dict[str, Callable[[], tuple[Any, State]]] = {
    "DINO, backbone": plain_dino, "DINO, full": full_dino, "MAE": mae, "DINOv2": plain_dinov2,
    "DINOv2, registers": registers, "DINOv2, training": dinov2_teacher, "DINOv2, SwiGLU": gated,
    "lightly, Lightning": lightning, "solo-learn": solo,
}  # fmt: skip


# "wide": SimCLR's, of twice the width, converted from TensorFlow; "SimCLRv2": the same with numbers for names.
RESNETS = (
    "torchvision, 18", "torchvision, 50", "lightly, 18", "lightly, small", "SimCLR, wide", "SimCLR, wide, 18",
    "SimCLRv2, wide",
)  # fmt: skip


def rotary(**settings: Any) -> Any:
    """EVA's rotary positions with DINOv3's registers and layer scale."""
    torch.manual_seed(0)
    return randomized(Eva(
        img_size=28, patch_size=7, embed_dim=128, depth=3, num_heads=2, num_classes=0, use_abs_pos_emb=False,
        use_rot_pos_emb=True, num_reg_tokens=4, init_values=1.0, global_pool="token", use_fc_norm=False, **settings,
    ))  # fmt: skip


def dinov3(**settings: Any) -> Any:
    """timm's DINOv3, whose positions go from -1 to 1 at any size: another kind of rotary ones than EVA's."""
    return rotary(rope_type="dinov3", rope_rotate_half=True, **settings)


def without_cls(**settings: Any) -> Any:
    """As SigLIP's: patch tokens alone."""
    return vit(class_token=False, global_pool="avg", fc_norm=False, **settings)


class WideResNet(nn.Module):
    """SimCLR's, arXiv:2002.05709: torchvision's network, `times` as wide everywhere. The map before pooling."""

    def __init__(self, times: int, depths: tuple[int, ...] = (1, 2, 1, 1), block: Any = Bottleneck) -> None:
        super().__init__()
        width = 64 * times
        self.conv1 = nn.Conv2d(3, width, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        for i, depth in enumerate(depths):
            planes, layer = 64 * times * 2**i, []
            for j in range(depth):
                stride, out = (2 if i and not j else 1), planes * block.expansion
                down = None
                if stride > 1 or width != out:
                    down = nn.Sequential(nn.Conv2d(width, out, 1, stride, bias=False), nn.BatchNorm2d(out))
                layer.append(block(width, planes, stride, down))
                width = out
            setattr(self, f"layer{i + 1}", nn.Sequential(*layer))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.max_pool2d(self.bn1(self.conv1(x)).relu(), 3, stride=2, padding=1)
        for i in (1, 2, 3, 4):
            x = getattr(self, f"layer{i}")(x)
        return x


def simclr_v2(state: State) -> State:
    """torchvision's names to those of SimCLRv2's ResNets as they are converted from TensorFlow."""
    named = {}
    for name, x in state.items():
        name = re.sub(r"^conv1\.", "net.0.0.", name)
        name = re.sub(r"^bn1\.", "net.0.1.0.", name)
        name = re.sub(r"^layer(\d)\.(\d+)\.", r"net.\1.blocks.\2.", name)
        name = name.replace(".downsample.0.", ".projection.shortcut.").replace(".downsample.1.", ".projection.bn.0.")
        name = re.sub(r"\.conv(\d)\.", lambda found: f".net.{2 * int(found[1]) - 2}.", name)
        name = re.sub(r"\.bn(\d)\.", lambda found: f".net.{2 * int(found[1]) - 1}.0.", name)
        named[name] = x
    return named


def resnet(layout: str) -> tuple[Callable[[Tensor], Tensor], State]:
    """The map before pooling of a torchvision or lightly network, and its weights as they are found."""
    if layout == "lightly, small":
        network = randomized(ResNetGenerator("resnet-18"))
        trunk = nn.Sequential(*list(network.children())[:-1], nn.AdaptiveAvgPool2d(1))
        return trunk[:-1], {"state_dict": prefixed(trunk.state_dict(), "backbone.")}
    if layout.startswith("SimCLR"):
        wide = randomized(WideResNet(2, block=BasicBlock) if "18" in layout else WideResNet(2))
        if "v2" not in layout:
            return wide, {"state_dict": wide.state_dict() | {"fc.weight": torch.ones(10, 4096)}}
        state = simclr_v2(wide.state_dict()) | {"fc.weight": torch.ones(10, 4096)}
        return wide, {"resnet": state, "head": {"layers.0.weight": torch.ones(4, 4096)}}
    network = randomized(torchvision.models.resnet50() if "50" in layout else torchvision.models.resnet18())
    trunk = nn.Sequential(*list(network.children())[:-2])
    if layout.startswith("lightly"):
        return trunk, {"state_dict": prefixed(trunk.state_dict(), "backbone.")}
    return trunk, {"state_dict": network.state_dict()}


def attention_by_hand(model: Any, x: Tensor, number: int = -1) -> Tensor:
    """softmax(q kᵀ / √d) of a block, from its own parts; q and k of the patches turned where positions are rotary."""
    tokens, more = model._pos_embed(model.patch_embed(x)), {}
    if isinstance(model, Eva):
        tokens, more["rope"] = tokens
    tokens = model.norm_pre(tokens)
    before = range(number % len(model.blocks))
    for i in before:
        tokens = model.blocks[i](tokens, **more)
    block = model.blocks[number]
    N, T, D = tokens.shape
    heads = block.attn.num_heads
    qkv = block.attn.qkv(block.norm1(tokens))
    if getattr(block.attn, "q_bias", None) is not None:  # timm's Eva keeps the biases apart, and has none for keys
        qkv = qkv + torch.cat([block.attn.q_bias, torch.zeros(D), block.attn.v_bias])
    q, k, _ = qkv.reshape(N, T, 3, heads, D // heads).permute(2, 0, 3, 1, 4)
    if more:
        P, half = model.num_prefix_tokens, model.rope.rotate_half
        q, k = (torch.cat([z[:, :, :P], turned(z[:, :, P:], more["rope"], half)], dim=2) for z in (q, k))
    return torch.softmax(q @ k.transpose(-2, -1) * (D // heads) ** -0.5, dim=-1)


def turned(x: Tensor, rope: Tensor, half: bool) -> Tensor:
    """`(N, h, L, d)` with each pair of numbers turned by its angle, as a complex number; rope: sines, then cosines. A
    pair is two neighbors, or a number and the one half of d further on."""
    d = x.shape[-1]
    first, second = (slice(0, d // 2), slice(d // 2, d)) if half else (slice(0, d, 2), slice(1, d, 2))
    angle = torch.complex(rope[:, d:][:, first], rope[:, :d][:, first])
    pairs = torch.complex(x[..., first], x[..., second]) * angle
    out = torch.empty_like(x)
    out[..., first], out[..., second] = pairs.real, pairs.imag
    return out


def rollout_by_hand(model: Any, x: Tensor) -> Tensor:
    """arXiv:2005.00928 as it is written: the product of all blocks' (mean over heads + identity) / 2, `(N, T, T)`."""
    product = torch.eye(1)
    for number in range(len(model.blocks)):
        mean = attention_by_hand(model, x, number).double().mean(dim=1)
        block = mean + torch.eye(mean.shape[-1])
        block = block / block.sum(dim=-1, keepdim=True)
        product = block if number == 0 else block @ product
    return product
