"""What the training loop asks of an objective. `mae`, `simclr` and `dino` each fill it in, one file each."""

from typing import ClassVar, cast

from torch import Generator, Tensor, nn

from patchsight_train.vit import ViT

Metrics = dict[str, Tensor]


class Objective(nn.Module):
    """A module whose parameters are trained, and in it the encoder that is kept."""

    encoder_name: ClassVar[str]  # the submodule that is exported
    pooling: ClassVar[str]  # which of its embeddings is recommended: "cls" or "mean"

    @property
    def kept(self) -> ViT:
        """The encoder that is evaluated and exported."""
        return cast(ViT, self.get_submodule(self.encoder_name))

    def views(self, images: Tensor, generator: Generator) -> list[Tensor]:
        """uint8 `(B, 3, n, n)` to float32 views `(B, 3, S, S)` each; runs outside of mixed precision."""
        raise NotImplementedError

    def loss(self, views: list[Tensor], generator: Generator) -> tuple[Tensor, Metrics]:
        """Scalar float32 loss and scalars worth logging; runs under mixed precision."""
        raise NotImplementedError

    def before_update(self, epoch: float) -> None:
        """The gradients are there and the optimizer has not yet moved; `epoch` counts from 0."""

    def after_update(self, progress: float) -> None:
        """The optimizer has moved; `progress` runs from 0 to 1 over the whole training."""
