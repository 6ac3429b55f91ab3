"""The autoencoder with skip connections, as in a U-Net (arXiv:1505.04597): why shortcuts teach an encoder little.

Its decoder also sees what the encoder's layers know of each patch. Pixels need not pass through z at all, so that
reconstruction is easy and z idle. All else is as in `autoencoder`. Letters also: D encoder width, d decoder width.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from patchsight_train.architecture import EncoderConfig
from patchsight_train.autoencoder import Autoencoder
from patchsight_train.objective_settings import AutoencoderSettings, SkipAutoencoderSettings
from patchsight_train.pixel_decoder import PixelDecoder
from patchsight_train.vit import ViT


class SkipDecoder(PixelDecoder):
    """z `(N, Z)` and the encoder's layers to pixels `(N, L, p·p·3)`.

    Before each block a linear map joins the decoder's tokens and a layer's, the way that U-ViT found best
    (arXiv:2209.12152, section 3.1): the last layer first, as in a U-Net.
    """

    def __init__(self, config: EncoderConfig, settings: AutoencoderSettings) -> None:
        super().__init__(config, settings)
        d = settings.decoder_width
        self.joints = nn.ModuleList(nn.Linear(d + config.width, d) for _ in self.blocks)

    def forward(self, z: Tensor, layers: list[Tensor]) -> Tensor:
        """layers: patch tokens `(N, L, D)` behind each of the encoder's blocks, first to last."""
        tokens = self.start(z)
        order = mirrored(len(layers), len(self.blocks))
        for i, joint, block in zip(order, self.joints, self.blocks, strict=True):
            tokens = block(joint(torch.cat([tokens, layers[i]], dim=-1)))
        return self.finish(tokens)


class SkipAutoencoder(Autoencoder):
    encoder: ViT
    decoder_type: ClassVar[type[PixelDecoder]] = SkipDecoder

    def __init__(self, encoder: ViT, settings: SkipAutoencoderSettings) -> None:
        super().__init__(encoder, settings)

    def predict(self, x: Tensor) -> Tensor:
        tokens, layers = self.encoder.embed(x), []
        P = self.encoder.config.prefix_tokens
        for block in self.encoder.blocks:
            tokens = self.run(block, tokens)
            layers.append(tokens[:, P:])
        z = self.to_code(self.encoder.norm(tokens).flatten(1))
        y: Tensor = self.decoder(z, layers)
        return y

    def run(self, block: nn.Module, tokens: Tensor) -> Tensor:
        """One block, as in `ViT.run_blocks`."""
        if self.encoder.recompute and torch.is_grad_enabled():
            out: Tensor = checkpoint(block, tokens, use_reentrant=False, preserve_rng_state=False)
        else:
            out = block(tokens)
        return out


def mirrored(layers: int, blocks: int) -> list[int]:
    """Which of the encoder's layers each of the decoder's blocks sees: from the last to the first, evenly.

    A decoder of one block sees the first layer, which knows most of the pixels.
    """
    return [(layers - 1) * (blocks - 1 - i) // max(blocks - 1, 1) for i in range(blocks)]
