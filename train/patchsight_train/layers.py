"""The layers of an encoder in their order: how fast each learns, and which are trained at all.

Layer-wise learning-rate decay is BEiT's (arXiv:2106.08254), used by MAE in its appendix A.2 (arXiv:2111.06377); partial
fine-tuning is MAE's Figure 9. A ResNet's four stages count as its blocks, but are only trained all or none.
"""

import re

import torch
from torch import Tensor, nn

from patchsight_serve.errors import InvalidRequest
from patchsight_train.architecture import EncoderConfig, ViTConfig
from patchsight_train.encoder import Encoder
from patchsight_train.finetune_settings import Blocks
from patchsight_train.vit import Block, ViT

STAGES = 4  # of a ResNet


def rate_scale(name: str, config: EncoderConfig, decay: float) -> float:
    """decay^(depth + 1 − l) for the parameter `name` of the encoder, in layer l: embeddings are layer 0, the blocks 1
    to depth, and the final norm, like a head behind it, depth + 1."""
    depth = config.depth if isinstance(config, ViTConfig) else STAGES
    return decay ** (depth + 1 - _layer(name, depth))


def _layer(name: str, depth: int) -> int:
    if block := re.match(r"blocks\.(\d+)\.", name):
        return int(block[1]) + 1
    if stage := re.match(r"layer(\d)\.", name):
        return int(stage[1])
    return depth + 1 if name.startswith("norm.") else 0


def check_blocks(config: EncoderConfig, blocks: Blocks) -> None:
    """Raises InvalidRequest where the encoder has not so many blocks to train."""
    if blocks == "all" or blocks == 0:
        return
    if not isinstance(config, ViTConfig):
        raise InvalidRequest(f"--blocks {blocks:g}: of a ResNet all is trained, or nothing: give --blocks all, or 0")
    if blocks > config.depth:
        raise InvalidRequest(f"--blocks {blocks:g}: the encoder has {config.depth} blocks; give all, or at most that")


def freeze(encoder: Encoder, blocks: Blocks) -> None:
    """Let only the last `blocks` blocks be trained, and the final norm behind them; 0.5 is the second half of the last
    one, its norm and MLP; 0 is nothing. What is frozen goes into evaluation mode with `set_modes`."""
    check_blocks(encoder.config, blocks)
    encoder.requires_grad_(blocks == "all")
    if blocks == "all" or blocks == 0:
        return
    assert isinstance(encoder, ViT)
    encoder.norm.requires_grad_(True)
    last = encoder.blocks[-1]
    assert isinstance(last, Block)
    trained = [last.norm2, last.mlp] if blocks == 0.5 else list(encoder.blocks)[-int(blocks) :]
    for module in trained:
        module.requires_grad_(True)


def set_modes(encoder: Encoder, training: bool) -> None:
    """Training or evaluation mode; what has nothing to train is in evaluation mode in any case: the statistics of a
    frozen batch norm are frozen too."""
    for module in encoder.modules():
        module.training = training and any(p.requires_grad for p in module.parameters())


def tokens(encoder: Encoder, x: Tensor, blocks: Blocks) -> Tensor:
    """What `encoder(x)` gives, `(N, T, D)`; all before the first of its last `blocks` blocks without gradients."""
    if blocks == "all":
        out: Tensor = encoder(x)
        return out
    if blocks == 0:
        with torch.no_grad():
            frozen: Tensor = encoder(x)
            return frozen
    assert isinstance(encoder, ViT)
    first = encoder.config.depth - max(int(blocks), 1)
    with torch.no_grad():
        h = encoder.run_blocks(encoder.embed(x), slice(first))
    h = _second_half(encoder.blocks[-1], h) if blocks == 0.5 else encoder.run_blocks(h, slice(first, None))
    normed: Tensor = encoder.norm(h)
    return normed


def _second_half(block: nn.Module, x: Tensor) -> Tensor:
    """The block on tokens `(N, T, D)`, its attention without gradients."""
    assert isinstance(block, Block)
    with torch.no_grad():
        x = x + block.attn(block.norm1(x))
    out: Tensor = x + block.mlp(block.norm2(x))
    return out
