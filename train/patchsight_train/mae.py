"""Masked Autoencoders are scalable vision learners, arXiv:2111.06377.

In the order of its section 3: masking · encoder on the visible patches alone · mask tokens and a small decoder ·
normalized pixels of the hidden patches as target. Letters: N images, L patches, V visible ones, D encoder width,
d decoder width, p patch size.
"""

import math

import torch
from torch import Tensor, nn

from patchsight_train.objective import Metrics, Objective
from patchsight_train.objective_settings import MAESettings
from patchsight_train.randomness import Randomness
from patchsight_train.views import View, augment, denormalize
from patchsight_train.vit import Block, ViT, sincos_positions


class MAE(Objective):
    encoder_name = "encoder"
    encoder: ViT

    def __init__(self, encoder: ViT, settings: MAESettings) -> None:
        super().__init__()
        self.pooling = "mean"  # the CLS token is never trained to mean anything; judge by probe and fine-tuning
        if encoder.config.stem != "patch":
            raise ValueError("MAE needs the patch stem: a convolutional one lets visible patches see the hidden ones")
        self.encoder = encoder
        self.mask_ratio = settings.mask_ratio
        self.normalize_pixels = settings.normalize_pixels
        config, d = encoder.config, settings.decoder_width
        self.patch_size = config.patch_size
        _fix_positions(encoder)

        self.decoder_embed = nn.Linear(config.width, d)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, d))
        positions = sincos_positions(d, config.grid)
        self.decoder_pos_embed: Tensor
        self.register_buffer("decoder_pos_embed", torch.cat([torch.zeros(config.prefix_tokens, d), positions])[None])
        self.decoder_blocks = nn.Sequential(
            *(Block(d, settings.decoder_heads, 4.0) for _ in range(settings.decoder_depth))
        )
        self.decoder_norm = nn.LayerNorm(d, eps=1e-6)
        self.decoder_pred = nn.Linear(d, config.patch_size**2 * 3)
        nn.init.normal_(self.mask_token, std=0.02)
        # The paper scales crops between 0.2 and 1 and flips; it needs no color distortion.
        self.view = View(size=config.image_size, scale=settings.crop_scale)

    def views(self, images: Tensor, random: Randomness) -> list[Tensor]:
        """The view, and the noise `(B, L)` whose order decides what is hidden."""
        return [augment(images, self.view, random), random.rand(len(images), self.encoder.config.grid**2)]

    def loss(self, views: list[Tensor]) -> tuple[Tensor, Metrics]:
        x, noise = views
        keep, restore, mask = random_masking(noise, self.mask_ratio)
        pred = self.decode(self.encode(x, keep), restore)
        return masked_pixel_loss(pred, patchify(x, self.patch_size), mask, self.normalize_pixels), {}

    @torch.no_grad()
    def reconstruct(self, views: list[Tensor]) -> Tensor:
        """The hidden patches as predicted, the visible ones as they are."""
        x, noise = views
        keep, restore, mask = random_masking(noise, self.mask_ratio)
        pred, target = self.decode(self.encode(x, keep), restore).float(), patchify(x, self.patch_size)
        if self.normalize_pixels:  # only contrast is predicted: the patch's own mean and variance are lent back
            pred = pred * (target.var(dim=-1, keepdim=True) + 1e-6) ** 0.5 + target.mean(dim=-1, keepdim=True)
        return denormalize(unpatchify(torch.where(mask.bool().unsqueeze(-1), pred, target), self.patch_size))

    def masked(self, views: list[Tensor]) -> Tensor:
        """What the encoder sees: float32 `(B, 3, S, S)` in 0..1, hidden patches gray."""
        x, noise = views
        mask = random_masking(noise, self.mask_ratio)[2].bool().unsqueeze(-1)
        pictures = patchify(denormalize(x), self.patch_size)
        return unpatchify(torch.where(mask, 0.5, pictures), self.patch_size)

    def encode(self, x: Tensor, keep: Tensor) -> Tensor:
        """Images `(N, 3, H, W)` and the visible patches' indices `(N, V)` to tokens `(N, P + V, D)`."""
        encoder, P = self.encoder, self.encoder.config.prefix_tokens
        tokens = encoder.patch_embed(x) + encoder.pos_embed[:, P:]
        tokens = take(tokens, keep)  # length L -> V
        prefix = encoder.prefix(len(x)) + encoder.pos_embed[:, :P]
        tokens = torch.cat([prefix, tokens], dim=1)
        out: Tensor = encoder.norm(encoder.run_blocks(tokens))
        return out

    def decode(self, latent: Tensor, restore: Tensor) -> Tensor:
        """Tokens of the visible patches `(N, P + V, D)` to predictions for all `(N, L, p·p·3)`."""
        P = self.encoder.config.prefix_tokens
        x = self.decoder_embed(latent)
        N, _, d = x.shape
        hidden = restore.shape[1] - (x.shape[1] - P)
        patches = torch.cat([x[:, P:], self.mask_token.to(x.dtype).expand(N, hidden, d)], dim=1)
        x = torch.cat([x[:, :P], take(patches, restore)], dim=1) + self.decoder_pos_embed
        out: Tensor = self.decoder_pred(self.decoder_norm(self.decoder_blocks(x)))
        return out[:, P:]


def _fix_positions(encoder: ViT) -> None:
    """Sine-cosine positions that are not trained: zero for the prefix tokens."""
    config = encoder.config
    if config.no_embed_class:
        raise ValueError("MAE's positions cover the CLS token too: set no_embed_class to false")
    positions = torch.cat(
        [torch.zeros(config.prefix_tokens, config.width), sincos_positions(config.width, config.grid)]
    )
    encoder.pos_embed.data.copy_(positions[None])
    encoder.pos_embed.requires_grad_(False)
    nn.init.normal_(encoder.cls_token, std=0.02)


def take(x: Tensor, index: Tensor) -> Tensor:
    """`(N, L, D)` and indices `(N, V)` to the rows `(N, V, D)`."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def random_masking(noise: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor, Tensor]:
    """Per-image random masking by sorting noise `(N, L)`.

    Returns:
        keep: int64 `(N, V)`, indices of the V = round(L · (1 − ratio)) visible patches, 1 ≤ V < L.
        restore: int64 `(N, L)`: `take(cat([visible, hidden]), restore)` is in the original order.
        mask: float32 `(N, L)`, 0 is visible, 1 is hidden.
    """
    L = noise.shape[1]
    V = min(max(round(L * (1 - mask_ratio)), 1), L - 1)
    shuffle = noise.argsort(dim=1)
    restore = shuffle.argsort(dim=1)
    mask = (restore >= V).float()
    return shuffle[:, :V], restore, mask


def patchify(x: Tensor, p: int) -> Tensor:
    """`(N, 3, H, W)` to `(N, L, p·p·3)`: patches row by row, their pixels row by row, channels last as there."""
    N, C, H, W = x.shape
    return x.reshape(N, C, H // p, p, W // p, p).permute(0, 2, 4, 3, 5, 1).reshape(N, (H // p) * (W // p), p * p * C)


def unpatchify(patches: Tensor, p: int) -> Tensor:
    """The inverse of `patchify`, for square pictures: `(N, L, p·p·3)` to `(N, 3, H, W)`."""
    N, L, _ = patches.shape
    g = math.isqrt(L)
    return patches.reshape(N, g, g, p, p, 3).permute(0, 5, 1, 3, 2, 4).reshape(N, 3, g * p, g * p)


def masked_pixel_loss(pred: Tensor, target: Tensor, mask: Tensor, normalize_pixels: bool) -> Tensor:
    """Mean squared error over the hidden patches alone.

    Args:
        pred, target: `(N, L, p·p·3)`.
        mask: `(N, L)`, 1 is hidden.
        normalize_pixels: remove each target patch's own mean and (unbiased) variance first.
    """
    with torch.autocast(pred.device.type, enabled=False):
        pred, target = pred.float(), target.float()
        if normalize_pixels:
            mean, var = target.mean(dim=-1, keepdim=True), target.var(dim=-1, keepdim=True)
            target = (target - mean) / (var + 1e-6) ** 0.5
        per_patch = ((pred - target) ** 2).mean(dim=-1)
        return (per_patch * mask).sum() / mask.sum()
