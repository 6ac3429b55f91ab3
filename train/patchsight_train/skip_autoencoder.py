"""The autoencoder with skip connections, as in a U-Net (arXiv:1505.04597): why shortcuts teach an encoder little.

Its decoder also sees what the encoder's layers know of each patch, so that pixels need not pass through z at all:
reconstruction gets easy and z idle. All else is as in `autoencoder`.
"""

from torch import Tensor

from patchsight_train.autoencoder import Autoencoder
from patchsight_train.encoder import pool
from patchsight_train.objective_settings import SkipAutoencoderSettings
from patchsight_train.pixel_decoder import SkipDecoder
from patchsight_train.vit import ViT


class SkipAutoencoder(Autoencoder):
    encoder: ViT
    decoder: SkipDecoder

    def __init__(self, encoder: ViT, settings: SkipAutoencoderSettings) -> None:
        super().__init__(encoder, settings)
        self.decoder = SkipDecoder(encoder.config, settings)

    def predict(self, x: Tensor) -> Tensor:
        encoder, P = self.encoder, self.encoder.config.prefix_tokens
        tokens, layers = encoder.embed(x), []
        for block in encoder.blocks:
            tokens = block(tokens)
            layers.append(tokens[:, P:])
        z = self.to_code(pool(encoder.norm(tokens), P, self.pooling))
        return self.decoder(z, layers)
