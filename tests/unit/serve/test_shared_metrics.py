"""Metrics of several processes: sums that never go down."""

from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.parser import text_string_to_metric_families

from patchsight_serve.shared_metrics import SharedMetrics, retire


class Process:
    """What one process counts."""

    def __init__(self, folder: Path, slot: int) -> None:
        registry = CollectorRegistry()
        self.images = Counter("images", "Images.", ("encoder",), registry=registry)
        self.queued = Gauge("queued", "Images waiting.", ("encoder",), registry=registry)
        self.spent = Histogram("spent_seconds", "Time.", registry=registry, buckets=(0.1, 1))
        self.shared = SharedMetrics(registry, folder, slot)

    def work(self, encoder: str, images: int, seconds: float) -> None:
        self.images.labels(encoder).inc(images)
        self.queued.labels(encoder).set(images)
        self.spent.observe(seconds)
        self.shared.publish()


def read(process: Process) -> dict[tuple[str, ...], float]:
    text = process.shared.text().decode()
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_sums_over_processes_and_over_who_had_their_place_before(tmp_path: Path) -> None:
    one, two = Process(tmp_path, 0), Process(tmp_path, 1)
    one.work("a", 3, 0.05)
    two.work("a", 4, 0.5)
    two.work("b", 1, 5)
    for process in (one, two):
        found = read(process)
        assert found["images_total", "a"] == found["queued", "a"] == 7
        assert found["images_total", "b"] == 1
        assert [found["spent_seconds_bucket", le] for le in ("0.1", "1.0", "+Inf")] == [1, 2, 3]
        assert found["spent_seconds_sum",] == 5.55
        assert found["patchsight_processes",] == found["patchsight_process_starts_total",] == 2

    retire(tmp_path, 1)
    found = read(one)
    assert found["images_total", "a"] == 7
    assert found["queued", "a"] == 3
    assert found["patchsight_processes",] == 1
    three = Process(tmp_path, 1)
    three.work("a", 10, 0.05)
    found = read(one)
    assert found["images_total", "a"] == 17
    assert found["images_total", "b"] == 1
    assert found["queued", "a"] == 13
    assert found["spent_seconds_count",] == 4
    assert (found["patchsight_processes",], found["patchsight_process_starts_total",]) == (2, 3)


def test_retiring_a_process_that_never_told(tmp_path: Path) -> None:
    retire(tmp_path, 0)
    assert read(Process(tmp_path, 0))["patchsight_process_starts_total",] == 1
