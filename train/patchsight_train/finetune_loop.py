"""The training loop, for images with labels: nothing in it changes but that labels go the way of their images."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from patchsight_train.accuracy import measure
from patchsight_train.classification import Classification
from patchsight_train.data import Images, draw
from patchsight_train.evaluation import Evaluation
from patchsight_train.finetune_settings import FineTuneSettings
from patchsight_train.loop import Trainer
from patchsight_train.objective import Objective
from patchsight_train.stopwatch import Stopwatch


@dataclass(frozen=True)
class Validation(Evaluation):
    """val: labelled images to look at along the way, if there are any. Pictures as in pretraining."""

    val: Images | None = None

    def measure(self, objective: Objective, device: torch.device) -> dict[str, float]:
        """`accuracy`, a share of 0..1, where there is something to measure it on."""
        assert isinstance(objective, Classification)
        return {} if self.val is None else {"accuracy": measure(objective, self.val, device).top1}


def sample(images: Images, count: int) -> Images:
    """At most `count` of them, always the same ones."""
    rows = draw(torch.arange(len(images)), count)
    return Images(images.pixels[rows], None if images.labels is None else images.labels[rows], images.class_names)


class FineTuner(Trainer):
    """One run of a classification on this rank's device."""

    objective: Classification

    def __init__(
        self, objective: Classification, images: Images, evaluation: Validation | None, settings: FineTuneSettings,
        run: Path, console: Console, stopwatch: Stopwatch,
    ) -> None:  # fmt: skip
        super().__init__(objective, images, evaluation, settings, run, console)
        assert images.labels is not None
        self.labels, self.stopwatch = images.labels, stopwatch

    def orders(self) -> Iterator[Tensor]:
        """As they are, while the objective is handed the labels: batches come in this order, however far ahead it is
        read."""
        for order in super().orders():
            self.objective.labels.append(self.labels[order])
            yield order

    def write_checkpoint(self) -> None:
        super().write_checkpoint()
        if self.leader:
            self.stopwatch.write(self.step)
