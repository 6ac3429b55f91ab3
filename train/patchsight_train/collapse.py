"""Collapse: a run that has stopped learning, or never will, is told by its numbers. `signatures` says by which.

Imports no torch.
"""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from patchsight_serve.errors import PatchsightError

SHARE = 0.9  # of the patience, in which a signature has to hold: the metrics of one batch are noisy


class Collapsed(PatchsightError):
    """The run shows a sign of collapse, and was told to stop at one."""

    code = "collapsed"


@dataclass(frozen=True)
class Signature:
    """One way to collapse.

    bounds: the least and the greatest value of each metric; the signature holds where all are within.
    lasting: it must hold for the detector's patience, the metrics being those of one batch. Else once is enough, as for
    those of an evaluation, which are of many images. Of several lasting ones the first is named: the others only say
    the same in other words.
    """

    bounds: dict[str, tuple[float, float]]
    meaning: str
    remedy: str
    lasting: bool = True

    def holds(self, values: Mapping[str, float]) -> bool | None:
        """None where a metric was not measured, or is not finite."""
        found = [values.get(name, math.nan) for name in self.bounds]
        if not all(math.isfinite(x) for x in found):
            return None
        return all(low <= x <= high for x, (low, high) in zip(found, self.bounds.values(), strict=True))

    def text(self, values: Mapping[str, float]) -> str:
        numbers = ", ".join(f"{name} {values[name]:.4g}" for name in self.bounds)
        return f"{self.meaning} ({numbers}). {self.remedy}."


class CollapseDetector:
    """Follows the metrics of a run. What it says depends on them alone: fed with those of a run that was stopped, it
    goes on as if that had never been."""

    def __init__(self, signatures: list[Signature], patience: int, start: int = 0) -> None:
        """patience: steps for which a lasting signature must hold. start: the step up to which nothing is expected."""
        self.start = start
        self.loss = math.nan
        self.watches = [_Watch(signature, patience if signature.lasting else 1) for signature in signatures]

    def see(self, step: int, values: Mapping[str, float]) -> str | None:
        """The metrics of a step; what there is to say of them. A signature is named once, until it was left again."""
        before, self.loss = self.loss, values.get("loss", math.nan)
        if step <= self.start:
            return None
        seen = {**values, "loss_change": abs(self.loss - before)}
        if "teacher_entropy" in values:  # how much the teacher's answer tells of the picture: mutual information, nats
            seen["teacher_information"] = values["teacher_mean_entropy"] - values["teacher_entropy"]
        return "\n".join([watch.signature.text(seen) for watch in self.watches if self.is_news(watch, seen)]) or None

    def is_news(self, watch: "_Watch", values: Mapping[str, float]) -> bool:
        """True when a signature begins that is not covered by one that was named."""
        named = [other for other in self.watches if other.named and other.signature.lasting]
        return watch.begins(values) and not (named and watch.signature.lasting)


class _Watch:
    """Over the last steps at which it could be told: how often did the signature hold?"""

    def __init__(self, signature: Signature, patience: int) -> None:
        self.signature, self.patience = signature, patience
        self.recent = deque([False] * patience, patience)
        self.held = 0
        self.named = False

    def begins(self, values: Mapping[str, float]) -> bool:
        """True when it has held for its time, and was not named since it was last left for as long."""
        holds = self.signature.holds(values)
        if holds is None:
            return False
        self.held += holds - self.recent[0]
        self.recent.append(holds)
        if self.named:
            self.named = self.held > (1 - SHARE) * self.patience
            return False
        self.named = holds and self.held >= SHARE * self.patience
        return self.named
