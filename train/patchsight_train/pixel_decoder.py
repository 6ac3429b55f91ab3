"""From a vector back to a picture: what the decoders of both autoencoders share.

Letters: N images, Z numbers in z, L patches, p patch size, d decoder width.
"""

from torch import Tensor, nn

from patchsight_train.architecture import EncoderConfig, ViTConfig
from patchsight_train.objective_settings import AutoencoderSettings
from patchsight_train.vit import Block, sincos_positions


class PixelDecoder(nn.Module):
    """Transformer blocks between z and pixels. Each patch starts as a projection of z of its own, plus its position.

    `forward` takes z `(N, Z)`, and what else a subclass asks for, to pixels `(N, L, p·p·3)`, in the order of
    `mae.unpatchify`.
    """

    positions: Tensor

    def __init__(self, config: EncoderConfig, settings: AutoencoderSettings) -> None:
        super().__init__()
        d = settings.decoder_width
        self.patch_size = patch_size(config)
        self.register_buffer("positions", sincos_positions(d, config.image_size // self.patch_size)[None])  # (1, L, d)
        self.embed = nn.Linear(settings.bottleneck, self.positions.shape[1] * d)
        self.blocks = nn.ModuleList(Block(d, settings.decoder_heads, 4.0) for _ in range(settings.decoder_depth))
        self.norm = nn.LayerNorm(d, eps=1e-6)
        self.pixels = nn.Linear(d, self.patch_size**2 * 3)

    def start(self, z: Tensor) -> Tensor:
        """`(N, Z)` to tokens `(N, L, d)`."""
        tokens: Tensor = self.embed(z).view(len(z), *self.positions.shape[1:]) + self.positions
        return tokens

    def finish(self, tokens: Tensor) -> Tensor:
        """Tokens `(N, L, d)` to pixels `(N, L, p·p·3)`."""
        out: Tensor = self.pixels(self.norm(tokens))
        return out


def patch_size(config: EncoderConfig) -> int:
    """p: a ViT's own; for a ResNet that of 8 × 8 patches, or of the most below that divide its picture."""
    if isinstance(config, ViTConfig):
        return config.patch_size
    grid = max(g for g in range(1, 9) if config.image_size % g == 0)
    return config.image_size // grid
