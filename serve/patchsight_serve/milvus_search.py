"""Exact neighbors from Milvus: it proposes, float64 decides, as with FAISS."""

from typing import Any

import numpy as np

from patchsight_serve.milvus_binding import Binding
from patchsight_serve.milvus_connection import Fields
from patchsight_serve.nearest import F32, I64, nearest

MOST = 16_384  # rows that Milvus gives for one search
FIELDS = ("id", "label", "metadata", "vector")


class _Proposals:
    """What a search of Milvus gives, as an index that `nearest` can ask: a key is a row's place in the last answer."""

    def __init__(self, binding: Binding, filter: str, dim: int) -> None:
        self._binding, self._filter = binding, filter
        self.ntotal, self.d = MOST, dim
        self.rows: list[Fields] = []
        self._vectors: F32 = np.empty((0, dim), np.float32)

    def search(self, queries: F32, k: int, params: None = None) -> tuple[F32, I64]:  # noqa: ARG002 - FAISS's signature
        found = self._binding.search(queries[0].tolist(), k, self._filter, FIELDS)
        self.rows = [row["entity"] for row in found]
        self._vectors = np.array([row["vector"] for row in self.rows], np.float32).reshape(len(found), self.d)
        scores, keys = np.full((1, k), -np.inf, np.float32), np.full((1, k), -1, np.int64)
        scores[0, : len(found)] = [row["distance"] for row in found]
        keys[0, : len(found)] = np.arange(len(found))
        return scores, keys

    def reconstruct_batch(self, keys: I64) -> F32:
        vectors: F32 = self._vectors[keys]
        return vectors


def search(binding: Binding, query: F32, k: int, filter: str) -> list[tuple[float, dict[str, Any]]]:
    """Scores and rows of the best `k` for a unit query `(D,)`, best first, equal ones by id; where more than `MOST` are
    equal at the end, those of them that Milvus chose. filter: an expression."""
    proposals = _Proposals(binding, filter, len(query))
    ((keys, scores),) = nearest(proposals, query[None], k)
    found = [(float(score), dict(proposals.rows[key])) for key, score in zip(keys.tolist(), scores, strict=True)]
    return sorted(found, key=lambda pair: (-pair[0], pair[1]["id"]))[:k]
