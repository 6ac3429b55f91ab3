"""From a checkpoint's tensors to the timm model that they are the weights of, with every name accounted for.

Official files differ in how they call things, not in what they compute: DINO and MAE have timm's names; DINOv2 calls
its registers `register_tokens` and gives CLS alone a position; Meta's training code cuts the blocks into chunks;
lightly puts a ResNet into a Sequential, which turns names into numbers. SimCLR's ResNets, converted from TensorFlow,
have torchvision's names and up to four times the width; those of SimCLRv2 have numbers.
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
UNUSED = re.compile(
    r"mask_token|pos_embed_new|rope_embed\.periods|head\.|fc\.|decoder_|pre_logits\.|attn_pool\.|.*bias_mask$"
)
CHUNK = re.compile(r"blocks\.\d+\.(\d+)\.")  # blocks cut into chunks: the second number is the block's own
HEADS = {1280: 16}  # by width, where a head is not 64 wide: MAE's ViT-H
LIGHTLY = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}  # torchvision's ResNet
# lightly's own, without pooling
LIGHTLY_SMALL = {"0": "conv1", "1": "bn1", "2": "layer1", "3": "layer2", "4": "layer3", "5": "layer4"}
CONVERTED = re.compile(r"net\.[1-4]\.blocks\.")  # SimCLRv2's ResNets, as they are converted from TensorFlow
SELECTIVE = re.compile(r"main_conv|mixing_conv")
LARGEST = 224  # pixels, unless more is asked for: DINOv2 was trained to its end at 518, and is evaluated at 224


def build_model(
    weights: Weights, image_size: int | None, heads: int | None, what: str, dynamic: bool = False
) -> tuple[nn.Module, int, list[str]]:
    """The model with these weights, the image size it takes, and the names that belong to pretraining alone.

    dynamic: it takes other image sizes, too.

    Raises:
        InvalidRequest: a tensor is missing, unknown or of another shape than the rest calls for; all are listed.
    """
    unused = sorted(name for name in weights if UNUSED.match(name))
    kept = {name: x for name, x in weights.items() if name not in set(unused)}
    if "patch_embed.proj.weight" in kept:
        model, size, named = _vit(kept, image_size, heads, what, dynamic)
    else:
        model, size, named = _resnet(kept, image_size, what)
    _load(model, named, what)
    return model.eval(), size, unused


def _vit(
    weights: Weights, image_size: int | None, heads: int | None, what: str, dynamic: bool
) -> tuple[nn.Module, int, dict[str, Tensor]]:
    from timm.layers import SwiGLUPacked, resample_abs_pos_embed  # type: ignore[attr-defined]
    from timm.models.vision_transformer import VisionTransformer

    named = _vit_names(weights)
    width, _, patch, _ = named["patch_embed.proj.weight"].shape
    if "pos_embed" not in named:
        raise InvalidRequest(
            f"{what}: has no pos_embed; a model of another kind (rotary positions, say) is exported as "
            f"timm:NAME --checkpoint {what}"
        )
    registers = named["reg_token"].shape[1] if "reg_token" in named else 0
    positions, cls = named["pos_embed"], int("cls_token" in named)
    if registers and cls:  # positions of CLS and the patches: CLS keeps its own by having it added once and for all
        named["cls_token"] = named["cls_token"] + positions[:, :1]
        named["pos_embed"] = positions[:, 1:]
    grid = math.isqrt(positions.shape[1] - cls)
    if grid**2 + cls != positions.shape[1]:
        also = "one for CLS and " if cls else ""
        raise InvalidRequest(f"{what}: pos_embed has {positions.shape[1]} positions, not {also}a square's")
    size = image_size or min(grid * patch, LARGEST // patch * patch)
    if size % patch:
        raise InvalidRequest(f"--image-size {size} is not a multiple of {what}'s patches of {patch}")
    if size // patch != grid:
        prefix = 0 if registers else cls
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
        class_token=bool(cls), global_pool="token" if cls else "avg", fc_norm=False, dynamic_img_size=dynamic,
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
    if selective := [name for name in weights if SELECTIVE.search(name)]:
        raise InvalidRequest(f"{what}: is a ResNet with selective kernels ({selective[0]}), which are not supported")
    block: Any = Bottleneck if "layer1.0.conv3.weight" in named else BasicBlock
    width = named["conv1.weight"].shape[0]  # 64, or a multiple: SimCLR's are up to four times as wide
    model: Any = ResNet(block, tuple(map(len, layers)), num_classes=0, channels=tuple(width * i for i in (1, 2, 4, 8)))
    if width != 64:
        _widen(model, width)
    small = named["conv1.weight"].shape[-1] == 3
    if small:  # for small pictures: 3 × 3, stride 1, no pooling (arXiv:2002.05709, App. B.9)
        model.conv1 = nn.Conv2d(3, width, kernel_size=3, padding=1, bias=False)
        model.maxpool = nn.Identity()
    if "2.0.conv1.weight" in weights:
        model.act1 = nn.Identity()  # lightly's own network in a Sequential loses the ReLU that its forward has here
    return model, image_size or (32 if small else 224), named


def _widen(model: Any, width: int) -> None:
    """timm's layers can be of any width, but not what comes before them: the stem, and what takes the stem's output."""
    first = model.layer1[0]
    model.conv1 = nn.Conv2d(3, width, kernel_size=7, stride=2, padding=3, bias=False)
    model.bn1 = nn.BatchNorm2d(width)
    kernel = first.conv1.kernel_size
    first.conv1 = nn.Conv2d(width, first.conv1.out_channels, kernel, padding=kernel[0] // 2, bias=False)
    if hasattr(first, "conv3"):
        first.downsample[0] = nn.Conv2d(width, first.downsample[0].out_channels, kernel_size=1, bias=False)
    else:
        first.downsample = None  # the stem's output is as wide as the block's, and is added as it is


def _resnet_names(weights: Weights) -> dict[str, Tensor]:
    """As torchvision and timm call them."""
    if any(CONVERTED.match(name) for name in weights):
        return _converted_names(weights)
    numbers = {}
    if "0.weight" in weights:
        numbers = LIGHTLY_SMALL if any(name.startswith("2.") for name in weights) else LIGHTLY
    named = {}
    for name, x in weights.items():
        first, _, rest = name.partition(".")
        named[f"{numbers.get(first, first)}.{rest}".replace(".shortcut.", ".downsample.")] = x
    return named


def _converted_names(weights: Weights) -> dict[str, Tensor]:
    """Of SimCLRv2's ResNets as they are converted from TensorFlow: `net.0` is the stem, `net.1` to `net.4` the layers,
    and within a block `net.0` to `net.5` alternate convolutions and norms."""
    named = {}
    for name, x in weights.items():
        name = re.sub(r"^net\.0\.0\.", "conv1.", name)
        name = re.sub(r"^net\.0\.1\.0\.", "bn1.", name)
        name = re.sub(r"^net\.(\d)\.blocks\.", r"layer\1.", name)
        name = name.replace(".projection.shortcut.", ".downsample.0.").replace(".projection.bn.0.", ".downsample.1.")
        for i in (1, 2, 3):
            name = name.replace(f".net.{2 * i - 2}.", f".conv{i}.").replace(f".net.{2 * i - 1}.0.", f".bn{i}.")
        named[name] = x
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
