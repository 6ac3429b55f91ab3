"""Random numbers of one step. Each image's are its own, whatever the number of ranks that share the batch."""

import torch
from torch import Generator, Tensor


class Randomness:
    """Draws for the rows that this rank holds of a batch.

    Every rank draws for the whole batch, from the same seed, and keeps its rows: so two ranks augment the images of a
    batch exactly as one rank does.
    """

    def __init__(self, generator: Generator, rows: slice | None = None, total: int | None = None) -> None:
        """rows: this rank's part of the batch of `total` images; by default all of it."""
        self.generator, self.rows, self.total = generator, rows, total

    @property
    def device(self) -> torch.device:
        return self.generator.device

    def rand(self, B: int, *shape: int) -> Tensor:
        """Uniform float32 in [0, 1), `(B, *shape)`: one row for each of this rank's B images."""
        drawn = torch.rand(self.total or B, *shape, generator=self.generator, device=self.device)
        own = drawn if self.rows is None else drawn[self.rows]
        if len(own) != B:
            raise ValueError(f"{B} images asked for random numbers, this rank holds {len(own)}")
        return own

    def permutation(self, n: int) -> list[int]:
        """One order of 0..n−1 for all images."""
        order: list[int] = torch.randperm(n, generator=self.generator, device=self.device).tolist()
        return order
