"""Maps of galleries by UMAP: one in work at a time, in a process of its own, and each kept while it is true. Never
imports UMAP itself."""

import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections import OrderedDict
from contextlib import suppress
from importlib.util import find_spec
from io import BytesIO
from typing import IO, Literal, NamedTuple

import numpy as np

from patchsight_serve.errors import PatchsightError
from patchsight_serve.gallery import Gallery
from patchsight_serve.item import Identity
from patchsight_serve.nearest import F32, I64
from patchsight_serve.umap_child import LEAST

logger = logging.getLogger(__name__)

KEPT = 8  # galleries
RETRY_S = 60.0  # after a failure
COMMAND = [sys.executable, "-P", "-m", "patchsight_serve.umap_child"]

State = Literal["none", "working", "waiting", "stale", "ready", "failed", "too_few", "not_installed"]


class Outcome(NamedTuple):
    """How a gallery's map stands. keys int64 `(N,)` and plane float32 `(N, 2)`: the latest one, with states `ready` and
    `stale`. error: with `failed`."""

    state: State
    keys: I64 | None = None
    plane: F32 | None = None
    error: str | None = None


class _Kept(NamedTuple):
    gallery: "weakref.ref[Gallery]"
    encoder: Identity | None
    keys: I64  # a key names one vector for ever
    plane: F32 | None  # None: it failed
    error: str | None
    ended: float


class Umaps:
    """All that a server has. Every method may be called from any thread."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._lock = threading.Lock()
        self._working: str | None = None  # for which gallery
        self._process: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None
        self._closed = False

    def look(self, gallery: Gallery, keys: I64, begin: bool) -> Outcome:
        """How the map of these keys int64 `(N,)` of a gallery stands. begin: have it made where there is none."""
        if len(keys) < LEAST:
            return Outcome("too_few")
        if find_spec("umap") is None:
            return Outcome("not_installed")
        encoder = gallery.encoder
        with self._lock:
            kept = self._kept.get(gallery.name)
            if kept is not None and (kept.gallery() is not gallery or kept.encoder != encoder):
                kept = None
            if kept is not None and np.array_equal(kept.keys, keys):
                if kept.plane is not None:
                    return Outcome("ready", kept.keys, kept.plane)
                if time.monotonic() < kept.ended + RETRY_S or not begin:
                    return Outcome("failed", error=kept.error)
            if begin and self._working is None and not self._closed:
                self._begin(gallery, encoder, keys)
            if kept is not None and kept.plane is not None:
                return Outcome("stale", kept.keys, kept.plane)
            if self._working == gallery.name:
                return Outcome("working")
            return Outcome("waiting" if begin else "none")

    def _begin(self, gallery: Gallery, encoder: Identity | None, keys: I64) -> None:
        self._working = gallery.name
        self._thread = threading.Thread(target=self._work, args=(gallery, encoder, keys), name="umap")
        self._thread.start()

    def _work(self, gallery: Gallery, encoder: Identity | None, keys: I64) -> None:
        plane, error, began = None, None, time.monotonic()
        try:
            # Copied for this alone: the vectors of the maps that are kept would take more memory than they.
            there, vectors = gallery.snapshot()
            rows = np.searchsorted(there, keys).clip(max=max(len(there) - 1, 0))
            known = there[rows] == keys if len(there) else np.zeros(len(keys), bool)
            keys, vectors = keys[known], vectors[rows[known]]
            plane = self._made(vectors)
        except PatchsightError as failure:
            error = failure.message
        except Exception:
            logger.exception("the map of gallery %r by UMAP failed", gallery.name)
            error = "it ended with an error that the server's log has"
        with self._lock:
            self._working = None
            if self._closed:
                return
            self._kept[gallery.name] = _Kept(weakref.ref(gallery), encoder, keys, plane, error, time.monotonic())
            self._kept.move_to_end(gallery.name)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        if plane is not None:
            logger.info(
                "gallery %r has a map of %d images by UMAP, after %.0f s",
                gallery.name,
                len(keys),
                time.monotonic() - began,
            )

    def _made(self, vectors: F32) -> F32:
        """By the process. Raises PatchsightError if it dies."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        half = str(max(1, cores // 2))  # the others are for requests
        environment = {**os.environ, "OMP_NUM_THREADS": half, "NUMBA_NUM_THREADS": half}
        with tempfile.TemporaryFile() as said:
            with self._lock:
                if self._closed:
                    raise PatchsightError("the server is leaving")
                self._process = process = subprocess.Popen(
                    COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, env=environment,
                    start_new_session=True,  # Ctrl+C in a terminal is for the server, who ends it
                )  # fmt: skip
            assert process.stdin is not None
            assert process.stdout is not None
            with process:
                with suppress(BrokenPipeError):  # it died: its status says so
                    _send(process.stdin, vectors)
                result = process.stdout.read()
                status = process.wait()
                with suppress(BrokenPipeError):
                    process.stdin.close()
            if status:
                said.seek(0)
                logger.error("UMAP's process: status %d\n%s", status, said.read()[-4000:].decode(errors="replace"))
                raise PatchsightError(f"its process ended with status {status}; the server's log may say why")
        plane: F32 = np.load(BytesIO(result))
        return plane

    def close(self) -> None:
        """End what is in work."""
        with self._lock:
            self._closed = True
            if self._process is not None:
                self._process.kill()
        if self._thread is not None:
            self._thread.join()


def _send(file: IO[bytes], vectors: F32) -> None:
    """As the process reads it; the pipe stays open, for its end would be the process's."""
    packed = BytesIO()
    np.save(packed, np.ascontiguousarray(vectors))
    file.write(len(packed.getbuffer()).to_bytes(8, "little"))
    file.write(packed.getbuffer())
    file.flush()
