"""A gallery's name and the collection of Milvus that is behind it: bound to one encoder by whoever comes first."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from typing import Any, NamedTuple

import orjson

from patchsight_serve.errors import PatchsightError, Superseded
from patchsight_serve.item import Identity
from patchsight_serve.milvus_collection import alias_of, make_collection
from patchsight_serve.milvus_connection import SCANNED, Fields, Gone, MilvusConnection
from patchsight_serve.milvus_facts import MilvusFacts

SOME = 500  # values in one expression


class Bound(NamedTuple):
    """What never changes of a collection."""

    collection: str
    encoder: Identity
    dim: int


class Binding:
    """Every method may be called from any thread. Once the collection is gone, all of them raise `ended`."""

    def __init__(self, connection: MilvusConnection, facts: MilvusFacts, prefix: str, name: str) -> None:
        self.ended: PatchsightError | None = None
        self._connection, self._facts, self._name = connection, facts, name
        self._alias = alias_of(prefix, name)
        self._bound: Bound | None = None

    def bound(self) -> Bound | None:
        """None as long as no image was ever added, by any gateway."""
        if self.ended is not None:
            raise copy(self.ended)
        if self._bound is None and (collection := self._connection.aliased(self._alias)) is not None:
            self._bound = self._told(collection)
        return self._bound

    def _told(self, collection: str) -> Bound | None:
        text = self._facts.get(collection)
        if text is None:  # it was removed in between
            return None
        try:
            self._connection.load(collection)
        except Gone:
            return None
        said = orjson.loads(text)
        return Bound(collection, Identity(said["name"], said["sha256"]), said["dim"])

    def bind(self, encoder: Identity, dim: int) -> Bound:
        """To this encoder, or to the one that another gateway has bound it to meanwhile."""
        while (bound := self.bound()) is None:
            collection = make_collection(self._connection, self._alias, dim)
            self._facts.set(collection, orjson.dumps({**encoder._asdict(), "dim": dim}).decode())
            if not self._connection.bind(self._alias, collection):
                self._connection.drop(None, collection)
                self._facts.forget(collection)
        return bound

    @contextmanager
    def _there(self) -> Iterator[None]:
        try:
            yield
        except Gone:
            gone = Superseded(f"gallery {self._name!r} was removed meanwhile; ask again", param="gallery")
            self.ended = self.ended or gone
            raise copy(self.ended) from None

    def count(self) -> int:
        """Images in it."""
        bound = self.bound()
        with self._there():
            return self._connection.count(bound.collection) if bound else 0

    def find(self, column: str, values: Sequence[Any], fields: Sequence[str]) -> list[Fields]:
        """The rows that have one of these values there: strings of letters, digits and `.-_`, or integers."""
        bound = self.bound()
        found: list[Fields] = []
        if bound is None:
            return found
        for start in range(0, len(values), SOME):
            some = orjson.dumps(list(values[start : start + SOME])).decode()
            with self._there():
                found += self._connection.query(bound.collection, f"{column} in {some}", fields)
        return found

    def scan(self, filter: str, fields: Sequence[str], limit: int = -1, chunk: int = SCANNED) -> Iterator[list[Fields]]:
        """Rows in the order of their ids, in chunks; at most `limit` of them."""
        bound = self.bound()
        with self._there():
            if bound:
                yield from self._connection.scan(bound.collection, filter, fields, limit, chunk)

    def search(self, vector: list[float], k: int, filter: str, fields: Sequence[str]) -> list[Fields]:
        """As `MilvusConnection.search`."""
        bound = self.bound()
        with self._there():
            return self._connection.search(bound.collection, vector, k, filter, fields) if bound else []

    def upsert(self, rows: list[dict[str, Any]]) -> None:
        """Into the collection, which must be bound; each row as a whole, and durably."""
        bound = self.bound()
        with self._there():
            if rows and bound:
                self._connection.upsert(bound.collection, rows)

    def delete(self, id: str) -> None:
        """Remove a row."""
        bound = self.bound()
        with self._there():
            if bound:
                self._connection.delete(bound.collection, f'id in ["{id}"]')

    def remove(self, keep: Sequence[str] = ()) -> None:
        """The whole gallery, for every gateway. keep: facts that stay."""
        collection = self._connection.aliased(self._alias)
        if collection is not None:
            self._connection.drop(self._alias, collection)
            self._facts.forget(collection)
        kept = {f"{self._alias}/{name}" for name in keep}
        self._facts.forget(*[name for name in self._facts.below(f"{self._alias}/") if name not in kept])

    def fact(self, name: str) -> str | None:
        """As it was set, by any gateway."""
        if self.ended is not None:
            raise copy(self.ended)
        return self._facts.get(f"{self._alias}/{name}")

    def set_facts(self, facts: Mapping[str, str]) -> None:
        """Durably."""
        if self.ended is not None:
            raise copy(self.ended)
        for name, value in facts.items():
            self._facts.set(f"{self._alias}/{name}", value)
