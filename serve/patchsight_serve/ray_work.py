"""Bulk embedding by many machines: Ray Data has its workers do the rows of a dataset, part by part.

A part is done as the single process does it, in the same batches, so that it has the same numbers. A worker that dies
is started again by Ray, and does its part anew; what comes back is in the journal before it counts.
"""

import logging
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from patchsight_serve.bulk import Work, checked
from patchsight_serve.dataset import Dataset
from patchsight_serve.embedder import BATCH, batches, embed_dataset
from patchsight_serve.embedder_settings import EmbedderSettings, open_embedder
from patchsight_serve.errors import Conflict, InvalidRequest, PatchsightError
from patchsight_serve.item import Identity
from patchsight_serve.journal import Done
from patchsight_serve.nearest import I64

if TYPE_CHECKING:
    from patchsight_serve.embedder import Embedder

PART = 8 * BATCH  # images, at least: a second's work or more, beside which the cost of a task is nothing
MOST_PARTS = 4000  # whose bookkeeping Ray does without effort
STARTS = 3  # it gives its processes half a minute, which a busy machine may not have
_SCHEMA = pa.schema([("row", pa.int64()), ("vector", pa.binary()), ("reason", pa.string())])


def by_ray(dataset: Dataset, settings: EmbedderSettings, embedder: "Embedder") -> Work:
    """Work that the machines of a cluster do, `RAY_ADDRESS`, or the cores of this one. The sources, the encoder and the
    working folder must be there under the same paths on all of them.

    embedder: one as theirs. Raises InvalidRequest where Ray is not installed.
    """
    ray = _ray()
    settings = settings.model_copy(update={"encoder": embedder.encoder.name, "output": embedder.output})

    def work(rows: I64) -> Iterator[list[Done]]:
        size = max(PART, -(-len(rows) // MOST_PARTS // BATCH) * BATCH)
        parts = list(batches(rows.tolist(), size))
        if not parts:
            return
        _start(ray)
        try:
            job = ray.put((dataset, parts))
            workers = min(int(ray.cluster_resources().get("CPU", 1)), len(parts))
            numbers = ray.data.from_items([{"part": i} for i in range(len(parts))], override_num_blocks=len(parts))
            done = numbers.map_batches(
                Worker, fn_constructor_args=(settings, embedder.encoder, os.getcwd(), [job]),  # noqa: PTH109 - text
                batch_size=1, batch_format="pyarrow", compute=ray.data.ActorPoolStrategy(size=workers), num_cpus=1,
            )  # fmt: skip
            for table in done.iter_batches(batch_size=None, batch_format="pyarrow"):
                yield [_done(**entry) for entry in table.to_pylist()]
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None)
            raise cause if isinstance(cause, PatchsightError) else PatchsightError(f"Ray: {error}") from None
        finally:
            ray.shutdown()

    return work


def _ray() -> Any:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # it would tell others of its use
    try:
        import ray.data
    except ImportError:
        raise InvalidRequest("--ray needs Ray Data: pip install 'patchsight[ray]'", "ray") from None
    return ray


def _start(ray: Any) -> None:
    """Its own bar and its lines would be between ours. Raises PatchsightError."""
    where: dict[str, Any] = {} if "RAY_ADDRESS" in os.environ else {"address": "local", "include_dashboard": False}
    for left in reversed(range(STARTS)):
        try:
            ray.init(**where, log_to_driver=False, logging_level=logging.WARNING)
            break
        except Exception as error:  # a plain one where its processes take too long
            ray.shutdown()
            if not left:
                raise PatchsightError(f"Ray did not start: {error}") from error
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    ray.data.DataContext.get_current().enable_progress_bars = False


class Worker:
    """A process of Ray with the encoder in it, which does one part after the other."""

    def __init__(self, settings: EmbedderSettings, encoder: Identity, folder: str, job: Sequence[Any]) -> None:
        """job: the dataset and the parts' rows, as a reference."""
        import ray

        self._dataset: Dataset
        self._parts: list[list[int]]
        self._dataset, self._parts = ray.get(job[0])
        try:
            os.chdir(folder)
        except OSError as error:
            raise PatchsightError(f"machine {socket.gethostname()} has no {folder}, where we are: {error}") from None
        self._open = ExitStack()
        self._embedder = self._open.enter_context(open_embedder(settings, threads=1))
        if self._embedder.encoder != encoder:
            raise Conflict(
                f"machine {socket.gethostname()} has another encoder {encoder.name!r}: sha256 "
                f"{self._embedder.encoder.sha256}, not {encoder.sha256}"
            )

    def __call__(self, batch: pa.Table) -> pa.Table:
        """A table with one part's number to a table with what was done of it."""
        rows = self._parts[batch.column("part")[0].as_py()]
        results = map(checked, embed_dataset(self._dataset, self._embedder, rows))
        entries = [
            (row, None, result) if isinstance(result, str) else (row, result.astype("<f4").tobytes(), None)
            for row, result in zip(rows, results, strict=True)
        ]
        return pa.table(
            [pa.array(c, f.type) for c, f in zip(zip(*entries, strict=True), _SCHEMA, strict=True)], _SCHEMA
        )


def _done(row: int, vector: bytes | None, reason: str) -> Done:
    return Done(row, reason if vector is None else np.frombuffer(vector, "<f4").astype(np.float32))
