"""From a vector back to a picture: the decoder of the autoencoders.

Letters: N images, Z numbers in z, L patches, p patch size, d decoder width, D encoder width.
"""

import torch
from torch import Tensor, nn

from patchsight_train.architecture import EncoderConfig, ViTConfig
from patchsight_train.objective_settings import AutoencoderSettings
from patchsight_train.vit import Block, sincos_positions


class PixelDecoder(nn.Module):
    """z `(N, Z)` to the pixels of all patches `(N, L, p·p·3)`, in the order of `mae.unpatchify`.

    Each patch starts as the same projection of z plus its sine-cosine position; nothing else comes in.
    """

    def __init__(self, config: EncoderConfig, settings: AutoencoderSettings) -> None:
        super().__init__()
        d = settings.decoder_width
        self.patch_size = patch_size(config)
        self.embed = nn.Linear(settings.bottleneck, d)
        self.positions: Tensor
        self.register_buffer("positions", sincos_positions(d, config.image_size // self.patch_size)[None])
        self.blocks = nn.ModuleList(Block(d, settings.decoder_heads, 4.0) for _ in range(settings.decoder_depth))
        self.norm = nn.LayerNorm(d, eps=1e-6)
        self.pixels = nn.Linear(d, self.patch_size**2 * 3)

    def start(self, z: Tensor) -> Tensor:
        """`(N, Z)` to tokens `(N, L, d)`."""
        return self.embed(z).unsqueeze(1) + self.positions

    def finish(self, x: Tensor) -> Tensor:
        """Tokens `(N, L, d)` to pixels `(N, L, p·p·3)`."""
        out: Tensor = self.pixels(self.norm(x))
        return out

    def forward(self, z: Tensor) -> Tensor:
        x = self.start(z)
        for block in self.blocks:
            x = block(x)
        return self.finish(x)


class SkipDecoder(PixelDecoder):
    """The same, where each block also sees a layer of the encoder: last layers first, as in a U-Net.

    A layer is joined by a linear map of the concatenation, what U-ViT found best (arXiv:2209.12152, section 3.1).
    """

    def __init__(self, config: ViTConfig, settings: AutoencoderSettings) -> None:
        super().__init__(config, settings)
        d, depth = settings.decoder_width, settings.decoder_depth
        # Whatever the two depths, the first block sees the encoder's last layer and the last block its first.
        self.layers = [(config.depth - 1) * (depth - 1 - i) // max(depth - 1, 1) for i in range(depth)]
        self.joints = nn.ModuleList(nn.Linear(d + config.width, d) for _ in range(depth))

    def forward(self, z: Tensor, layers: list[Tensor] | None = None) -> Tensor:
        """layers: the patch tokens `(N, L, D)` behind each of the encoder's blocks."""
        assert layers is not None
        x = self.start(z)
        for block, joint, i in zip(self.blocks, self.joints, self.layers, strict=True):
            x = block(joint(torch.cat([x, layers[i]], dim=-1)))
        return self.finish(x)


def patch_size(config: EncoderConfig) -> int:
    """p: a ViT's own; for a ResNet what gives at most 8 × 8 patches, the cells that it has at 64 pixels."""
    if isinstance(config, ViTConfig):
        return config.patch_size
    grid = max(g for g in range(1, 9) if config.image_size % g == 0)
    return config.image_size // grid
