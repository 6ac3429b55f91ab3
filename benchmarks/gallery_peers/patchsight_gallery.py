"""Our gallery, in process, as a server has it. The one place that knows how it is opened and filled."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from gallery_peers.contender import F32, I64, TIERS, InProcess, K, Search

from patchsight_serve.embedded_gallery import EmbeddedGallery
from patchsight_serve.filters import Filter
from patchsight_serve.index import EXACT_LIMIT
from patchsight_serve.item import Identity, Item, NewVector

ENCODER = Identity("benchmark", "0" * 64)


class Patchsight(InProcess):
    """It finds out for itself how much a search has to do."""

    kept = "each batch, fsynced"
    efforts = (0,)
    filters = ("label", "filter")
    exact = False

    def __init__(self, folder: Path, count: int) -> None:
        limit = count * 2 if self.exact else min(EXACT_LIMIT, count // 5)  # a trial with few vectors is approximate too
        self._gallery = EmbeddedGallery(folder / "gallery", exact_limit=limit)

    def version(self) -> str:
        return f"patchsight {version('patchsight')}, faiss {version('faiss-cpu')}"

    def add(self, keys: I64, vectors: F32, tiers: I64) -> None:
        batch = [
            NewVector(Item(str(key), str(tier), {"tier": tier}), None, vector)
            for key, vector, tier in zip(keys.tolist(), vectors, tiers.tolist(), strict=True)
        ]
        self._gallery.add_vectors(lambda: [batch], ENCODER)

    def finish(self) -> None:
        self.settle()

    def settle(self) -> None:
        while self._gallery.index.building:
            time.sleep(0.05)

    @contextmanager
    def client(self, effort: int, tier: int | None, by: str) -> Iterator[Search]:  # noqa: ARG002
        if tier is None:
            yield lambda query: self._keys(query)
        elif by == "label":
            labels = [str(number) for number in range(TIERS + 1) if number <= tier]
            yield lambda query: self._keys(query, label=labels)
        else:
            condition = Filter.of({"tier": {"lte": tier}})
            yield lambda query: self._keys(query, filter=condition)

    def _keys(self, query: F32, **only: object) -> list[int]:
        return [int(found.id) for found in self._gallery.neighbors(query, K, **only)]  # type: ignore[arg-type]

    def close(self) -> None:
        self._gallery.close()


class PatchsightExact(Patchsight):
    """The same files, compared with every vector."""

    exact = True
