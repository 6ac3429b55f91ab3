"""Encoders as timm builds them, asked as our own are: tokens, and the attention of their blocks."""

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from patchsight_serve.errors import InvalidRequest
from patchsight_train.encoder import Encoder
from patchsight_train.views import MEAN, STD


@dataclass(frozen=True)
class Layout:
    """What export asks of a ViT's or ResNet's configuration. A ResNet has no patches, heads and prefix tokens, a ViT
    without CLS token no heads to show and no prefix tokens."""

    image_size: int  # pixels
    width: int  # D
    grid: int  # patches, or cells of the last map, along one side
    patch_size: int | None = None
    heads: int | None = None
    prefix_tokens: int = 0


class PublicEncoder(Encoder):
    """A timm model behind the interface of `Encoder`. mean, std: what its training subtracted and divided by, of pixels
    in 0..1; pictures come as our own encoders take them, and go through one more linear map where that differs."""

    config: Any  # Layout
    model: Any  # timm's

    def __init__(self, model: nn.Module, config: Layout, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.model, self.config = model, config
        self.same = mean == MEAN and std == STD
        ours, theirs = (torch.tensor([m, s]).view(2, 1, 3, 1, 1) for m, s in ((MEAN, STD), (mean, std)))
        self.scale: Tensor
        self.shift: Tensor
        self.register_buffer("scale", ours[1] / theirs[1], persistent=False)
        self.register_buffer("shift", (ours[0] - theirs[0]) / theirs[1], persistent=False)

    def normalized(self, x: Tensor) -> Tensor:
        """From our normalization to the model's own."""
        return x if self.same else x * self.scale + self.shift


class PublicViT(PublicEncoder):
    """Any of timm's Vision Transformers: rotary positions, registers and layer scale are its own. Of one without CLS
    token the patch tokens alone are given: registers, which it may have, are of no use to anybody then."""

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.model.forward_features(self.normalized(x))
        return tokens if self.config.prefix_tokens else tokens[:, self.model.num_prefix_tokens :]

    @property
    def depth(self) -> int:
        return len(self.model.blocks)

    def attend(self, x: Tensor, blocks: Collection[int]) -> tuple[Tensor, list[Tensor]]:
        """The same tokens, and the attention weights `(N, h, T, T)` of these blocks, counted from 0, in their order:
        what the softmax gives, in rotary blocks as well."""
        seen: list[Tensor] = []
        with ExitStack() as stack:
            for number in blocks:
                stack.enter_context(_explicit(self.model.blocks[number].attn, seen))
            tokens = self(x)
        return tokens, seen


class PublicResNet(PublicEncoder):
    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.model.forward_features(self.normalized(x))
        return features.flatten(2).transpose(1, 2)


@contextmanager
def _explicit(attention: Any, seen: list[Tensor]) -> Iterator[None]:
    """While it lasts, the weights of this block's softmax are written out, and kept in `seen`."""
    fused, attention.fused_attn = attention.fused_attn, False
    handle = attention.attn_drop.register_forward_hook(lambda _module, _args, output: seen.append(output))
    try:
        yield
    finally:
        handle.remove()
        attention.fused_attn = fused


def wrap(model: Any, image_size: int, mean: tuple[float, ...], std: tuple[float, ...], what: str) -> PublicEncoder:
    """A timm model without its classifier, in evaluation mode.

    Raises:
        InvalidRequest: it is neither a ViT nor a ResNet, or its tokens are not what was trained.
    """
    from timm.models.eva import Eva
    from timm.models.resnet import ResNet
    from timm.models.vision_transformer import VisionTransformer

    model = model.eval()
    if isinstance(model, ResNet):
        cells = _cells(model, image_size)
        return PublicResNet(model, Layout(image_size, int(model.num_features), cells), mean, std)
    if not isinstance(model, VisionTransformer | Eva):
        raise InvalidRequest(f"{what}: is a {type(model).__name__}; Vision Transformers and ResNets can be exported")
    if not isinstance(model.fc_norm, nn.Identity):
        raise InvalidRequest(
            f"{what}: was trained to the end with labels: its last norm stands behind the mean of the tokens; export "
            "the encoder as it was before its fine-tuning"
        )
    (patch, _), (rows, columns) = model.patch_embed.patch_size, model.patch_embed.grid_size
    assert rows == columns
    if model.cls_token is None:  # no row of the attention to show, and no token in front that anybody asks for
        return PublicViT(model, Layout(image_size, int(model.embed_dim), rows, patch), mean, std)
    last: Any = model.blocks[-1]
    layout = Layout(
        image_size, int(model.embed_dim), rows, patch, int(last.attn.num_heads), int(model.num_prefix_tokens)
    )
    return PublicViT(model, layout, mean, std)


@torch.no_grad()
def _cells(model: Any, image_size: int) -> int:
    return int(model.forward_features(torch.zeros(1, 3, image_size, image_size)).shape[-1])
