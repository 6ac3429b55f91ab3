"""Can a user who has no labels choose between checkpoints? Label-free measures against the labelled one, by rank.

From what runs have logged at their evaluations. Knows no encoder and no image.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from patchsight_train.history import read_history
from patchsight_train.judge.plots import Cloud, scatter_chart
from patchsight_train.wording import measure, titled, value

MEASURED = ("rankme", "alignment", "uniformity", "feature_std")
LABELLED = ("knn", "linear_probe")
BOTH = "alignment + uniformity"
# "step" is the measure to beat: whoever knows nothing takes the last checkpoint.
LABEL_FREE = (*MEASURED, BOTH, "step")
FEWEST = 3  # points that have a rank correlation worth the name


@dataclass(frozen=True)
class Point:
    """One evaluation of a run. values: those of MEASURED and LABELLED that were logged; some may not be finite."""

    run: str
    step: int
    values: dict[str, float]

    def value(self, name: str) -> float:
        """Of a metric, of `BOTH`, or of "step"; NaN where it was not measured."""
        if name == "step":
            return float(self.step)
        if name == BOTH:
            return self.value("alignment") + self.value("uniformity")
        return self.values.get(name, math.nan)


def read_points(runs: Sequence[Path]) -> list[Point]:
    """Every evaluation in the runs' `metrics.jsonl`, run by run, in the order of steps; none of a run without one.

    A run is called by its folder's name, or by its whole path where two folders have one name.
    """
    names = [run.resolve().name for run in runs]
    points = []
    for run, name in zip(runs, names, strict=True):
        curves = read_history(run).curves
        found: dict[int, dict[str, float]] = {}
        for metric in curves.keys() & {*MEASURED, *LABELLED}:
            for step, x in zip(curves[metric].steps.tolist(), curves[metric].values.tolist(), strict=True):
                found.setdefault(int(step), {})[metric] = x
        label = name if names.count(name) == 1 else str(run)
        points += [Point(label, step, found[step]) for step in sorted(found)]
    return points


def rank_correlations(points: Sequence[Point], judge: str = "knn") -> dict[str, float]:
    """Spearman's rho of each of `LABEL_FREE` with the labelled `judge`, −1..1.

    Under "rankme" and so on over all points; under "rankme in NAME" within each run. Larger is better of RankMe and
    feature_std, so 1 is perfect; less is better of alignment, uniformity and their sum, where −1 is. Points that lack
    one of the two are left out; NaN where fewer than 3 remain, or one of the two never changes.

    Within one run most measures move with the training, and so does the judge: a rho says something only as far as it
    beats that of "step". Over runs it says something only where their settings and evaluations allow a comparison:
    RankMe grows with the number of images, alignment with the strength of the augmentation.
    """
    groups = {"": list(points)}
    for point in points:
        groups.setdefault(f" in {point.run}", []).append(point)
    return {f"{name}{where}": correlation(group, name, judge) for where, group in groups.items() for name in LABEL_FREE}


def correlation(points: Sequence[Point], name: str, judge: str) -> float:
    """Of those points that have both measures, and both finite."""
    pairs = np.array([(point.value(name), point.value(judge)) for point in points]).reshape(-1, 2)
    x, y = pairs[np.isfinite(pairs).all(axis=1)].T
    return spearman(x, y)


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's rho of finite float64 `(n,)`: Pearson's r of their ranks, where equal values share the mean of theirs.

    NaN for fewer than 3 pairs, and where all values are equal.
    """
    if len(x) < FEWEST or np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    a, b = (ranks(v) - (len(v) + 1) / 2 for v in (x, y))
    return float(a @ b / math.sqrt((a @ a) * (b @ b)))


def ranks(values: np.ndarray) -> np.ndarray:
    """1..n; equal values share the mean of their places. float64 `(n,)`."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    shared: np.ndarray = (last - (counts - 1) / 2)[place]
    return shared


def ranking_chart(points: Sequence[Point], judge: str = "knn") -> str:
    """A scatter plot for each of `LABEL_FREE` against the judge, a color for each run, as `<figure>`s for a grid of
    class "charts"; inline SVG like the training report's. Measures that no point has are left out."""
    runs = list(dict.fromkeys(point.run for point in points))
    found = rank_correlations(points, judge)
    kind = measure(judge)
    figures = []
    for name in LABEL_FREE:
        clouds = [_cloud(run, rank, points, name, judge) for rank, run in enumerate(runs)]
        within = [
            _rho(found[f"{name} in {run}"]) + f" in {run}" for run in runs if math.isfinite(found[f"{name} in {run}"])
        ]
        figures.append(
            scatter_chart(
                titled(name), clouds, measure(name).label, f"{kind.label}, {kind.unit}".removesuffix(", "),
                now=_rho(found[name]), note=", ".join(["ρ is over all", *within]) if len(runs) > 1 else "",
            )
        )  # fmt: skip
    return "".join(figures)


def _rho(x: float) -> str:
    return f"ρ {x:.2f}".replace("-", "−") if math.isfinite(x) else ""


def _cloud(run: str, rank: int, points: Sequence[Point], name: str, judge: str) -> Cloud:
    """The run's points that have both measures."""
    kept = [p for p in points if p.run == run and math.isfinite(p.value(name)) and math.isfinite(p.value(judge))]
    x, y = np.array([p.value(name) for p in kept]), np.array([p.value(judge) for p in kept])
    hints = [f"{run}, step {p.step:,}: {value(name, p.value(name))}, {value(judge, p.value(judge))}" for p in kept]
    return Cloud(run, rank, x, measure(judge).factor * y, hints)
