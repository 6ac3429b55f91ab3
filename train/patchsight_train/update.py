"""One step: views, loss in parts, gradients over all ranks, one move of the optimizer, or none."""

import math
from collections.abc import Iterator

import torch
from torch import Generator, Tensor, nn

from patchsight_train import distributed
from patchsight_train.objective import Metrics, Objective, When
from patchsight_train.optimizer import adamw, set_rates
from patchsight_train.randomness import Randomness
from patchsight_train.settings import TrainSettings
from patchsight_train.vit import Block, ViT


class Updater:
    """An objective on its device, and the optimizer that moves it."""

    def __init__(
        self, objective: Objective, settings: TrainSettings, device: torch.device, dtype: torch.dtype, total_steps: int,
        steps_per_epoch: int,
    ) -> None:  # fmt: skip
        self.objective = objective.to(device)
        self.settings, self.device, self.dtype = settings, device, dtype
        self.total_steps, self.steps_per_epoch = total_steps, steps_per_epoch
        self.optimizer = adamw(objective, settings)
        for module in objective.modules():
            if isinstance(module, ViT):
                module.recompute = settings.recompute
            if settings.compile and isinstance(module, Block):
                module.compile()  # in place: names in checkpoints stay

    def update(self, images: Tensor, step: int) -> dict[str, float]:
        """This rank's uint8 images `(b, 3, n, n)` and the number of the step to what is worth logging.

        A step whose loss or gradient is not finite moves nothing: neither parameters nor buffers.
        """
        objective = self.objective
        when = When(step / self.steps_per_epoch, step / self.total_steps)
        rates = set_rates(self.optimizer, self.settings, step, self.total_steps, self.steps_per_epoch)
        buffers = [buffer.clone() for buffer in objective.buffers()]
        views = objective.views(images, self.randomness(step, len(images)))
        self.optimizer.zero_grad(set_to_none=True)
        metrics = self.backward(views, when)
        distributed.average_gradients(objective)
        objective.before_update(when)
        norm = nn.utils.clip_grad_norm_(objective.parameters(), self.settings.clip_grad or math.inf)
        values = self.read({**metrics, "gradient_norm": norm})
        if math.isfinite(values["loss"]) and math.isfinite(values["gradient_norm"]):
            self.optimizer.step()
            objective.after_update(when)
        else:
            values["skipped"] = 1.0
            for buffer, before in zip(objective.buffers(), buffers, strict=True):
                buffer.copy_(before)
        return {**values, **rates}

    def randomness(self, step: int, b: int) -> Randomness:
        """This step's, for the b images of this rank."""
        generator = Generator(self.device).manual_seed(mix(self.settings.seed, step, 2))
        first = distributed.rank() * b
        return Randomness(generator, slice(first, first + b), distributed.world() * b)

    def backward(self, views: list[Tensor], when: When) -> Metrics:
        """The gradients of all parts, and the sums of their metrics."""
        metrics: Metrics = {}
        for part, values in self.forward(views, when):
            part.backward()  # type: ignore[no-untyped-call]
            for name, value in values.items():
                metrics[name] = metrics[name] + value if name in metrics else value
        return metrics

    def forward(self, views: list[Tensor], when: When) -> Iterator[tuple[Tensor, Metrics]]:
        """`Objective.parts`, each computed under mixed precision; what runs between them is not."""
        parts = iter(self.objective.parts(views, when))
        while True:
            with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
                part = next(parts, None)
            if part is None:
                return
            yield part

    def read(self, metrics: Metrics) -> dict[str, float]:
        """Scalars of the device, averaged over the ranks, in one transfer."""
        stacked = torch.stack([value.detach().to(self.device, torch.float32) for value in metrics.values()])
        return dict(zip(metrics, distributed.mean_over_ranks(stacked).tolist(), strict=True))


def mix(seed: int, number: int, purpose: int) -> int:
    """One generator seed for each (seed, number, purpose)."""
    return (seed * 1_000_003 + number) * 4 + purpose
