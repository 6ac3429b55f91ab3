"""What was seen of one server, over all rounds, and the figures that come of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from load_generator import Reply, goodput, percentile_ms

LIMIT_S = 2.0  # a reply that took longer is no good to whoever asked
REFUSALS = (429, 503)


@dataclass(frozen=True)
class Saturated:
    """A closed loop: images a second, and the server's CPU ms for each."""

    rate: float
    cpu_ms: float
    failed: int


@dataclass(frozen=True)
class Offered:
    """An open loop of `rate` requests a second for `seconds`. memory_mb: the peak meanwhile."""

    rate: float
    seconds: float
    replies: list[Reply]
    memory_mb: float


@dataclass
class Record:
    """failure: why there is nothing else. closed: a figure per round, by connections. open: a run per round, by what
    the load is a share of. overload: the same, by how many times the server's own saturation."""

    label: str
    version: str = ""
    failure: str | None = None
    cosine: float = 0.0  # of its first embedding with the bare encoder's
    closed: dict[int, list[Saturated]] = field(default_factory=dict)
    open: dict[str, list[Offered]] = field(default_factory=dict)
    overload: dict[int, list[Offered]] = field(default_factory=dict)

    @property
    def saturation(self) -> int:
        """The number of connections with the highest rate."""
        return max(self.closed, key=lambda connections: median(s.rate for s in self.closed[connections]))

    @property
    def peak(self) -> float:
        """Images a second at saturation, median of the rounds."""
        return median(s.rate for s in self.closed[self.saturation])

    @property
    def first_peak(self) -> float:
        """Of the first round, which all later loads are shares of."""
        return max(runs[0].rate for runs in self.closed.values())

    def figures(self) -> dict[str, Any]:
        if self.failure is not None or not self.closed:
            return {"label": self.label, "failure": self.failure}
        at_best = self.closed[self.saturation]
        return {
            "label": self.label,
            "version": self.version,
            "cosine": round(self.cosine, 6),
            "saturation": {
                "connections": self.saturation,
                "images_per_s": _spread([s.rate for s in at_best]),
                "cpu_ms_per_image": _spread([s.cpu_ms for s in at_best]),
            },
            "closed": {
                connections: {
                    "images_per_s": _spread([s.rate for s in runs]),
                    "cpu_ms_per_image": _spread([s.cpu_ms for s in runs]),
                    "failed": sum(s.failed for s in runs),
                }
                for connections, runs in self.closed.items()
            },
            "open": {share: _latencies(runs) for share, runs in self.open.items()},
            "overload": {times: _latencies(runs) | self._overload(runs) for times, runs in self.overload.items()},
        }

    def _overload(self, runs: Sequence[Offered]) -> dict[str, Any]:
        refused = [reply for run in runs for reply in run.replies if reply.status in REFUSALS]
        good = [goodput(run.replies, LIMIT_S, run.seconds) for run in runs]
        told = [Reply(200, reply.seconds) for reply in refused]
        return {
            "goodput_per_s": _spread(good),
            "goodput_of_peak": round(median(good) / self.peak, 3),
            "refused": round(len(refused) / max(sum(len(run.replies) for run in runs), 1), 3),
            "refused_p50_ms": round(percentile_ms(told, 50), 1) if told else None,
            "refused_p99_ms": round(percentile_ms(told, 99), 1) if told else None,
            "memory_mb": round(max(run.memory_mb for run in runs)),
        }


def _latencies(runs: Sequence[Offered]) -> dict[str, Any]:
    replies = [reply for run in runs for reply in run.replies]
    return {
        "offered_per_s": round(median(run.rate for run in runs), 1),
        "requests": len(replies),
        "answered": sum(reply.status == 200 for reply in replies),
        **{f"p{percent}_ms": round(percentile_ms(replies, percent), 1) for percent in (50, 95, 99)},
        "p99_ms_of_rounds": [round(percentile_ms(run.replies, 99), 1) for run in runs],
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": round(median(values), 2), "least": round(min(values), 2), "most": round(max(values), 2)}
