"""The autoencoder: a picture through a vector z and back (Hinton and Salakhutdinov, Science 313, 2006).

The baseline of what learns by reconstruction: encoder · z · a decoder that sees z alone · mean squared error over all
pixels. z is the only way from picture to picture: how many numbers it has says how far the picture is compressed. It is
a linear map of all tokens, and each patch starts as a linear map of it: through a pooled embedding hardly more than the
mean color gets in some hundred steps (docs/log.md).
Letters: N images, Z numbers in z, T tokens of width D, L patches, p patch size.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from patchsight_train.encoder import Encoder
from patchsight_train.mae import patchify, unpatchify
from patchsight_train.objective import Metrics, Objective
from patchsight_train.objective_settings import AutoencoderSettings
from patchsight_train.pixel_decoder import PixelDecoder
from patchsight_train.randomness import Randomness
from patchsight_train.views import View, augment, denormalize


class CodeDecoder(PixelDecoder):
    """z `(N, Z)` alone to pixels `(N, L, p·p·3)`."""

    def forward(self, z: Tensor) -> Tensor:
        tokens = self.start(z)
        for block in self.blocks:
            tokens = block(tokens)
        return self.finish(tokens)


class Autoencoder(Objective):
    encoder_name = "encoder"
    decoder_type: ClassVar[type[PixelDecoder]] = CodeDecoder

    def __init__(self, encoder: Encoder, settings: AutoencoderSettings) -> None:
        super().__init__()
        self.pooling = "mean"  # CLS is one token of many that z is made of
        self.encoder = encoder
        tokens = encoder.config.prefix_tokens + encoder.config.grid**2  # T
        self.to_code = nn.Linear(tokens * encoder.config.width, settings.bottleneck)
        self.decoder = self.decoder_type(encoder.config, settings)
        # Crop and flip as MAE: color distortion would only be one more thing to reconstruct.
        self.view = View(size=encoder.config.image_size, scale=settings.crop_scale)

    def views(self, images: Tensor, random: Randomness) -> list[Tensor]:
        return [augment(images, self.view, random)]

    def loss(self, views: list[Tensor]) -> tuple[Tensor, Metrics]:
        """Mean squared error of normalized pixels; and the signal-to-noise ratio of the pictures they make."""
        (x,) = views
        y = self.predict(x).float()
        loss = ((y - patchify(x, self.decoder.patch_size)) ** 2).mean()
        return loss, {"psnr": psnr(self.picture(y.detach()), denormalize(x))}

    def code(self, x: Tensor) -> Tensor:
        """z: normalized images `(N, 3, S, S)` to `(N, Z)`."""
        z: Tensor = self.to_code(self.encoder(x).flatten(1))
        return z

    def predict(self, x: Tensor) -> Tensor:
        """Normalized images `(N, 3, S, S)` to the normalized pixels that the decoder makes, `(N, L, p·p·3)`."""
        y: Tensor = self.decoder(self.code(x))
        return y

    @torch.no_grad()
    def reconstruct(self, views: list[Tensor]) -> Tensor:
        return self.picture(self.predict(views[0]).float())

    def picture(self, y: Tensor) -> Tensor:
        """Normalized pixels `(N, L, p·p·3)` to pictures `(N, 3, S, S)` in 0..1."""
        return denormalize(unpatchify(y, self.decoder.patch_size))


def psnr(pictures: Tensor, targets: Tensor) -> Tensor:
    """Peak signal-to-noise ratio, dB, a mean over images; both `(N, 3, S, S)` in 0..1. At most 100."""
    error = ((pictures - targets) ** 2).mean(dim=(1, 2, 3))
    return -10 * error.clamp(min=1e-10).log10().mean()
