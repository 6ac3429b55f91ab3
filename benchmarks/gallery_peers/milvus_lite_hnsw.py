# mypy: disable-error-code="import-not-found,import-untyped"
"""milvus-lite, by pymilvus, as its users have it: a server in a thread of the process, asked over gRPC."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from gallery_peers.contender import CANDIDATES, DIM, F32, I64, LINKS, WIDTHS, InProcess, K, Search
from milvus_lite.server_manager import server_manager_instance
from pymilvus import DataType, MilvusClient

NAME = "vectors"


class MilvusLite(InProcess):
    kept = "each batch in its log, which is not fsynced"
    efforts = WIDTHS

    def __init__(self, folder: Path, count: int) -> None:  # noqa: ARG002
        self._place = str(folder / "milvus.db")
        self._client = MilvusClient(self._place)
        if self._client.has_collection(NAME):
            self._client.load_collection(NAME)  # without it a query takes seconds
            return
        schema = self._client.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("id", DataType.INT64, is_primary=True)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=DIM)
        schema.add_field("tier", DataType.INT64)
        index = self._client.prepare_index_params()
        graph = {"M": LINKS, "efConstruction": CANDIDATES}
        index.add_index("vector", index_type="HNSW", metric_type="IP", params=graph)
        self._client.create_collection(NAME, schema=schema, index_params=index)

    def version(self) -> str:
        return f"milvus-lite {version('milvus-lite')}, pymilvus {version('pymilvus')}"

    def add(self, keys: I64, vectors: F32, tiers: I64) -> None:
        rows = zip(keys.tolist(), vectors, tiers.tolist(), strict=True)
        self._client.insert(NAME, [{"id": key, "vector": vector, "tier": tier} for key, vector, tier in rows])

    def finish(self) -> None:
        self._client.flush(NAME)
        self.close()  # the graphs are built in the background, and nothing tells when but the server's end

    @contextmanager
    def client(self, effort: int, tier: int | None, by: str) -> Iterator[Search]:  # noqa: ARG002
        only = "" if tier is None else f"tier <= {tier}"
        params = {"params": {"ef": effort}}

        def search(query: F32) -> list[int]:
            found = self._client.search(NAME, [query], filter=only, limit=K, search_params=params)
            return [hit["id"] for hit in found[0]]

        yield search

    def close(self) -> None:
        self._client.close()
        server_manager_instance.release_server(self._place)
