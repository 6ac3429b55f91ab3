"""The Vision Transformer, arXiv:2010.11929, with parameter names as in timm, so that public weights load unmapped.

Pre-norm blocks, a CLS token, optional registers (arXiv:2309.16588), and either the paper's patch embedding or a small
convolutional stem (arXiv:2106.14881). Letters: N images, L patches, P prefix tokens (CLS + registers), T = P + L,
D width, h heads.
"""

import math
from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from patchsight_train.architecture import ViTConfig
from patchsight_train.encoder import Encoder


class PatchEmbed(nn.Module):
    """Images `(N, 3, H, W)` to patch tokens `(N, L, D)`, row by row."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        p, D = config.patch_size, config.width
        self.proj = conv_stem(p, D) if config.stem == "conv" else nn.Conv2d(3, D, kernel_size=p, stride=p)

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.proj(x)  # (N, D, H/p, W/p)
        return tokens.flatten(2).transpose(1, 2)


def conv_stem(patch_size: int, width: int) -> nn.Sequential:
    """log2(patch_size) stages that halve the picture, doubling channels up to `width`, then a 1×1 projection.

    Each stage is two 3×3 convolutions, the first of stride 2. The paper's batch norm is left out: a token may not
    depend on the other images of its batch.
    """
    steps = patch_size.bit_length() - 1
    layers: list[nn.Module] = []
    channels = 3
    for step in range(steps):
        wider = max(width >> (steps - 1 - step), 16)
        layers += [nn.Conv2d(channels, wider, kernel_size=3, stride=2, padding=1), nn.GELU()]
        layers += [nn.Conv2d(wider, wider, kernel_size=3, padding=1), nn.GELU()]
        channels = wider
    stem = nn.Sequential(*layers, nn.Conv2d(channels, width, kernel_size=1))
    for module in stem:
        if isinstance(module, nn.Conv2d):
            # torch's own initialization loses most of the signal in each layer: all pictures would give one CLS token.
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            assert module.bias is not None
            nn.init.zeros_(module.bias)
    return stem


class Attention(nn.Module):
    """Multi-head self-attention on tokens `(N, T, D)`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def heads_of(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each `(N, h, T, D/h)`."""
        N, T, D = x.shape
        q, k, v = self.qkv(x).reshape(N, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        # torch's fused CPU kernel trains slower, docs/decisions.md
        if x.device.type == "cpu" and torch.is_grad_enabled():
            return self.explicit(x)[0]
        y = F.scaled_dot_product_attention(*self.heads_of(x))
        out: Tensor = self.proj(y.transpose(1, 2).flatten(2))
        return out

    def explicit(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The same result by an explicit softmax, and the weights `(N, h, T, T)`; each row sums to 1."""
        q, k, v = self.heads_of(x)
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)
        return self.proj((weights.to(v.dtype) @ v).transpose(1, 2).flatten(2)), weights


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, int(width * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out

    def with_attention(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The same, and this block's attention weights `(N, h, T, T)`."""
        y, weights = self.attn.explicit(self.norm1(x))
        x = x + y
        return x + self.mlp(self.norm2(x)), weights


class ViT(Encoder):
    """Images `(N, 3, H, W)`, normalized, to tokens `(N, T, D)` after the final norm: CLS, registers, patches.

    H and W are multiples of the patch size; at another size than `config.image_size` the positions are interpolated.
    """

    config: ViTConfig
    reg_token: nn.Parameter | None
    recompute: bool = False  # activation checkpointing: a block's activations are computed again for its gradient

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        D, L = config.width, config.grid**2
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
        self.reg_token = nn.Parameter(torch.zeros(1, config.registers, D)) if config.registers else None
        positions = L if config.no_embed_class else config.prefix_tokens + L
        self.pos_embed = nn.Parameter(torch.zeros(1, positions, D))
        self.blocks = nn.ModuleList(Block(D, config.heads, config.mlp_ratio) for _ in range(config.depth))
        self.norm = nn.LayerNorm(D, eps=1e-6)
        self.initialize()

    @property
    def depth(self) -> int:
        return len(self.blocks)

    def initialize(self) -> None:
        """Truncated normal of 0.02 for linear maps and positions, 1e-6 for CLS and registers, as in timm."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        if self.reg_token is not None:
            nn.init.normal_(self.reg_token, std=1e-6)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def prefix(self, N: int) -> Tensor:
        """CLS and registers for N images: `(N, P, D)`, without positions."""
        tokens = self.cls_token if self.reg_token is None else torch.cat([self.cls_token, self.reg_token], dim=1)
        return tokens.expand(N, -1, -1)

    def positions(self, x: Tensor) -> Tensor:
        """Positions for images of x's size, `(1, P + L, D)` or without P: interpolated where that is another."""
        config = self.config
        grid = (x.shape[-2] // config.patch_size, x.shape[-1] // config.patch_size)
        # Where export traces a graph for any size, the grid is symbols: to compare them would tie it to one.
        if all(isinstance(side, int) for side in grid) and grid == (config.grid, config.grid):
            return self.pos_embed
        return resize_positions(self.pos_embed, 0 if config.no_embed_class else config.prefix_tokens, grid)

    def embed(self, x: Tensor) -> Tensor:
        """Patch embedding, prefix and positions: `(N, 3, H, W)` to `(N, T, D)`."""
        patches = self.patch_embed(x)
        prefix = self.prefix(x.shape[0])
        if self.config.no_embed_class:
            return torch.cat([prefix, patches + self.positions(x)], dim=1)
        return torch.cat([prefix, patches], dim=1) + self.positions(x)

    def run_blocks(self, x: Tensor, which: slice = slice(None)) -> Tensor:
        """Tokens `(N, T, D)` through these blocks, by default all, without the final norm."""
        for block in list(self.blocks)[which]:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.run_blocks(self.embed(x)))
        return out

    def with_attention(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The same tokens, and the last block's attention weights `(N, h, T, T)`."""
        tokens, (weights,) = self.attend(x, [self.depth - 1])
        return tokens, weights

    def attend(self, x: Tensor, blocks: Collection[int]) -> tuple[Tensor, list[Tensor]]:
        """The same tokens, and the attention weights `(N, h, T, T)` of these blocks, counted from 0, in their order."""
        x, weights = self.embed(x), []
        for number, block in enumerate(self.blocks):
            if number in blocks:
                assert isinstance(block, Block)
                x, found = block.with_attention(x)
                weights.append(found)
            else:
                x = block(x)
        return self.norm(x), weights


def resize_positions(positions: Tensor, prefix: int, grid: tuple[int, int]) -> Tensor:
    """Positions `(1, prefix + g², D)` to `(1, prefix + h·w, D)`: the patches' by antialiased bicubic, as timm."""
    first, patches = positions[:, :prefix], positions[:, prefix:]
    g = math.isqrt(patches.shape[1])
    square = patches.float().reshape(1, g, g, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(square, size=grid, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([first, resized.flatten(2).transpose(1, 2).to(positions.dtype)], dim=1)


def sincos_positions(width: int, grid: int) -> Tensor:
    """Fixed 2-D sine-cosine positions `(grid², D)`, as in MAE: the first half of D encodes x, the second y."""
    if width % 4:
        raise ValueError(f"sine-cosine positions need a width that is a multiple of 4, not {width}")
    omega = 10_000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    y, x = torch.meshgrid(
        torch.arange(grid, dtype=torch.float64), torch.arange(grid, dtype=torch.float64), indexing="ij"
    )
    parts = [f(p.reshape(-1, 1) * omega) for p in (x, y) for f in (torch.sin, torch.cos)]
    return torch.cat(parts, dim=1).float()
