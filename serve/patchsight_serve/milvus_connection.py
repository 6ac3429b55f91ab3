"""A connection to Milvus, a server or a file of milvus-lite: the few calls that galleries make, each with an end in
time, and Milvus' errors in our words."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import grpc
from pymilvus import MilvusClient, MilvusException

from patchsight_serve.errors import NotReady, PatchsightError

log = logging.getLogger(__name__)

TIMEOUT_S = 10.0  # of one call, pymilvus' own retries counted in
NOT_FOUND = (100, 1600)  # Milvus' codes: no such collection, no such alias
REFUSED = (6, 1100)  # an argument that is no good: a mistake of ours, or another version
SCANNED = 4000  # rows at once

Fields = Mapping[str, Any]


class Gone(Exception):
    """There is no such collection, or alias."""


class MilvusConnection:
    """Every method may be called from any thread. Raises NotReady where Milvus does not answer, or not in time."""

    def __init__(self, uri: str, token: str = "") -> None:
        """uri: `http://HOST:PORT`, `https://…`, or the path of a file. Raises PatchsightError where there is none."""
        self._uri = uri
        # It logs each error with a stack, before it raises it.
        logging.getLogger("pymilvus").setLevel(logging.CRITICAL)
        try:
            self.client = MilvusClient(uri, token=token, timeout=TIMEOUT_S)
        except (MilvusException, grpc.RpcError) as error:
            why = "" if uri.startswith("http") else "; is it open in another process?"
            raise PatchsightError(f"no Milvus at {uri}: {_said(error)}{why}") from None

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Errors of the block in our words. Raises Gone too."""
        try:
            yield
        except MilvusException as error:
            if error.code in NOT_FOUND:
                raise Gone from None
            if error.code in REFUSED:
                raise PatchsightError(f"Milvus at {self._uri} refused: {_said(error)}") from error
            raise NotReady(f"Milvus at {self._uri} does not answer as it should: {_said(error)}") from error
        except grpc.RpcError as error:
            raise NotReady(f"Milvus at {self._uri} does not answer: {_said(error)}") from error

    def aliased(self, alias: str) -> str | None:
        """The collection behind an alias."""
        try:
            with self.explained():
                return str(self.client.describe_alias(alias, timeout=TIMEOUT_S)["collection_name"])
        except Gone:
            return None

    def aliases(self) -> list[str]:
        """All that there are."""
        with self.explained():
            return list(self.client.list_aliases("", timeout=TIMEOUT_S)["aliases"])

    def bind(self, alias: str, collection: str) -> bool:
        """Point an alias that is not there at a collection: of several who do so at once, one is told that it did."""
        try:
            with self.explained():
                self.client.create_alias(collection, alias, timeout=TIMEOUT_S)
        except (NotReady, PatchsightError):
            return self.aliased(alias) == collection
        return True

    def drop(self, alias: str | None, collection: str) -> None:
        """Remove both, the alias first. What is gone already is as good."""
        for call, name in ((self.client.drop_alias, alias), (self.client.drop_collection, collection)):
            try:
                with self.explained():
                    if name is not None:
                        call(name, timeout=TIMEOUT_S)
            except Gone:
                pass

    def load(self, collection: str) -> None:
        """Have it ready to be asked; milvus-lite has nothing loaded when it starts."""
        with self.explained():
            self.client.load_collection(collection, timeout=TIMEOUT_S)

    def quicken(self, collection: str, field: str) -> None:
        """Have values of a field found by an index, where Milvus has one for it: milvus-lite has none of arrays."""
        indexes = self.client.prepare_index_params()
        indexes.add_index(field, index_type="INVERTED")
        try:
            with self.explained():
                self.client.create_index(collection, indexes, timeout=TIMEOUT_S, sync=False)
        except NotReady:
            raise
        except PatchsightError as error:
            log.info("collection %s: no index of %s: %s", collection, field, error)

    def count(self, collection: str) -> int:
        """Rows in a collection."""
        with self.explained():
            found = self.client.query(collection, "", ["count(*)"], timeout=TIMEOUT_S, consistency_level="Strong")
            return int(found[0]["count(*)"])

    def query(self, collection: str, filter: str, fields: Sequence[str]) -> list[Fields]:
        """All rows for which the filter holds, which must be few."""
        with self.explained():
            return list(
                self.client.query(collection, filter, list(fields), timeout=TIMEOUT_S, consistency_level="Strong")
            )

    def scan(
        self, collection: str, filter: str, fields: Sequence[str], limit: int = -1, chunk: int = SCANNED
    ) -> Iterator[list[Fields]]:
        """Rows in the order of their primary keys, in chunks; at most `limit` of them."""
        with self.explained():
            rows = self.client.query_iterator(
                collection, chunk, limit, filter, list(fields), timeout=TIMEOUT_S, consistency_level="Strong"
            )
        try:
            while True:
                with self.explained():
                    found = list(rows.next())
                if not found:
                    return
                yield found
        finally:
            rows.close()

    def search(self, collection: str, vector: list[float], k: int, filter: str, fields: Sequence[str]) -> list[Fields]:
        """The `k` rows of the greatest inner products, as Milvus computes them: `distance`, and the fields in
        `entity`."""
        with self.explained():
            (found,) = self.client.search(
                collection, [vector], filter, k, list(fields), timeout=TIMEOUT_S, consistency_level="Strong"
            )
            return list(found)

    def upsert(self, collection: str, rows: list[dict[str, Any]]) -> None:
        """Put rows in the place of those of their primary keys; each as a whole."""
        with self.explained():
            self.client.upsert(collection, rows, timeout=TIMEOUT_S)

    def delete(self, collection: str, filter: str) -> None:
        """Remove all rows for which the filter holds."""
        with self.explained():
            self.client.delete(collection, filter=filter, timeout=TIMEOUT_S)

    def close(self) -> None:
        """Let go of the connection; the file of milvus-lite is closed with the process."""
        self.client.close()


def _said(error: Exception) -> str:
    said = getattr(error, "message", "") or str(error)
    return str(said).splitlines()[0][:300] if said else type(error).__name__
