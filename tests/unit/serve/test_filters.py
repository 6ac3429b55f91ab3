"""Filters over metadata: SQLite and Milvus find what a plain reading in Python finds, whatever keys and values there
are."""

import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patchsight_serve.errors import InvalidRequest
from patchsight_serve.filters import Filter
from patchsight_serve.item import Identity, Item, NewImage

MISSING = object()


def escaped(steps: list[str]) -> str:
    return ".".join(step.replace("\\", "\\\\").replace(".", "\\.") for step in steps)


def at(metadata: Any, steps: list[str]) -> Any:
    for step in steps:
        if not isinstance(metadata, dict) or step not in metadata:
            return MISSING
        metadata = metadata[step]
    return metadata


def kind(value: Any) -> str:
    names = {bool: "boolean", int: "number", float: "number", str: "text", type(None): "null"}
    return names.get(type(value), "other")


def number(value: Any) -> Any:
    """SQLite has integers of 64 bits with a sign; greater ones are floating point."""
    return float(value) if type(value) is int and value >= 2**63 else value


def equal(there: Any, value: Any) -> bool:
    return kind(there) == kind(value) and number(there) == number(value)


def holds(metadata: Any, steps: list[str], operator: str, value: Any) -> bool:
    """The oracle."""
    there = at(metadata, steps)
    if operator == "exists":
        return (there is not MISSING) == value
    if operator in ("eq", "ne"):
        return equal(there, value) == (operator == "eq")
    if operator == "in":
        return any(equal(there, one) for one in value)
    if kind(there) != kind(value):
        return False
    a, b = number(there), number(value)
    return {"gt": a > b, "gte": a >= b, "lt": a < b, "lte": a <= b}[operator]


# Few of each, so that they meet; the keys are what SQL, JSON and SQLite's paths may stumble over.
KEYS = [
    "a",
    "b",
    "a.b",
    ".",
    "",
    '"',
    'q"x',
    "back\\slash",
    "\\",
    "'",
    "')",
    "ü",
    "日本",
    "\U0001f600",
    "new\nline",
    "\x7f",
]
KEYS += ["0", "[0]", "$", "$.a", "?", "%", "a b", "A", "\u2028", "e\u0301", "é"]
keys = st.sampled_from(KEYS)
numbers = st.sampled_from(
    [0, 1, -1, 2, 10, 1.0, 0.5, -0.0, 2.5, 0.3, 0.1 + 0.2, 1e300, -1e-300, 2**53, 2**53 + 1, float(2**53)]
    + [2**63 - 1, -(2**63), 2**63, 2**64 - 1, float(2**63)]
)
TEXTS = ["", "a", "b", "A", "ab", "1", "true", "null", "x100", "ü", "z", "\U0001f600", "\uffff", '"', "'", "\\", "\n"]
texts = st.sampled_from(TEXTS)
scalars = st.one_of(st.none(), st.booleans(), numbers, texts)
documents = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(keys, inner, max_size=3), max_leaves=6
)
metadatas = st.dictionaries(keys, documents, max_size=4)
paths = st.lists(keys, min_size=1, max_size=3)
conditions = st.one_of(
    st.tuples(st.sampled_from(["eq", "ne"]), scalars),
    st.tuples(st.sampled_from(["gt", "gte", "lt", "lte"]), st.one_of(numbers, texts)),
    st.tuples(st.just("in"), st.lists(scalars, max_size=4)),
    st.tuples(st.just("exists"), st.booleans()),
)


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[Any], list[str], tuple[str, Any]]:
    """Rows, a path that leads somewhere in one of them, more often than not, and a condition on what is there."""
    rows = draw(st.lists(metadatas, min_size=1, max_size=6))
    steps: list[str] = []
    inside: Any = draw(st.sampled_from(rows))
    while isinstance(inside, dict) and inside and len(steps) < 3 and draw(st.integers(0, 9)):
        steps.append(draw(st.sampled_from(sorted(inside))))
        inside = inside[steps[-1]]
    operator, value = draw(conditions)
    if operator in ("eq", "ne") and kind(inside) != "other" and draw(st.booleans()):
        value = inside
    return rows, steps or draw(paths), (operator, value)


def select_by_sqlite(rows: list[Any], filter: Filter) -> set[int]:
    """Numbers of the rows that SQLite finds."""
    base = sqlite3.connect(":memory:")
    base.execute("CREATE TABLE images (key INTEGER PRIMARY KEY, label TEXT, metadata TEXT NOT NULL)")
    texts = [row if isinstance(row, bytes) else orjson.dumps(row, option=orjson.OPT_SORT_KEYS).decode() for row in rows]
    base.executemany("INSERT INTO images VALUES (?, 'a', ?)", enumerate(texts))
    found = base.execute(f"SELECT key FROM images WHERE {filter.where}", filter.values).fetchall()
    base.close()
    return {key for (key,) in found}


Select = Callable[[list[Any], Filter], set[int]]


@pytest.fixture(scope="module")
def select_by_milvus(milvus_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Select]:
    """Numbers of the rows that a gallery on Milvus finds."""
    from patchsight_serve.milvus_galleries import MilvusGalleries

    galleries = MilvusGalleries(str(milvus_file), "filters", "", tmp_path_factory.mktemp("scratch"))
    gallery, vector = galleries.get("filters", create=True), np.array([1, 0], np.float32)

    def select(rows: list[Any], filter: Filter) -> set[int]:
        images = [NewImage(Item(f"r{i}", "a", row), b"", b"", vector) for i, row in enumerate(rows)]
        gallery.add(images, Identity("vit", "a" * 64), replace=True)
        found = {int(neighbor.id[1:]) for neighbor in gallery.neighbors(vector, 1000, filter=filter)}
        return found & set(range(len(rows)))  # others were there before

    yield select
    galleries.close()


@pytest.fixture(params=["sqlite", "milvus"])
def select(request: pytest.FixtureRequest) -> Select:
    """Numbers of the rows that are found."""
    return select_by_sqlite if request.param == "sqlite" else request.getfixturevalue("select_by_milvus")


@settings(max_examples=400, deadline=None)
@given(cases())
def test_sqlite_finds_what_python_finds(case: tuple[list[Any], list[str], tuple[str, Any]]) -> None:
    check(select_by_sqlite, *case)


@settings(max_examples=100, deadline=None)
@given(case=cases())
def test_milvus_finds_what_python_finds(
    select_by_milvus: Select, case: tuple[list[Any], list[str], tuple[str, Any]]
) -> None:
    check(select_by_milvus, *case)


def check(select: Select, rows: list[Any], steps: list[str], condition: tuple[str, Any]) -> None:
    operator, value = condition
    written = {escaped(steps): value if operator == "eq" else {operator: value}}
    expected = {i for i, row in enumerate(rows) if holds(row, steps, operator, value)}
    assert select(rows, Filter.parse(orjson.dumps(written))) == expected


@settings(max_examples=80, deadline=None)
@given(st.lists(metadatas, min_size=1, max_size=6), st.lists(st.tuples(paths, conditions), min_size=2, max_size=6))
def test_all_conditions_must_hold(rows: list[Any], several: list[tuple[list[str], tuple[str, Any]]]) -> None:
    written: dict[str, Any] = {}
    said = {}
    for steps, (operator, value) in several:
        operators = written.setdefault(escaped(steps), {})
        if operator == "eq":
            operator, value = "in", [value]
        operators[operator] = value
        said[escaped(steps), operator] = steps, value
    expected = {
        i
        for i, row in enumerate(rows)
        if all(holds(row, steps, operator, value) for (_, operator), (steps, value) in said.items())
    }
    assert select_by_sqlite(rows, Filter.of(written)) == expected


def test_each_operator(select: Select) -> None:
    """Written out, so that the oracle above cannot share a mistake."""
    rows: list[Any] = [{"n": n, "t": str(n), "place": {"city": c}} for n, c in enumerate("abcdefghij")]
    rows += [{"n": True}, {"n": None}, {}]
    for written, expected in [
        ({"n": 1}, {1}),
        ({"n": 1.0}, {1}),
        ({"n": True}, {10}),
        ({"n": None}, {11}),
        ({"place.city": "c"}, {2}),
        ({"n": {"gte": 2, "lt": 4}}, {2, 3}),
        ({"t": {"gt": "7"}}, {8, 9}),
        ({"n": {"ne": 1}}, set(range(13)) - {1}),
        ({"n": {"ne": 1, "exists": True}}, set(range(12)) - {1}),
        ({"n": {"in": [1, True, None, "2"]}}, {1, 10, 11}),
        ({"n": {"in": []}}, set()),
        ({"n": {"exists": False}}, {12}),
        ({"place": {"exists": True}, "n": {"lte": 0}}, {0}),
        ({}, set(range(13))),
    ]:
        assert select(rows, Filter.of(written)) == expected, written


@pytest.mark.parametrize("key", KEYS)
def test_each_key(select: Select, key: str) -> None:
    """As a key of the metadata, and inside of an object; strings that look like JSON are no objects."""
    rows = [
        {key: 1},
        {key: 2},
        {"x": {key: 1}},
        {key: {key: 1}},
        {"x": orjson.dumps({key: 1}).decode()},
        {key: "no {JSON"},
    ]
    assert select(rows, Filter.of({escaped([key]): 1})) == {0}
    assert select(rows, Filter.of({escaped(["x", key]): 1})) == {2}
    assert select(rows, Filter.of({escaped([key, key]): {"gte": 1}})) == {3}
    assert select(rows, Filter.of({escaped([key, key, key]): {"exists": True}})) == set()


def test_a_row_whose_metadata_is_damaged_does_not_end_the_search() -> None:
    rows = [b'{"a": 1', {"a": 1}, b"\xff", b"", b'{"a": 1, "a\\"b": 1}\x00', {'a"b': 1}]
    assert select_by_sqlite(rows, Filter.of({"a": 1})) >= {1}
    assert select_by_sqlite(rows, Filter.of({'a"b': 1})) >= {5}
    assert select_by_sqlite(rows, Filter.of({"a": {"gt": 0}})) <= {1, 4}


def test_nothing_that_was_written_stands_in_the_sql() -> None:
    nasty = "x') OR 1=1 --"
    for key in (nasty, f'"{nasty}', f"{nasty}.{nasty}", f"\\\\{nasty}"):
        for value in (nasty, {"in": [nasty]}, {"gt": nasty}, {"ne": nasty}):
            filter = Filter.of({key: value})
            assert "OR 1=1" not in filter.where
            assert select_by_sqlite([{}, {"x": 1}], filter) == ({0, 1} if value == {"ne": nasty} else set())


def test_labels_and_metadata_together(select: Select) -> None:
    both = Filter.labels(["a", "b"]) & Filter.of({"n": {"gte": 1}})
    assert select([{"n": 0}, {"n": 1}], both) == {1}
    assert select([{"n": 0}, {"n": 1}], Filter.labels(["b"]) & Filter.of({"n": 1})) == set()
    assert select([{"n": 0}], Filter.labels([])) == set()
    with pytest.raises(InvalidRequest, match="101 labels to choose from, the limit is 100") as caught:
        Filter.labels([str(i) for i in range(101)])
    assert caught.value.param == "label"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("", "is not JSON"),
        ('{"a": NaN}', "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[1]", "must be a JSON object"),
        ('"a"', "must be a JSON object"),
        ('{"a": [1]}', r"compares 'a' with \[1\]; it must be a string, a number, a boolean or null; or"),
        ('{"a": {}}', "has no operator for 'a'; there are gt, gte, lt, lte, ne, in, exists"),
        ('{"place": {"city": "Rome"}}', "has no operator 'city', given for 'place'; .* as in place.city"),
        ('{"a": {"gt": 1, "like": "x"}}', "has no operator 'like'"),
        ('{"a": {"gt": null}}', "compares 'a' by gt with None; it must be a number or a string"),
        ('{"a": {"lte": true}}', "compares 'a' by lte with True"),
        ('{"a": {"gte": [1]}}', "compares 'a' by gte"),
        ('{"a": {"ne": {"b": 1}}}', "compares 'a' by ne"),
        ('{"a": {"in": 1}}', "has 1 for in of 'a'; it must be a list"),
        ('{"a": {"in": [[1]]}}', r"compares 'a' by in with \[1\]"),
        ('{"a": {"exists": 1}}', "has 1 for exists of 'a'; it must be true or false"),
        ('{"a": "x\\u0000y"}', "compares 'a' with a text that has a NUL character"),
        ('{"a\\u0000": 1}', "has a key with a NUL character"),
        ('{"a\\\\b": 1}', "behind a backslash there must be a dot or another backslash"),
        ('{"a\\\\": 1}', "behind a backslash there must be"),
        ('{"a": {"in": [' + ",".join(["1"] * 1001) + "]}}", "has 1,001 values for in of 'a', the limit is 1,000"),
        (orjson.dumps({str(i): i for i in range(21)}), "has 21 conditions, the limit is 20"),
        (orjson.dumps({".".join("x" * 33): 1}), "has a key of 33 steps, .* at most 32 deep"),
        (orjson.dumps({"x" * 1000: [1]}), "xxx\\.\\.\\."),
    ],
)
def test_what_is_wrong_is_named(text: str | bytes, message: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^filter .*{message}") as caught:
        Filter.parse(text)
    assert caught.value.param == "filter"
    assert len(caught.value.message) < 300


def test_as_much_as_is_allowed(select: Select) -> None:
    deep: Any = 1
    for _ in range(32):
        deep = {'a"': deep}
    assert select([deep, {}], Filter.of({".".join(['a"'] * 32): 1})) == {0}
    twenty = {f"k{i}": {"in": list(np.arange(1000).tolist())} for i in range(20)}
    assert select([{f"k{i}": 999 for i in range(20)}, {"k0": 1}], Filter.of(twenty)) == {0}
