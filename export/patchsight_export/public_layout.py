"""From a checkpoint's tensors to the timm model that they are the weights of, with every name accounted for.

Official files differ in how they call things, not in what they compute: DINO and MAE have timm's names; DINOv2 calls
its registers `register_tokens` and gives CLS alone a position; Meta's training code cuts the blocks into chunks;
lightly puts a ResNet into a Sequential, which turns names into numbers.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from patchsight_serve.errors import InvalidRequest
from patchsight_train.checkpoint import differences

Weights = Mapping[str, Tensor]

# Of the pretraining, not of the encoder: mask tokens, classifiers, decoders.
UNUSED = re.compile(r"mask_token|pos_embed_new|rope_embed\.periods|head\.|fc\.|decoder_|pre_logits\.|.*bias_mask$")
CHUNK = re.compile(r"blocks\.\d+\.(\d+)\.")  # blocks cut into chunks: the second number is the block's own
HEADS = {1280: 16}  # by width, where a head is not 64 wide: MAE's ViT-H
LIGHTLY = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}  # torchvision's ResNet
# lightly's own, without pooling
LIGHTLY_SMALL = {"0": "conv1", "1": "bn1", "2": "layer1", "3": "layer2", "4": "layer3", "5": "layer4"}
LARGEST = 224  # pixels, unless more is asked for: DINOv2 was trained to its end at 518, and is evaluated at 224


def build_model(
    weights: Weights, image_size: int | None, heads: int | None, what: str
) -> tuple[nn.Module, int, list[str]]:
    """The model with these weights, the image size it takes, and the names that belong to pretraining alone.

    Raises:
        InvalidRequest: a tensor is missing, unknown or of another shape than the rest calls for; all are listed.
    """
    unused = sorted(name for name in weights if UNUSED.match(name))
    kept = {name: x for name, x in weights.items() if name not in set(unused)}
    if "patch_embed.proj.weight" in kept:
        model, size, named = _vit(kept, image_size, heads, what)
    else:
        model, size, named = _resnet(kept, image_size, what)
    _load(model, named, what)
    return model.eval(), size, unused


def _vit(
    weights: Weights, image_size: int | None, heads: int | None, what: str
) -> tuple[nn.Module, int, dict[str, Tensor]]:
    from timm.layers import SwiGLUPacked, resample_abs_pos_embed  # type: ignore[attr-defined]
    from timm.models.vision_transformer import VisionTransformer

    named = _vit_names(weights)
    width, _, patch, _ = named["patch_embed.proj.weight"].shape
    if "pos_embed" not in named or "cls_token" not in named:
        raise InvalidRequest(
            f"{what}: has no pos_embed and cls_token; a model of another kind (rotary positions, say) is exported as "
            f"timm:NAME --checkpoint {what}"
        )
    registers = named["reg_token"].shape[1] if "reg_token" in named else 0
    positions = named["pos_embed"]
    if registers:  # positions of CLS and the patches: CLS keeps its own by having it added once and for all
        named["cls_token"] = named["cls_token"] + positions[:, :1]
        named["pos_embed"] = positions[:, 1:]
    grid = math.isqrt(positions.shape[1] - 1)
    if grid**2 + 1 != positions.shape[1]:
        raise InvalidRequest(f"{what}: pos_embed has {positions.shape[1]} positions, not one for CLS and a square's")
    size = image_size or min(grid * patch, LARGEST // patch * patch)
    if size % patch:
        raise InvalidRequest(f"--image-size {size} is not a multiple of {what}'s patches of {patch}")
    if size // patch != grid:
        prefix = 0 if registers else 1
        named["pos_embed"] = resample_abs_pos_embed(
            named["pos_embed"], [size // patch] * 2, [grid, grid], num_prefix_tokens=prefix
        )
    depth = 1 + max(int(name.split(".")[1]) for name in named if name.startswith("blocks."))
    gated = "blocks.0.mlp.w12.weight" in weights
    first = named["blocks.0.mlp.fc1.weight"].shape[0] if "blocks.0.mlp.fc1.weight" in named else 4 * width
    feed_forward: dict[str, Any] = {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU} if gated else {}
    model = VisionTransformer(
        img_size=size, patch_size=patch, embed_dim=width, depth=depth, num_heads=heads or HEADS.get(width, width // 64),
        mlp_ratio=first / width, num_classes=0, reg_tokens=registers, no_embed_class=bool(registers),
        qkv_bias="blocks.0.attn.qkv.bias" in named, init_values=1.0 if "blocks.0.ls1.gamma" in named else None,
        **feed_forward,
    )  # fmt: skip
    return model, size, named


def _vit_names(weights: Weights) -> dict[str, Tensor]:
    """As timm calls them."""
    named = {}
    for name, x in weights.items():
        name = CHUNK.sub(r"blocks.\1.", name)
        name = re.sub(r"^(register_tokens|storage_tokens)$", "reg_token", name)
        name = re.sub(r"\.gamma_([12])$", r".ls\1.gamma", name)
        name = name.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2.")
        named[name] = x
    return named


def _resnet(weights: Weights, image_size: int | None, what: str) -> tuple[nn.Module, int, dict[str, Tensor]]:
    from timm.models.resnet import BasicBlock, Bottleneck, ResNet

    named = _resnet_names(weights)
    layers = [{int(n.split(".")[1]) for n in named if n.startswith(f"layer{i}.")} for i in (1, 2, 3, 4)]
    if not all(layers) or "conv1.weight" not in named:
        raise InvalidRequest(f"{what}: begins like a ResNet, but has not its four layers; there is {_few(named)}")
    if named["conv1.weight"].shape[0] != 64:
        raise InvalidRequest(
            f"{what}: is a ResNet {named['conv1.weight'].shape[0] / 64:g} times as wide as usual; only the usual "
            "width is supported"
        )
    block: Any = Bottleneck if "layer1.0.conv3.weight" in named else BasicBlock
    model: Any = ResNet(block, tuple(len(found) for found in layers), num_classes=0)
    small = named["conv1.weight"].shape[-1] == 3
    if small:  # for small pictures: 3 × 3, stride 1, no pooling (arXiv:2002.05709, App. B.9)
        model.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
        model.maxpool = nn.Identity()
    if "2.0.conv1.weight" in weights:
        model.act1 = nn.Identity()  # lightly's own network in a Sequential loses the ReLU that its forward has here
    return model, image_size or (32 if small else 224), named


def _resnet_names(weights: Weights) -> dict[str, Tensor]:
    """As torchvision and timm call them."""
    numbers = {}
    if "0.weight" in weights:
        numbers = LIGHTLY_SMALL if any(name.startswith("2.") for name in weights) else LIGHTLY
    named = {}
    for name, x in weights.items():
        first, _, rest = name.partition(".")
        named[f"{numbers.get(first, first)}.{rest}".replace(".shortcut.", ".downsample.")] = x
    return named


def _load(model: nn.Module, weights: dict[str, Tensor], what: str) -> None:
    counts = {name: x for name, x in model.state_dict().items() if name.endswith("num_batches_tracked")}
    weights = counts | weights  # which may be missing: they count batches, in training alone
    if wrong := differences(model.state_dict(), weights):
        raise InvalidRequest(f"{what}: does not fit the model that it describes: " + "; ".join(wrong))
    model.load_state_dict(weights)
    if broken := [name for name, x in weights.items() if not torch.isfinite(x).all()]:
        raise InvalidRequest(f"{what}: {broken[0]} holds values that are not finite")


def _few(names: Weights) -> str:
    return ", ".join(sorted(names)[:4])
