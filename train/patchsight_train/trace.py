"""A number that is followed for long in little memory: its mean of late, and its whole past in a few bars."""

import math

BARS = "▁▂▃▄▅▆▇█"
KEEP = 0.98  # of the mean, at each new value


class SmoothedLoss:
    """Exponential mean over about 50 steps, free of bias towards a start at 0."""

    def __init__(self) -> None:
        self.total, self.weight, self.count = 0.0, 0.0, 0

    def add(self, x: float) -> None:
        self.total = KEEP * self.total + (1 - KEEP) * x
        self.weight = KEEP * self.weight + (1 - KEEP)
        self.count += 1

    @property
    def value(self) -> float:
        return self.total / self.weight if self.count else math.nan


class Trace:
    """A whole run's values in few numbers: when there are too many, neighbors are merged in pairs."""

    def __init__(self, most: int = 32) -> None:
        self.most = most  # even
        self.means: list[float] = []
        self.stride = 1  # values in one mean
        self.total, self.count = 0.0, 0

    def add(self, x: float) -> None:
        self.total += x
        self.count += 1
        if self.count < self.stride:
            return
        self.means.append(self.total / self.count)
        self.total, self.count = 0.0, 0
        if len(self.means) == self.most:
            self.means = [(a + b) / 2 for a, b in zip(self.means[::2], self.means[1::2], strict=True)]
            self.stride *= 2

    def sparkline(self) -> str:
        """One character for each mean, from the least to the largest."""
        if not self.means:
            return ""
        low, high = min(self.means), max(self.means)
        spread = high - low or 1.0
        return "".join(BARS[round((x - low) / spread * (len(BARS) - 1))] for x in self.means)
