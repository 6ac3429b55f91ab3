"""UMAP (McInnes et al., arXiv:1802.03426) in a process of its own, as numba compiles for many seconds and takes its
memory: `python -m patchsight_serve.umap_child` reads vectors from stdin and writes positions to stdout, both as .npy.

It ends when its stdin does, with the server that holds the other end.
"""

import io
import os
import signal
import sys
import threading
import warnings
from typing import BinaryIO

import faiss
import numpy as np

from patchsight_serve.kmeans import in_order
from patchsight_serve.nearest import F32
from patchsight_serve.principal import principal, scaled

NEIGHBORS = 15  # that a vector has on the map, itself counted in, as is umap-learn's default
LEAST = NEIGHBORS + 1  # vectors
LONGEST_S = 3600
SEED = 0


def umap(vectors: F32) -> F32:
    """Unit rows `(N, D)`, LEAST of them or more, on a plane: float32 `(N, 2)` from 0 to 1. The answer depends on the
    set of vectors alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what we leave out on purpose
        from umap import UMAP

        order = in_order(vectors)
        ordered = vectors[order]
        # Exact, and without the compiling that umap-learn's own approximate search needs.
        cosines, found = faiss.knn(ordered, ordered, NEIGHBORS, metric=faiss.METRIC_INNER_PRODUCT)
        engine = UMAP(
            n_neighbors=NEIGHBORS,
            metric="cosine",
            # From the principal components on, so that what is far apart stays so (Kobak and Linderman, 2021), and a
            # map by the one turns into that by the other with little movement.
            init=scaled(principal(ordered)),
            random_state=SEED,
            precomputed_knn=(found, np.maximum(1 - cosines, 0)),
            disconnection_distance=np.inf,  # else a vector at right angles to all others has no place
        )
        plane = np.empty((len(vectors), 2), np.float32)
        plane[order] = engine.fit_transform(ordered)
    return scaled(plane)


def main() -> None:
    """Be kind to the server beside it, and do one map."""
    if hasattr(os, "nice"):
        os.nice(19)
    if hasattr(signal, "alarm"):
        signal.alarm(LONGEST_S)
    vectors = np.load(io.BytesIO(_received(sys.stdin.buffer)))
    threading.Thread(target=_leave_with_parent, daemon=True, name="parent").start()
    # What libraries print must not come between.
    out = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    packed = io.BytesIO()  # numpy does not write to a pipe
    np.save(packed, umap(vectors))
    with out:
        out.write(packed.getbuffer())


def _received(file: BinaryIO) -> bytes:
    """Eight bytes that say how many follow, and these."""
    return file.read(int.from_bytes(file.read(8), "little"))


def _leave_with_parent() -> None:
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)


if __name__ == "__main__":
    main()
