"""What training, evaluation and export ask of a backbone: tokens in one layout."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchsight_train.architecture import EncoderConfig


class Encoder(nn.Module):
    """Normalized images `(N, 3, H, W)` to tokens `(N, T, D)`: `config.prefix_tokens` first, then patches row by row."""

    config: EncoderConfig

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def pooled(self, x: Tensor, pooling: str) -> Tensor:
        """`(N, 3, H, W)` to `(N, D)`. `pooling`: "cls", or "mean" of the patch tokens."""
        return pool(self(x), self.config.prefix_tokens, pooling)


def pool(tokens: Tensor, prefix_tokens: int, pooling: str) -> Tensor:
    """Tokens `(N, T, D)` to `(N, D)`: the first, or the mean of those after the prefix. In memory of its own: a view
    of the first would keep all the others."""
    return tokens[:, 0].clone() if pooling == "cls" else tokens[:, prefix_tokens:].mean(dim=1)


def side_by_side(cls: Tensor, mean: Tensor) -> Tensor:
    """`(N, D)` each, as the encoder gives them, to `(N, 2D)` in which both count alike."""
    return torch.cat([F.normalize(cls, dim=1), F.normalize(mean, dim=1)], dim=1)


def default_pooling(config: EncoderConfig) -> str:
    """CLS where there is one."""
    return "cls" if config.prefix_tokens else "mean"


def chunks(n: int, size: int | None) -> list[slice]:
    """0..n in slices of at most `size`; one slice without a size."""
    size = size or max(n, 1)
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]


@torch.no_grad()
def copy_into(target: nn.Module, source: nn.Module) -> None:
    """Parameters and buffers of `source` into a module of the same architecture."""
    target.load_state_dict(source.state_dict())
