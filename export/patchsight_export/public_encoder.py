"""Encoders as timm builds them, asked as our own are: tokens, and the attention of the last block."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from patchsight_serve.errors import InvalidRequest
from patchsight_train.encoder import Encoder
from patchsight_train.views import MEAN, STD


@dataclass(frozen=True)
class Layout:
    """What export asks of a ViT's or ResNet's configuration; a ResNet has no patches, heads and prefix tokens."""

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
    """Any of timm's Vision Transformers with a CLS token: rotary positions, registers and layer scale are its own."""

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.model.forward_features(self.normalized(x))
        return tokens

    def with_attention(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The same tokens, and the last block's attention weights `(N, h, T, T)`: what its softmax gives."""
        attention = last_attention(self.model)
        seen: list[Tensor] = []
        fused, attention.fused_attn = attention.fused_attn, False  # the explicit softmax, in this block alone
        handle = attention.attn_drop.register_forward_hook(lambda _module, _args, output: seen.append(output))
        try:
            tokens = self(x)
        finally:
            handle.remove()
            attention.fused_attn = fused
        return tokens, seen[-1]


class PublicResNet(PublicEncoder):
    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.model.forward_features(self.normalized(x))
        return features.flatten(2).transpose(1, 2)


def last_attention(model: Any) -> Any:
    return model.blocks[-1].attn


def wrap(model: Any, image_size: int, mean: tuple[float, ...], std: tuple[float, ...], what: str) -> PublicEncoder:
    """A timm model without its classifier, in evaluation mode.

    Raises:
        InvalidRequest: it is neither a ViT with a CLS token nor a ResNet.
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
    if model.cls_token is None:
        raise InvalidRequest(f"{what}: has no CLS token, so that its attention is not defined here")
    if not isinstance(model.fc_norm, nn.Identity):
        raise InvalidRequest(
            f"{what}: was trained to the end with labels: its last norm stands behind the mean of the tokens; export "
            "the encoder as it was before its fine-tuning"
        )
    (patch, _), (rows, columns) = model.patch_embed.patch_size, model.patch_embed.grid_size
    assert rows == columns
    heads = int(last_attention(model).num_heads)
    layout = Layout(image_size, int(model.embed_dim), rows, patch, heads, int(model.num_prefix_tokens))
    return PublicViT(model, layout, mean, std)


@torch.no_grad()
def _cells(model: Any, image_size: int) -> int:
    return int(model.forward_features(torch.zeros(1, 3, image_size, image_size)).shape[-1])
