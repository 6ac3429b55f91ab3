"""Bulk embedding into one Parquet file: what is done is in a journal beside it, and the file comes at the end."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np

from patchsight_serve import journal as journals
from patchsight_serve.dataset import Dataset
from patchsight_serve.embedder import BATCH, Embedder, batches, embed_dataset
from patchsight_serve.embedding_file import written
from patchsight_serve.errors import InvalidRequest, PatchsightError
from patchsight_serve.item import Identity
from patchsight_serve.journal import Done, Journal
from patchsight_serve.nearest import F32, I64
from patchsight_serve.skipped import Skipped, shown

# Does rows int64 of a dataset, in any order, a list at a time.
Work = Callable[[I64], Iterable[list[Done]]]


class BulkFile:
    """The file at `out` that is to hold the embeddings of a dataset, its journal, and its list of what was left out.

    Raises InvalidRequest where there is such a file, and no unfinished work on it.
    """

    def __init__(self, out: Path, skipped: Path | None = None) -> None:
        self.out = out
        self._journal = beside(out, "journal")
        self._skipped = skipped or beside(out, "skipped.jsonl")
        if out.exists() and not self._journal.exists():
            raise _exists(out)

    def restart(self) -> None:
        """Throw away what was done. Raises Conflict where another process is at it."""
        journals.discard(self._journal)

    def make(
        self, dataset: Dataset, encoder: Identity, output: str, work: Work, advance: Callable[[int], None]
    ) -> tuple[int, Skipped]:
        """Do what is not done yet, then write the file. How many embeddings are in it, and what was left out.

        advance: told how many images are done, first those of before.

        Raises what `Journal` raises; InvalidRequest where there is a file, or no image can be embedded; OSError. What
        is done stays done, and a call with the same arguments goes on.
        """
        with closing(Journal(self._journal, _plan(dataset, encoder, output))) as journal:
            done = journal.has(len(dataset))
            if self.out.exists() and not done.all():
                raise _exists(self.out)
            known = ((shown(dataset.names[row]), str(reason)) for row, reason in journal.bad())
            skipped = Skipped(self._skipped, known)
            advance(int(done.sum()))
            for some in work(np.flatnonzero(~done)):
                journal.put(some)
                skipped.add((shown(dataset.names[o.row]), o.result) for o in some if isinstance(o.result, str))
                advance(len(some))
            first = next(journal.bad(), None)
            if skipped.count < len(dataset) and not self.out.exists():  # it is there where the stop came behind it
                _write(self.out, dataset, encoder, output, journal)
        journals.remove(self._journal)
        if skipped.count == len(dataset) and first is not None:
            message = f"{shown(dataset.names[first.row])}: {first.result}"
            raise InvalidRequest(f"none of {len(dataset)} images can be embedded; {message}")
        return len(dataset) - skipped.count, skipped


def beside(out: Path, suffix: str) -> Path:
    """`e.parquet` and `journal` is `e.parquet.journal`."""
    return out.with_name(f"{out.name}.{suffix}")


def embedding(dataset: Dataset, embedder: Embedder) -> Work:
    """Work that one embedder does, in order."""

    def work(rows: I64) -> Iterator[list[Done]]:
        todo = rows.tolist()
        pairs = zip(todo, embed_dataset(dataset, embedder, todo), strict=True)
        # As many as are encoded together: after a stop the others are encoded with the same ones as without.
        for batch in batches(pairs, BATCH):
            yield [Done(row, checked(result)) for row, result in batch]

    return work


def checked(result: F32 | PatchsightError) -> F32 | str:
    """An embedding, or why there is none."""
    if isinstance(result, PatchsightError):
        return result.message
    return result if np.isfinite(result).all() else "its embedding holds NaN or infinity"


def _write(out: Path, dataset: Dataset, encoder: Identity, output: str, journal: Journal) -> None:
    with written(out, dataset.class_names, encoder, output) as file:
        for row, result in journal.rows():
            if not isinstance(result, str):
                label = -1 if dataset.labels is None else int(dataset.labels[row])
                file.add(shown(dataset.names[row]), None if label < 0 else label, result)


def _plan(dataset: Dataset, encoder: Identity, output: str) -> dict[str, str]:
    """What must be the same when the work goes on. The contents of image files are not looked at, which would take as
    long as the work."""
    digest = hashlib.sha256(json.dumps([dataset.class_names, dataset.nbytes]).encode())
    for name in dataset.names:
        digest.update(name.encode("utf-8", "surrogateescape") + b"\0")
    digest.update(b"" if dataset.labels is None else dataset.labels.astype("<i8").tobytes())
    return {
        "encoder": f"{encoder.name!r} (sha256 {encoder.sha256})",
        "output": repr(output),
        "number of images": f"{len(dataset):,}",
        "list of images": digest.hexdigest()[:16],
    }


def _exists(out: Path) -> InvalidRequest:
    return InvalidRequest(f"{out} exists already; choose another --out, or delete it")
