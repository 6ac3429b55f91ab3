"""How a run's numbers are called and written, on the terminal and in the report."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Measure:
    """A number of `metrics.jsonl`. The unit "%" stands for a share, 0..1, that is written times 100."""

    label: str
    unit: str = ""

    @property
    def factor(self) -> float:
        return 100.0 if self.unit == "%" else 1.0


# What an evaluation adds to a step's metrics.
EVALUATED = {
    "accuracy": Measure("accuracy", "%"),
    "knn": Measure("20-NN", "%"),
    "linear_probe": Measure("linear probe", "%"),
    "rankme": Measure("RankMe"),
    "alignment": Measure("alignment"),
    "uniformity": Measure("uniformity"),
    "feature_std": Measure("feature std · √D"),
}
_MEASURES = {
    **EVALUATED,
    "lr": Measure("learning rate"),
    "images_per_s": Measure("speed", "images/s"),
    "contrastive_accuracy": Measure("contrastive accuracy", "%"),
    "batch_accuracy": Measure("accuracy on views of the batch", "%"),
    "agreement": Measure("agreement with the teacher", "%"),
    "psnr": Measure("PSNR", "dB"),
    "teacher_entropy": Measure("of an image", "nats"),
    "teacher_mean_entropy": Measure("of the mean over images", "nats"),
    "code_entropy": Measure("of an image", "nats"),
    "code_mean_entropy": Measure("of the mean over images", "nats"),
}


def measure(name: str) -> Measure:
    """What is known of a metric; one that is not known is called by its own name."""
    return _MEASURES.get(name) or Measure(name.replace("_", " "))


def titled(name: str) -> str:
    """The label as a heading."""
    label = measure(name).label
    return label[:1].upper() + label[1:]


def value(name: str, x: float) -> str:
    """A metric's value with its unit: `58.1 %`, `812 images/s`, `2.996`."""
    kind = measure(name)
    text = number(x * kind.factor, 3 if kind.unit in ("%", "images/s") else 4)
    return f"{text} {kind.unit}" if kind.unit else text


def number(x: float, digits: int = 4) -> str:
    """So many significant digits, with thousands separators: `12,346`, `2.996`, `8.2e-05`."""
    if not math.isfinite(x):
        return str(x)
    if x and not 1e-3 <= abs(x) < 1e7:
        return f"{x:.{max(digits - 2, 1)}e}"
    if x == 0:
        return "0"
    decimals = max(digits - 1 - math.floor(math.log10(abs(x))), 0)
    return f"{x:,.{decimals}f}"


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 20 min`, `2 d 4 h`: two units at most, rounded."""
    seconds = round(seconds)
    if seconds < 100:
        return f"{seconds} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h" if hours else f"{days} d"
