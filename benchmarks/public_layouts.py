"""Checkpoints as DINO, MAE, DINOv2, lightly and others lay them out, small and with random weights, each beside the
network of timm or torchvision whose weights they are: the oracle of the tests and of `public_encoders.py`."""

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from lightly.models import ResNetGenerator
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

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


RESNETS = ("torchvision, 18", "torchvision, 50", "lightly, 18", "lightly, small")


def rotary() -> Any:
    """DINOv3's parts: rotary positions, registers, layer scale."""
    torch.manual_seed(0)
    return randomized(Eva(
        img_size=28, patch_size=7, embed_dim=128, depth=3, num_heads=2, num_classes=0, use_abs_pos_emb=False,
        use_rot_pos_emb=True, num_reg_tokens=4, init_values=1.0, global_pool="token", use_fc_norm=False,
    ))  # fmt: skip


def resnet(layout: str) -> tuple[Callable[[Tensor], Tensor], State]:
    """The map before pooling of a torchvision or lightly network, and its weights as they are found."""
    if layout == "lightly, small":
        network = randomized(ResNetGenerator("resnet-18"))
        trunk = nn.Sequential(*list(network.children())[:-1], nn.AdaptiveAvgPool2d(1))
        return trunk[:-1], {"state_dict": prefixed(trunk.state_dict(), "backbone.")}
    network = randomized(torchvision.models.resnet50() if "50" in layout else torchvision.models.resnet18())
    trunk = nn.Sequential(*list(network.children())[:-2])
    if layout.startswith("lightly"):
        return trunk, {"state_dict": prefixed(trunk.state_dict(), "backbone.")}
    return trunk, {"state_dict": network.state_dict()}


def attention_by_hand(model: Any, x: Tensor) -> Tensor:
    """softmax(q kᵀ / √d) of the last block, from its own parts."""
    tokens = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    for block in model.blocks[:-1]:
        tokens = block(tokens)
    last = model.blocks[-1]
    N, T, D = tokens.shape
    heads = last.attn.num_heads
    q, k, _ = last.attn.qkv(last.norm1(tokens)).reshape(N, T, 3, heads, D // heads).permute(2, 0, 3, 1, 4)
    return torch.softmax(q @ k.transpose(-2, -1) * (D // heads) ** -0.5, dim=-1)
