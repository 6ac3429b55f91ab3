"""Which attention leaves the graph: that of one block, or the rollout over all of them."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from patchsight_serve.errors import InvalidRequest

Kind = Literal["last", "rollout"] | int  # a number is that of a block, from 1


def resolve(asked: Kind, depth: int) -> Kind:
    """What the manifest says of `--attention`: "last", "rollout", or the number of another block, from 1.

    asked: also -1 for the last block, -2 for the one before it. Raises InvalidRequest if there is no such block.
    """
    if asked in ("last", "rollout"):
        return asked
    assert isinstance(asked, int)
    number = asked + depth + 1 if asked < 0 else asked
    if not 1 <= number <= depth:
        raise InvalidRequest(
            f"--attention {asked}: the encoder has {depth} blocks: 1 to {depth}, or {-depth} to -1 from the end"
        )
    return "last" if number == depth else number


def blocks_of(kind: Kind, depth: int) -> list[int]:
    """The blocks whose weights are needed, from 0."""
    if kind == "rollout":
        return list(range(depth))
    return [depth - 1 if kind == "last" else int(kind) - 1]


def from_cls(weights: Sequence[Tensor], kind: Kind) -> Tensor:
    """Weights `(N, h, T, T)` of the blocks that `blocks_of` names, in their order, to CLS's row: `(N, h, T)`.

    Rollout (arXiv:2005.00928): heads averaged, half of each block's attention is its residual connection, and the
    blocks are multiplied; one head is left, `(N, 1, T)`. Only CLS's row is followed, from the last block down.
    """
    if kind != "rollout":
        (single,) = weights
        return single[:, :, 0]
    means = [each.mean(dim=1) for each in weights]
    row = (means[-1][:, :1] + torch.eye(means[-1].shape[-1])[:1]) / 2
    for mean in reversed(means[:-1]):
        row = (row @ mean + row) / 2
    return row
