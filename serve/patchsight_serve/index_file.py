"""An approximate index as a file beside the record, so that a large gallery is searched fast from its start on.

The file is a cache, and never believed: a checksum covers all of it, and it has a mark of each vector that it was made
from, which the record's must have, too. What is new gets its code, what is gone is passed over. A file that is of no
use is removed.
"""

import hashlib
import json
import logging
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import faiss
import numpy as np

from patchsight_serve.approximate import Approximate, Plan, Reading
from patchsight_serve.durable import sync
from patchsight_serve.nearest import F32, I64
from patchsight_serve.vectors import Vectors

log = logging.getLogger(__name__)

MAGIC = b"PSINDEX1"
DIGEST = 16  # bytes
NEW, FEW = 0.1, 512  # of all vectors; vectors: more that have no code yet are a reason to make all of them anew
SPARE = 2  # times the file's size: what must be free on the disk, or writes to the gallery might find none
_CHUNK = 8192  # vectors: a change waits for so many at most


class IndexFile:
    """The file at `path`: magic, a blake2b of all that follows, the length of a JSON header, the header, the keys, a
    mark for each, and the codes in FAISS's own format. One thread at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._partial = path.with_name(f"{path.name}.partial")

    def write(self, made: Approximate, vectors: Vectors, reading: Reading) -> None:
        """Replace what is there, durably and as a whole. reading: no vector changes during its block. Where that fails,
        it is said, and nothing is there."""
        keys, marks = _marked(made, vectors, reading)
        codes = faiss.serialize_index(made.codes).tobytes()
        header = json.dumps({"plan": asdict(made.plan), "vectors": len(keys)}).encode()
        parts = (len(header).to_bytes(4, "little"), header, _bytes(keys), _bytes(marks), codes)
        size, hashed = sum(map(len, parts)), hashlib.blake2b(digest_size=DIGEST)
        try:
            if (free := shutil.disk_usage(self._path.parent).free) < SPARE * size:
                raise OSError(f"it takes {size:,} bytes, and only {free:,} are free")
            with self._partial.open("wb") as file:
                for part in parts:
                    hashed.update(part)
                file.writelines((MAGIC, hashed.digest(), *parts))
                file.flush()
                os.fsync(file.fileno())
            self._partial.replace(self._path)
            sync(self._path.parent)
        except OSError as error:
            log.warning("%s was not written, the next start builds the index anew: %s", self._path, error)
            self._remove()

    def read(self, vectors: Vectors) -> tuple[Approximate, int] | None:
        """The codes, those of vectors that came later with them, and how many these were. None where there is no file
        of any use; then it is removed, and why is said."""
        if not self._path.exists():
            return None
        try:
            made, keys, marks = self._load()
            if made.codes.d != vectors.d:
                raise _Useless(f"its vectors have {made.codes.d} values, those of the record {vectors.d}")
            new = _check(vectors, keys, marks)
        except (_Useless, OSError) as error:
            log.warning("%s is of no use, and removed: %s", self._path, error)
            self._remove()
            return None
        if new.size:
            made.add(new, vectors.reconstruct_batch(new))
        log.info("%s has %d vectors; %d have come since it was written", self._path, len(keys), len(new))
        return made, len(new)

    def _load(self) -> tuple[Approximate, I64, I64]:
        content = self._path.read_bytes()
        told, rest = content[len(MAGIC) : len(MAGIC) + DIGEST], memoryview(content)[len(MAGIC) + DIGEST :]
        if not content.startswith(MAGIC):
            raise _Useless("it is no index of this version")
        if hashlib.blake2b(rest, digest_size=DIGEST).digest() != told:
            raise _Useless("it is damaged: its checksum is another one")
        try:
            begin = 4 + int.from_bytes(rest[:4], "little")
            header = json.loads(bytes(rest[4:begin]))
            plan = Plan(**header["plan"] | {"probes": tuple(header["plan"]["probes"])})
            middle, end = begin + 8 * header["vectors"], begin + 16 * header["vectors"]
            keys, marks = np.frombuffer(rest[begin:middle], "<i8"), np.frombuffer(rest[middle:end], "<i8")
            codes = faiss.deserialize_index(np.frombuffer(rest[end:], np.uint8))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:  # the last is FAISS's
            raise _Useless(f"it is of another version: {error!r}") from None
        return Approximate(codes, plan), keys, marks

    def _remove(self) -> None:
        for path in (self._path, self._partial):
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                log.warning("%s cannot be removed: %s", path, error)


class _Useless(Exception):
    """Why a file is of no use."""


def marks_of(vectors: F32) -> I64:
    """64 bits for each of the vectors `(N, D)`, which differ where any bit of them does, but by chance."""
    factors = np.random.default_rng(0).integers(1, 2**63, vectors.shape[1], np.uint64) | np.uint64(1)
    bits = np.ascontiguousarray(vectors, dtype="<f4").view("<u4")
    marks: I64 = (bits * factors).sum(axis=1, dtype=np.uint64).view(np.int64)
    return marks


def _marked(made: Approximate, vectors: Vectors, reading: Reading) -> tuple[I64, I64]:
    """Keys and marks of those vectors of the codes that are still there."""
    coded = made.keys()
    keys, marks = [coded[:0]], [coded[:0]]
    for start in range(0, len(coded), _CHUNK):
        with reading():
            there, found = vectors.read(coded[start : start + _CHUNK])
        keys.append(there)
        marks.append(marks_of(found))
    return np.concatenate(keys), np.concatenate(marks)


def _bytes(numbers: I64) -> bytes:
    return numbers.astype("<i8").tobytes()


def _check(vectors: Vectors, keys: I64, marks: I64) -> I64:
    """Keys of vectors that have come since. Raises _Useless."""
    there = vectors.has(keys)
    keys, marks = keys[there], marks[there]
    for start in range(0, len(keys), _CHUNK):
        some = slice(start, start + _CHUNK)
        if (marks_of(vectors.reconstruct_batch(keys[some])) != marks[some]).any():
            raise _Useless("its vectors are not those of the record")
    new = np.setdiff1d(vectors.keys(), keys)
    if len(new) > max(NEW * vectors.ntotal, FEW):
        raise _Useless(f"{len(new)} of {vectors.ntotal} vectors of the record are not in it")
    return new
