"""What is known of galleries on Milvus beside their images: short texts by name, in a collection of their own."""

import time

from pymilvus import DataType

from patchsight_serve.errors import PatchsightError
from patchsight_serve.milvus_collection import MAX_TEXT, create_collection
from patchsight_serve.milvus_connection import TIMEOUT_S, MilvusConnection


class MilvusFacts:
    """Of all galleries of a prefix. Names are letters, digits and `_/`. Every method may be called from any thread."""

    def __init__(self, connection: MilvusConnection, prefix: str) -> None:
        """Makes the collection where it is not there. Raises NotReady."""
        self._connection = connection
        self._collection = f"{prefix}__facts__"  # no gallery's: those end with random digits
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            try:
                return self._make()
            except PatchsightError:  # another gateway is making it: until it has, neither finding nor making works
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    def _make(self) -> None:
        client = self._connection.client
        with self._connection.explained():
            there = client.has_collection(self._collection, timeout=TIMEOUT_S)
        if there:
            self._connection.load(self._collection)
            return
        schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("name", DataType.VARCHAR, is_primary=True, max_length=512)
        schema.add_field("value", DataType.VARCHAR, max_length=MAX_TEXT)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=2)  # Milvus wants one
        create_collection(self._connection, self._collection, schema)

    def get(self, name: str) -> str | None:
        """As it was set last, by any gateway."""
        found = self._connection.query(self._collection, f'name in ["{name}"]', ["value"])
        return str(found[0]["value"]) if found else None

    def set(self, name: str, value: str) -> None:
        """Durably once this returns."""
        self._connection.upsert(self._collection, [{"name": name, "value": value, "vector": [0.0, 0.0]}])

    def forget(self, *names: str) -> None:
        """Those of them that there are."""
        for name in names:
            self._connection.delete(self._collection, f'name in ["{name}"]')

    def below(self, start: str) -> list[str]:
        """All names that begin so."""
        rows = self._connection.query(self._collection, f'name like "{start}%"', ["name"])
        return [str(row["name"]) for row in rows if str(row["name"]).startswith(start)]
