"""An approximate index as a file beside the record, so that a large gallery is searched fast from its start on.

The file is a cache, and never believed: a checksum covers all of it, and each vector in it must be the record's own,
bit for bit. What the record no longer holds is taken out, what is new is put in. A file that is of no use is removed.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import faiss
import numpy as np

from patchsight_serve.approximate import Plan, keys_of
from patchsight_serve.durable import sync
from patchsight_serve.nearest import F32, I64

log = logging.getLogger(__name__)

MAGIC = b"PSINDEX1"
DIGEST = 16  # bytes
NEW, FEW = 0.1, 512  # of all vectors, or so many in any case: to put in more takes longer than a start should
SPARE = 2  # times the file's size: what must be free on the disk, or writes to the gallery might find none
_CHUNK = 1024 * 1024


class Restored(NamedTuple):
    """An index as it was kept. changed: how many vectors were put in and taken out since."""

    index: Any
    plan: Plan
    changed: int


class IndexFile:
    """The file at `path`: magic, a blake2b of all that follows, the length of a JSON header, the header, and the index
    in FAISS's own format. One thread at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._partial = path.with_name(f"{path.name}.partial")

    def write(self, index: Any, plan: Plan) -> None:
        """Replace what is there, durably and as a whole. Where that fails, it is said, and nothing is there."""
        size = index.ntotal * (4 * index.d + 24) + index.nlist * 4 * index.d
        try:
            if (free := shutil.disk_usage(self._path.parent).free) < SPARE * size:
                raise OSError(f"it takes {size:,} bytes, and only {free:,} are free")
            with self._partial.open("wb") as file:
                sink = _Sink(file)
                file.write(MAGIC + bytes(DIGEST))
                header = json.dumps({"plan": asdict(plan)}).encode()
                sink.write(len(header).to_bytes(4, "little") + header)
                faiss.write_index(index, faiss.PyCallbackIOWriter(sink.write))  # type: ignore[attr-defined]
                if sink.error is not None:
                    raise sink.error
                file.seek(len(MAGIC))
                file.write(sink.hash.digest())
                file.flush()
                os.fsync(file.fileno())
            self._partial.replace(self._path)
            sync(self._path.parent)
        except OSError as error:
            log.warning("%s was not written, the next start builds the index anew: %s", self._path, error)
            self._remove()

    def read(self, rows: Iterable[tuple[I64, F32]], least: int) -> Restored | None:
        """The index, brought to what the record holds: keys `(N,)`, ascending, and unit vectors `(N, D)`, in chunks.

        None where there is no file of any use, or fewer than `least` vectors; then it is removed, and why is said.
        """
        if not self._path.exists():
            return None
        try:
            index, plan = self._load()
            changed = _catch_up(index, rows)
            if index.ntotal < least:
                raise _Useless(f"{index.ntotal} vectors are searched one by one")
        except (_Useless, OSError) as error:
            log.warning("%s is of no use, and removed: %s", self._path, error)
            self._remove()
            return None
        log.info("%s has %d vectors; %d of them changed since it was written", self._path, index.ntotal, changed)
        return Restored(index, plan, changed)

    def _load(self) -> tuple[Any, Plan]:
        with self._path.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise _Useless("it is no index of this version")
            told, found = file.read(DIGEST), hashlib.blake2b(digest_size=DIGEST)
            while some := file.read(_CHUNK):
                found.update(some)
            if found.digest() != told:
                raise _Useless("it is damaged: its checksum is another one")
            file.seek(len(MAGIC) + DIGEST)
            header = json.loads(file.read(int.from_bytes(file.read(4), "little")))
            try:
                plan = Plan(**header["plan"] | {"probes": tuple(header["plan"]["probes"])})
                reader = faiss.PyCallbackIOReader(file.read)  # type: ignore[attr-defined]
                return faiss.read_index(reader), plan
            except (KeyError, TypeError, RuntimeError) as error:  # the last is FAISS's
                raise _Useless(f"it is of another version: {error!r}") from None

    def _remove(self) -> None:
        for path in (self._path, self._partial):
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                log.warning("%s cannot be removed: %s", path, error)


class _Useless(Exception):
    """Why a file is of no use."""


class _Sink:
    """Hashes what is written. FAISS does not know our errors, so the first one is kept, and nothing written from then
    on."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.hash = hashlib.blake2b(digest_size=DIGEST)
        self.error: OSError | None = None

    def write(self, data: bytes) -> None:
        if self.error is None:
            try:
                self._file.write(data)
                self.hash.update(data)
            except OSError as error:
                self.error = error


def _catch_up(index: Any, rows: Iterable[tuple[I64, F32]]) -> int:
    """How many vectors were put in and taken out. Raises _Useless where that is no way to begin."""
    kept = np.sort(keys_of(index))
    found = np.zeros(len(kept), bool)
    new, most = 0, max(FEW, int(NEW * len(kept)))
    for keys, vectors in rows:
        if vectors.shape[1] != index.d:
            raise _Useless(f"its vectors have {index.d} values, those of the record {vectors.shape[1]}")
        place = np.minimum(np.searchsorted(kept, keys), len(kept) - 1)
        there = kept[place] == keys
        if (index.reconstruct_batch(keys[there]) != vectors[there]).any():
            raise _Useless("its vectors are not those of the record")
        found[place[there]] = True
        new += int(np.count_nonzero(~there))
        if new > most:
            raise _Useless(f"more than {most} vectors of the record are not in it")
        index.add_with_ids(vectors[~there], keys[~there])
    index.remove_ids(kept[~found])
    return new + int(np.count_nonzero(~found))
