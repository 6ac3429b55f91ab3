"""The metrics of several processes as one: each writes its own to a file, and whoever is asked adds them up."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import orjson
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

LASTING = ("counter", "histogram", "summary")  # what outlives the process that counted it


class SharedMetrics:
    """One process's share. A process that takes the place of another goes on counting where that one ended, so that
    no sum ever goes down; of a process that is gone, at most what it counted since `publish` is lost.

    folder: the same for all, for as long as the server runs. slot: the number of this process, one at a time has it.
    """

    def __init__(self, registry: CollectorRegistry, folder: Path, slot: int) -> None:
        self._registry, self._folder, self._slot = registry, folder, slot
        self._before = [metric for metric in _read(_file(folder, slot)) if metric.type in LASTING]
        Gauge("patchsight_processes", "Processes that answer.", registry=registry).set(1)
        Counter("patchsight_process_starts", "Processes that began to answer.", registry=registry).inc()

    def publish(self) -> None:
        """Let the others know."""
        _write(_file(self._folder, self._slot), added([*self._before, *self._registry.collect()]))

    def text(self) -> bytes:
        """All processes' in Prometheus' text format: this one's as they are, the others' as they last told."""
        self.publish()
        every = [metric for path in sorted(self._folder.glob("*.json")) for metric in _read(path)]
        registry = CollectorRegistry()
        registry.register(_Fixed(added(every)))
        return generate_latest(registry)


class _Fixed(Collector):
    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = list(metrics)

    def collect(self) -> Iterable[Metric]:
        return self._metrics


def added(metrics: Iterable[Metric]) -> list[Metric]:
    """Samples of one name and labels become their sum; of points in time, the earliest."""
    sums: dict[str, Metric] = {}
    values: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]] = {}
    for metric in metrics:
        sums.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type))
        own = values.setdefault(metric.name, {})
        for sample in metric.samples:
            key = (sample.name, tuple(sample.labels.items()))
            if key not in own:
                own[key] = sample.value
            elif sample.name.endswith(("_created", "_start_time_seconds")):
                own[key] = min(own[key], sample.value)
            else:
                own[key] += sample.value
    for name, metric in sums.items():
        for (sample_name, labels), value in values[name].items():
            metric.add_sample(sample_name, dict(labels), value)
    return list(sums.values())


def retire(folder: Path, slot: int) -> None:
    """The process of this slot is gone: what it has counted stays, what it had at the moment does not."""
    path = _file(folder, slot)
    _write(path, [metric for metric in _read(path) if metric.type in LASTING])


def _file(folder: Path, slot: int) -> Path:
    return folder / f"{slot}.json"


def _write(path: Path, metrics: Iterable[Metric]) -> None:
    """Whole or not at all, so that a reader never sees half of it."""
    content = [
        (m.name, m.documentation, m.type, [(s.name, s.labels, s.value) for s in m.samples]) for m in metrics
    ]  # fmt: skip
    partial = path.with_suffix(".partial")
    partial.write_bytes(orjson.dumps(content))
    partial.replace(path)


def _read(path: Path) -> Iterator[Metric]:
    if not path.exists():
        return
    for name, documentation, kind, samples in orjson.loads(path.read_bytes()):
        metric = Metric(name, documentation, kind)
        for sample_name, labels, value in samples:
            metric.add_sample(sample_name, labels, float("nan") if value is None else value)
        yield metric
