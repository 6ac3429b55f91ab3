# mypy: disable-error-code="call-arg,arg-type"
"""FAISS alone, in memory, one thread per query: vectors, keys and what chooses among them, nothing durable."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from gallery_peers.contender import BATCH, DIM, F32, I64, InProcess, K, Search

PER_CENTER, ITERATIONS = 64, 10  # of k-means over the lists' centers
PROPOSED = 14.0  # times K, of 100,000 vectors: what codes propose to be compared exactly
PROBES = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)


class BareFaiss(InProcess):
    """factory: FAISS's description of an index. Keys are the rows in the order in which they were added."""

    kept = "nothing: it is written when it is full"
    filters = ("a bitmap made before",)
    writes = False  # FAISS: no search while something is added
    factory = "Flat"
    efforts: tuple[int, ...] = (0,)

    def __init__(self, folder: Path, count: int) -> None:
        self._file, self._tiers_file = folder / "index.faiss", folder / "tiers.npy"
        lists = int(4 * count**0.5)
        if self._file.exists():
            self._index: Any = faiss.read_index(str(self._file))
            self._tiers = np.load(self._tiers_file)
        else:
            self._index = faiss.index_factory(DIM, self.factory.format(lists), faiss.METRIC_INNER_PRODUCT)
            self._vectors, self._tiers = np.empty((count, DIM), np.float32), np.empty(count, np.int8)
        # By trial: 30 times K of a million. With 14 no effort finds 0.98 of the nearest there.
        self._proposed = PROPOSED * max(count / 100_000, 1.0) ** (1 / 3)
        self._count = 0

    def version(self) -> str:
        return f"faiss {faiss.__version__}"

    def add(self, keys: I64, vectors: F32, tiers: I64) -> None:
        place = slice(self._count, self._count + len(keys))
        self._vectors[place], self._tiers[place] = vectors, tiers
        self._count += len(keys)

    def finish(self) -> None:
        if not self._index.is_trained:
            inverted = faiss.extract_index_ivf(self._index)
            inverted.cp.max_points_per_centroid, inverted.cp.niter = PER_CENTER, ITERATIONS
            self._index.train(self._vectors)
        for start in range(0, self._count, 64 * BATCH):
            self._index.add(self._vectors[start : min(start + 64 * BATCH, self._count)])
        faiss.write_index(self._index, str(self._file))
        np.save(self._tiers_file, self._tiers)

    @contextmanager
    def client(self, effort: int, tier: int | None, by: str) -> Iterator[Search]:  # noqa: ARG002
        faiss.omp_set_num_threads(1)  # of this thread
        selector = None
        if tier is not None:
            selector = faiss.IDSelectorBitmap(np.packbits(self._tiers <= tier, bitorder="little"))
        params = self._params(effort, selector)
        yield lambda query: self._index.search(query[None], K, params=params)[1][0]

    def _params(self, effort: int, selector: Any) -> Any:  # noqa: ARG002
        return faiss.SearchParameters(sel=selector)

    def close(self) -> None:
        self._index = None


class FaissLists(BareFaiss):
    """Inverted lists of whole vectors."""

    factory = "IVF{},Flat"
    efforts = PROBES

    def _params(self, effort: int, selector: Any) -> Any:
        return faiss.SearchParametersIVF(sel=selector, nprobe=effort)


class FaissCodes(FaissLists):
    """Inverted lists of codes of 4 bits for every two numbers; what they propose is compared exactly."""

    factory = f"IVF{{}},PQ{DIM // 2}x4fs,RFlat"

    def _params(self, effort: int, selector: Any) -> Any:
        base = super()._params(effort, selector)
        return faiss.IndexRefineSearchParameters(k_factor=self._proposed, base_index_params=base)
