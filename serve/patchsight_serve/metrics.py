"""What Prometheus may ask. One registry per application, so that two in one process do not collide."""

import shutil
from collections.abc import Callable
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from patchsight_serve.shared_metrics import SharedMetrics

# Seconds, geometric: 0.1 ms to 13 s, each twice the one before.
SECONDS = tuple(0.0001 * 2**i for i in range(18))
BATCH_SIZES = tuple(float(2**i) for i in range(11))


class Metrics:
    """The server's counters and histograms. Labels are route templates, names of encoders and error codes: a bounded
    set, whatever clients send."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.sisters: SharedMetrics | None = None  # set where this is one of several processes

        def seconds(name: str, text: str) -> Histogram:
            return Histogram(f"patchsight_{name}_seconds", text, registry=registry, buckets=SECONDS)

        self.requests = Counter(
            "patchsight_requests", "Requests answered.", ("method", "route", "code"), registry=registry
        )
        self.duration = Histogram(
            "patchsight_request_duration_seconds",
            "From the request's header to the reply's last byte.",
            ("route",),
            registry=registry,
            buckets=SECONDS,
        )
        self.images = Counter("patchsight_images", "Images encoded.", ("encoder",), registry=registry)
        self.shared = Counter(
            "patchsight_shared_images", "Images that were in work already, for another request or the same.",
            ("encoder",), registry=registry,
        )  # fmt: skip
        self.rejected = Counter(
            "patchsight_rejected_images", "Images not encoded, by the code of their error.", ("reason",),
            registry=registry,
        )  # fmt: skip
        self.refused = Counter(
            "patchsight_rejected_requests", "Requests and connections answered with an error, by its code.",
            ("reason",), registry=registry,
        )  # fmt: skip
        self.connections = Gauge("patchsight_connections", "Open connections.", registry=registry)
        self.decode = seconds("decode", "Decoding all images of a request.")
        self.queue = seconds("queue", "From the queue's end to the first batch of a request.")
        self.infer = seconds("infer", "From the first batch of a request to the end of its last.")
        self.encode = seconds("encode", "Writing the reply.")
        self.batch_size = Histogram(
            "patchsight_batch_size", "Images in a batch.", ("encoder",), registry=registry, buckets=BATCH_SIZES
        )
        self.reloads = Counter(
            "patchsight_reloads", "Reloads of the encoders; failed where an encoder could not be.", ("result",),
            registry=registry,
        )  # fmt: skip
        self.queued = Gauge(
            "patchsight_admitted_images", "Images being decoded, waiting or encoded.", ("encoder",), registry=registry
        )

    def watch_queue(self, encoder: str, depth: Callable[[], float]) -> None:
        """Report `depth()` as the encoder's queue whenever Prometheus asks."""
        self.queued.labels(encoder).set_function(depth)

    def forget_queue(self, encoder: str) -> None:
        """Report it no more."""
        self.queued.remove(encoder)

    def watch_galleries(self, held: Callable[[], tuple[int, int]], folder: Path) -> None:
        """Report how many galleries are open and how many images they have, by `held()`, and the space that is left
        where they are kept."""
        told = {
            "open_galleries": ("Galleries that have been asked for since the start.", lambda: held()[0]),
            "gallery_images": ("Images in them.", lambda: held()[1]),
            "free_bytes": ("Space left on the disk of the galleries.", lambda: _free(folder)),
        }
        for name, (text, number) in told.items():
            Gauge(f"patchsight_{name}", text, registry=self.registry).set_function(number)

    def text(self) -> bytes:
        """All of it, of all processes, in Prometheus' text format."""
        return generate_latest(self.registry) if self.sisters is None else self.sisters.text()


def _free(folder: Path) -> float:
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(there).free
