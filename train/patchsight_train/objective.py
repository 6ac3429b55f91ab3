"""What the training loop asks of an objective. Each fills it in, one paper, one file."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, cast

from torch import Tensor, nn

from patchsight_train.encoder import Encoder, chunks
from patchsight_train.randomness import Randomness

Metrics = dict[str, Tensor]


@dataclass(frozen=True)
class When:
    """epoch: how many are done, with fractions. progress: 0..1 over the whole training."""

    epoch: float
    progress: float


class Objective(nn.Module):
    """A module whose parameters are trained, and in it the encoder that is kept."""

    encoder_name: ClassVar[str]  # the submodule that is exported
    pooling: str  # which of its embeddings is recommended: "cls" or "mean"
    micro_batch: int | None = None  # images in one forward and backward; the numbers do not depend on it

    @property
    def kept(self) -> Encoder:
        """The encoder that is evaluated and exported."""
        return cast(Encoder, self.get_submodule(self.encoder_name))

    def views(self, images: Tensor, random: Randomness) -> list[Tensor]:
        """uint8 `(B, 3, n, n)` to what the network sees; runs outside of mixed precision.

        All randomness of a step is drawn here. Entries of four axes are views, float32 `(B, 3, S, S)`; masking noise is
        an entry too.
        """
        raise NotImplementedError

    def loss(self, views: list[Tensor]) -> tuple[Tensor, Metrics]:
        """Scalar float32 loss, a mean over images, and scalars worth logging; runs under mixed precision."""
        raise NotImplementedError

    def parts(self, views: list[Tensor], when: When) -> Iterator[tuple[Tensor, Metrics]]:  # noqa: ARG002
        """Scalars to call `backward` on, each before the next is asked for, and metrics that add up.

        Their gradients add up to that of the loss, and the metric "loss" to its value. The memory is that of one part.
        """
        B = len(views[0])
        for rows in chunks(B, self.micro_batch):
            loss, metrics = self.loss([v[rows] for v in views])
            share = (rows.stop - rows.start) / B
            yield loss * share, {name: value.detach() * share for name, value in {"loss": loss, **metrics}.items()}

    def rate_scale(self, name: str) -> float:  # noqa: ARG002
        """What the learning rate of this parameter is multiplied with."""
        return 1.0

    def before_update(self, when: When) -> None:
        """The gradients are there and the optimizer has not yet moved."""

    def after_update(self, when: When) -> None:
        """The optimizer has moved."""

    def reconstruct(self, views: list[Tensor]) -> Tensor | None:  # noqa: ARG002
        """What a decoder makes of the first view: float32 `(B, 3, S, S)` in 0..1; None where there is no decoder."""
        return None

    def masked(self, views: list[Tensor]) -> Tensor | None:  # noqa: ARG002
        """The first view without what is hidden from the encoder, as `reconstruct`; None where nothing is."""
        return None
