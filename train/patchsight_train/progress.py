"""How far a run is, told from what it has logged."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from patchsight_train.history import History
from patchsight_train.wording import duration, value


@dataclass(frozen=True)
class Progress:
    """How far a run is. total_steps: None where it is not known yet. images_per_s: of late."""

    step: int
    epoch: float
    epochs: int | None
    total_steps: int | None
    images_per_s: float | None
    seconds_left: float | None

    @classmethod
    def of(cls, history: History, config: Mapping[str, Any]) -> "Progress":
        epochs, batch, per_epoch = config.get("epochs"), config.get("batch_size"), history.steps_per_epoch
        total = epochs * per_epoch if isinstance(epochs, int) and per_epoch else None
        speeds = history.curves["images_per_s"].finite().values if "images_per_s" in history.curves else np.empty(0)
        speed = float(np.median(speeds[-100:])) if len(speeds) else None
        left = None
        # An epoch of a single step may be of fewer images than were asked for.
        if total and speed and isinstance(batch, int) and per_epoch != 1:
            left = (total - history.step) * batch / speed
        return cls(history.step, history.epoch, epochs if total else None, total, speed, left)

    @property
    def complete(self) -> bool:
        return self.total_steps is not None and self.step >= self.total_steps

    @property
    def share(self) -> float:
        return min(self.step / self.total_steps, 1.0) if self.total_steps else 0.0

    @property
    def short(self) -> str:
        """For the tab: `47 %`."""
        return "done" if self.complete else f"{math.floor(100 * self.share)} %" if self.total_steps else ""

    @property
    def sentence(self) -> str:
        if not self.step:
            return "Nothing is logged yet."
        if self.complete:
            parts = [f"Complete: {self.epochs} epochs", f"{self.step:,} steps"]
        else:
            parts = [f"Epoch {self.epoch:.3g}" + (f" of {self.epochs}" if self.epochs else "")]
            parts.append(f"step {self.step:,}" + (f" of {self.total_steps:,}" if self.total_steps else ""))
        if self.images_per_s:
            parts.append(value("images_per_s", self.images_per_s))
        if self.seconds_left and not self.complete:
            parts.append(f"about {duration(self.seconds_left)} left")
        return " · ".join(parts)
