# mypy: disable-error-code="import-not-found"
"""pgvector in a real PostgreSQL, which `pgserver` brings: durable as PostgreSQL is, fsync included."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pgserver
import psycopg
from gallery_peers.contender import CANDIDATES, DIM, F32, I64, LINKS, WIDTHS, InProcess, K, Search
from pgvector.psycopg import register_vector

MEMORY_MB = 4096  # for the buffers, and as much while the index is built


class Pgvector(InProcess):
    kept = "each batch, fsynced"
    efforts = WIDTHS

    def __init__(self, folder: Path, count: int) -> None:
        new = not (folder / "postgres").exists()
        (folder / "postgres").mkdir(parents=True, exist_ok=True)
        memory = min(MEMORY_MB, max(128, 6 * count * DIM * 4 // 2**20))
        self._server = pgserver.get_server(folder / "postgres", cleanup_mode="stop")
        if new:
            with self._connection(plain=True) as connection:
                connection.execute(f"ALTER SYSTEM SET shared_buffers = '{memory}MB'")
                connection.execute(f"ALTER SYSTEM SET maintenance_work_mem = '{memory}MB'")
                connection.execute(f"ALTER SYSTEM SET max_parallel_maintenance_workers = {(os.cpu_count() or 1) - 1}")
                connection.execute("CREATE EXTENSION vector")
                connection.execute(f"CREATE TABLE vectors (id bigint, tier int, vector vector({DIM}))")
            self._server.cleanup()
            self._server = pgserver.get_server(folder / "postgres", cleanup_mode="stop")
        self._writer = self._connection()

    def _connection(self, plain: bool = False) -> Any:
        connection = psycopg.connect(self._server.get_uri(), autocommit=True)
        if not plain:
            register_vector(connection)
        return connection

    def version(self) -> str:
        server = self._writer.execute("SHOW server_version").fetchone()[0]
        extension = self._writer.execute("SELECT extversion FROM pg_extension WHERE extname = 'vector'").fetchone()[0]
        return f"PostgreSQL {server}, pgvector {extension}"

    def add(self, keys: I64, vectors: F32, tiers: I64) -> None:
        line = "COPY vectors (id, tier, vector) FROM STDIN WITH (FORMAT BINARY)"
        with self._writer.cursor().copy(line) as copy:
            copy.set_types(["int8", "int4", "vector"])
            for row in zip(keys.tolist(), tiers.tolist(), vectors, strict=True):
                copy.write_row(row)

    def finish(self) -> None:
        graph = f"m = {LINKS}, ef_construction = {CANDIDATES}"
        self._writer.execute(f"CREATE INDEX ON vectors USING hnsw (vector vector_ip_ops) WITH ({graph})")
        self._writer.execute("CREATE INDEX ON vectors (tier)")
        self._writer.execute("VACUUM ANALYZE vectors")
        self._writer.execute("CHECKPOINT")

    @contextmanager
    def client(self, effort: int, tier: int | None, by: str) -> Iterator[Search]:  # noqa: ARG002
        only = "" if tier is None else f"WHERE tier <= {tier} "
        line = f"SELECT id FROM vectors {only}ORDER BY vector <#> %s LIMIT {K}"
        with self._connection() as connection:
            connection.execute(f"SET hnsw.ef_search = {effort}")

            def search(query: F32) -> list[int]:
                found = connection.execute(line, (query,), prepare=True, binary=True).fetchall()
                return [key for (key,) in found]

            yield search

    def pids(self) -> list[int]:
        return [os.getpid(), self._server.get_pid()]

    def close(self) -> None:
        self._writer.close()
        self._server.cleanup()
