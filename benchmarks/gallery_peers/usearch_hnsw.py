# mypy: disable-error-code="import-not-found"
"""usearch: a graph (HNSW) of whole vectors in memory. Its Python binding has no filters."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from gallery_peers.contender import CANDIDATES, DIM, F32, I64, LINKS, WIDTHS, InProcess, K, Search
from usearch.index import Index


class Usearch(InProcess):
    kept = "nothing: it is written when it is full"
    efforts = WIDTHS
    filters = ()

    def __init__(self, folder: Path, count: int) -> None:  # noqa: ARG002
        self._file = folder / "index.usearch"
        self._index = Index(ndim=DIM, metric="ip", dtype="f32", connectivity=LINKS, expansion_add=CANDIDATES)
        if self._file.exists():
            self._index.load(str(self._file))

    def version(self) -> str:
        return f"usearch {version('usearch')}"

    def add(self, keys: I64, vectors: F32, tiers: I64) -> None:  # noqa: ARG002
        self._index.add(keys, vectors)

    def finish(self) -> None:
        self._index.save(str(self._file))

    @contextmanager
    def client(self, effort: int, tier: int | None, by: str) -> Iterator[Search]:  # noqa: ARG002
        self._index.expansion_search = effort  # of all threads, which ask alike
        yield lambda query: self._index.search(query, K, threads=1).keys

    def close(self) -> None:
        self._index.reset()
