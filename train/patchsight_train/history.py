"""What a run has logged: `metrics.jsonl` as one curve for each number. Knows no metric by name but step and epoch."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import orjson

MOST_POINTS = 1000  # of a drawn curve
LARGEST = 1e300


@dataclass(frozen=True)
class Curve:
    """Numbers over steps: float64 `(n,)` each, steps ascending."""

    steps: np.ndarray
    values: np.ndarray

    def finite(self) -> "Curve":
        """Without the values that are infinite, or so near to it that no axis could hold them, or not a number."""
        kept = np.abs(self.values) < LARGEST
        return Curve(self.steps[kept], self.values[kept])

    def scaled(self, factor: float) -> "Curve":
        return Curve(self.steps, self.values * factor)

    def smooth(self, share: float = 0.01) -> "Curve":
        """Exponential mean over about this share of the curve, at least 10 values; free of bias towards a start at 0.

        All values must be finite.
        """
        keep = 1 - 1 / max(len(self.values) * share, 10)
        means = accumulate(self.values.tolist(), lambda mean, x: keep * mean + (1 - keep) * x, initial=0.0)
        weights = 1 - keep ** np.arange(1, len(self.values) + 1)
        return Curve(self.steps, np.array(list(means)[1:]) / weights)

    def thin(self, most: int = MOST_POINTS) -> "Curve":
        """At most so many points, an even number of 4 or more: first, last, and the extremes of equal pieces between.

        So no spike is lost, however short. All values must be finite.
        """
        n = len(self.steps)
        if n <= most:
            return self
        edges = np.linspace(0, n, most // 2, dtype=int)
        chosen = {0, n - 1}
        for start, stop in zip(edges, edges[1:], strict=False):
            piece = self.values[start:stop]
            chosen |= {start + int(piece.argmin()), start + int(piece.argmax())}
        kept = np.array(sorted(chosen))
        return Curve(self.steps[kept], self.values[kept])


@dataclass(frozen=True)
class History:
    """curves: by metric. warnings: `(step, text)`, in order. step, epoch: the last ones logged, 0 before the first."""

    curves: dict[str, Curve]
    warnings: list[tuple[int, str]]
    step: int
    epoch: float

    @property
    def steps_per_epoch(self) -> int | None:
        """None as long as no epoch was logged."""
        return round(self.step / self.epoch) if self.epoch > 0 else None


def read_history(run: Path) -> History:
    """What is in `metrics.jsonl`; empty where there is none. Lines that are no metrics are passed over.

    A last line without its end is still being written, and does not count yet.
    """
    steps: dict[str, list[int]] = {}
    values: dict[str, list[float]] = {}
    warnings: list[tuple[int, str]] = []
    step = 0
    for row in _rows(run / "metrics.jsonl"):
        step = row["step"]
        for name, x in row.items():
            if x is None or isinstance(x, int | float):
                if name not in values:
                    steps[name], values[name] = [], []
                steps[name].append(step)
                values[name].append(math.nan if x is None else x)  # of a step that was skipped: JSON knows no NaN
            elif name == "warning" and isinstance(x, str):
                warnings += [(step, line) for line in x.splitlines()]
    curves = {name: Curve(np.array(steps[name], float), np.array(values[name], float)) for name in values}
    curves.pop("step", None)
    epochs = curves.pop("epoch", None)
    return History(curves, warnings, step, float(epochs.values[-1]) if epochs else 0.0)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return
    for line in content.splitlines(keepends=True):
        row = _parse(line) if line.endswith(b"\n") else None
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            yield row


def _parse(line: bytes) -> Any:
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
