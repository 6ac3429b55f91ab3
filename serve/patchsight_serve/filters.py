"""Which images may be found: a filter over metadata, as conditions, and as SQLite evaluates them. Knows no HTTP.

    {"camera": "x100", "place.city": "Rome", "year": {"gte": 2010, "lt": 2020}}

What was written goes to SQLite as parameters alone, keys too. Values go there as JSON, so that SQLite reads them
exactly as it reads the metadata: of a number that it cannot hold to the last digit it makes the same on both sides.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import orjson

from patchsight_serve.errors import InvalidRequest
from patchsight_serve.item import MAX_DEPTH

MAX_CONDITIONS = 20
MAX_LABELS = 100  # any of which an image may have
MAX_VALUES = 1000  # in a list of `in`
_ORDER = {"gt": ">", "gte": ">=", "lt": "<", "lte": "<="}
OPERATORS = (*_ORDER, "ne", "in", "exists")
_ORDERED = (str, int, float)
_SCALAR = (*_ORDERED, bool, type(None))

# A damaged row may hold anything, and must not end the search among all others.
_METADATA = "CASE WHEN json_valid(images.metadata) THEN images.metadata END"
_NUMBER, _TEXT = "'integer', 'real'", "'text'"
# A key that JSON writes as it is. In a path of SQLite an escaped one is read one way up to 3.44, and another since.
_PLAIN = re.compile(r'[^"\\\x00-\x1f]+')


class _Sql(NamedTuple):
    """Text, and the values of its question marks."""

    text: str
    values: list[str]


class Condition(NamedTuple):
    """One that must hold of what is at the end of `steps`, keys of the metadata from the outermost; without steps, of
    the label. operator: one of `OPERATORS`, `in` for equality too."""

    steps: tuple[str, ...]
    operator: str
    operand: Any


@dataclass(frozen=True)
class Filter:
    """A condition in SQL over the table `images`, and the values of its question marks; and what it is made of.

    `of` and `parse` make it of an object, all of which must hold. A key is one of the metadata's; `a.b` is `b`
    inside of the object `a`; a dot or a backslash that belongs to a key has a backslash before it. Under a key there is
    a value to be equal to, or an object of operators:

        gt, gte, lt, lte: a number or a string; holds between numbers, or between strings by code point
        ne: everything that is not equal, an image without this key too
        in: a list; equal to one of it
        exists: true or false: whether there is such a key, with null in it or anything

    Numbers are equal as numbers (1 and 1.0), and to no boolean; lists and objects are equal to nothing.

    Raises InvalidRequest, whose `param` is `filter`.
    """

    where: str
    values: tuple[str, ...]
    conditions: tuple[Condition, ...]

    @classmethod
    def parse(cls, text: str | bytes) -> "Filter":
        """From JSON text."""
        try:
            return cls.of(orjson.loads(text))
        except orjson.JSONDecodeError as error:
            raise _wrong(f"is not JSON: {error}") from None

    @classmethod
    def of(cls, content: Any) -> "Filter":
        """From what JSON makes of it."""
        if not isinstance(content, dict):
            raise _wrong('must be a JSON object, as {"camera": "x100"}')
        said = [condition for key, value in content.items() for condition in _read(key, value)]
        if len(said) > MAX_CONDITIONS:
            raise _wrong(f"has {len(said)} conditions, the limit is {MAX_CONDITIONS}")
        conditions = tuple(Condition(tuple(_steps(key)), operator, value) for key, operator, value in said)
        parts = [_condition(*condition) for condition in conditions]
        where = " AND ".join(part.text for part in parts) or "1"
        return cls(where, tuple(value for part in parts for value in part.values), conditions)

    @classmethod
    def labels(cls, labels: Collection[str]) -> "Filter":
        """Images that have one of these labels. Raises InvalidRequest where there are too many."""
        if len(labels) > MAX_LABELS:
            raise InvalidRequest(f"{len(labels):,} labels to choose from, the limit is {MAX_LABELS}", param="label")
        chosen = (Condition((), "in", list(labels)),)
        return cls(f"images.label IN ({', '.join('?' * len(labels))})", tuple(labels), chosen)

    def __and__(self, other: "Filter") -> "Filter":
        where = f"({self.where}) AND ({other.where})"
        return Filter(where, self.values + other.values, self.conditions + other.conditions)


def _read(key: str, value: Any) -> list[tuple[str, str, Any]]:
    """The conditions on one key: (key, operator, value)."""
    if not isinstance(value, dict):
        _check_scalar(key, "", value, _SCALAR)
        return [(key, "in", [value])]
    if not value:
        raise _wrong(f"has no operator for {_short(key)}; there are {', '.join(OPERATORS)}")
    for operator, operand in value.items():
        _check(key, operator, operand)
    return [(key, operator, operand) for operator, operand in value.items()]


def _check(key: str, operator: str, operand: Any) -> None:
    if operator in _ORDER:
        _check_scalar(key, f" by {operator}", operand, _ORDERED)
    elif operator == "ne":
        _check_scalar(key, " by ne", operand, _SCALAR)
    elif operator == "exists":
        if not isinstance(operand, bool):
            raise _wrong(f"has {_short(operand)} for exists of {_short(key)}; it must be true or false")
    elif operator == "in":
        if not isinstance(operand, list):
            raise _wrong(f"has {_short(operand)} for in of {_short(key)}; it must be a list")
        if len(operand) > MAX_VALUES:
            raise _wrong(f"has {len(operand):,} values for in of {_short(key)}, the limit is {MAX_VALUES:,}")
        for value in operand:
            _check_scalar(key, " by in", value, _SCALAR)
    else:
        raise _wrong(
            f"has no operator {_short(operator)}, given for {_short(key)}; there are {', '.join(OPERATORS)}, and a key "
            "inside of an object is written with a dot, as in place.city"
        )


def _check_scalar(key: str, how: str, value: Any, kinds: tuple[type, ...]) -> None:
    if type(value) not in kinds:
        ends = "a number or a string" if bool not in kinds else 'a string, a number, a boolean or null; or {"in": […]}'
        raise _wrong(f"compares {_short(key)}{how} with {_short(value)}; it must be {ends}")
    if isinstance(value, str) and "\0" in value:
        raise _wrong(f"compares {_short(key)}{how} with a text that has a NUL character")


def _steps(key: str) -> list[str]:
    """The keys on the way to a value, from the outermost."""
    if "\0" in key:
        raise _wrong(f"has a key with a NUL character: {_short(key)}")
    if not re.fullmatch(r"(?:[^\\]|\\[.\\])*", key):
        raise _wrong(f"has the key {_short(key)}: behind a backslash there must be a dot or another backslash")
    parts = re.findall(r"\\[.\\]|\.|[^.\\]+", key)
    steps = [""]
    for part in parts:
        if part == ".":
            steps.append("")
        else:
            steps[-1] += part[1:] if part[0] == "\\" else part
    if len(steps) > MAX_DEPTH:
        raise _wrong(f"has a key of {len(steps)} steps, {_short(key)}; metadata is at most {MAX_DEPTH} deep")
    return steps


def _condition(steps: Sequence[str], operator: str, operand: Any) -> _Sql:
    source = _source(steps)
    if operator == "exists":
        test, holds = _Sql("at.type IS NOT NULL", []), operand
    elif operator == "in":
        test, holds = _one_of(operand), True
    elif operator == "ne":
        test, holds = _one_of([operand]), False
    else:
        kinds = _TEXT if isinstance(operand, str) else _NUMBER
        text = f"at.type IN ({kinds}) AND at.value {_ORDER[operator]} json_extract(?, '$')"
        test, holds = _Sql(text, [orjson.dumps(operand).decode()]), True
    exists = f"EXISTS (SELECT 1 FROM {source.text} AS at WHERE {test.text})"
    return _Sql(exists if holds else f"NOT {exists}", source.values + test.values)


def _source(steps: Sequence[str]) -> _Sql:
    """A table with the columns `type` and `value` of what is there, in JSON's terms: no row, or null, if nothing is."""
    if all(_PLAIN.fullmatch(step) for step in steps):
        path = "$" + "".join(f'."{step}"' for step in steps)
        text = f"(SELECT json_type({_METADATA}, ?) AS type, json_extract({_METADATA}, ?) AS value)"
        return _Sql(text, [path, path])
    tables = [f"json_each({_METADATA}) AS s0"]
    for i in range(1, len(steps)):
        tables.append(f"json_each(CASE s{i - 1}.type WHEN 'object' THEN s{i - 1}.value END) AS s{i}")
    keys = " AND ".join(f"s{i}.key = ?" for i in range(len(steps)))
    last = f"s{len(steps) - 1}"
    text = f"(SELECT {last}.type AS type, {last}.value AS value FROM {', '.join(tables)} WHERE {keys})"
    return _Sql(text, list(steps))


def _one_of(values: Sequence[Any]) -> _Sql:
    """Whether what is there is equal to one of these."""
    words = sorted({orjson.dumps(value).decode() for value in values if value is None or isinstance(value, bool)})
    numbers = [value for value in values if type(value) in (int, float)]
    texts = [value for value in values if isinstance(value, str)]
    tests = [f"at.type = '{word}'" for word in words]
    marks = []
    for kinds, some in ((_NUMBER, numbers), (_TEXT, texts)):
        if some:
            tests.append(f"(at.type IN ({kinds}) AND at.value IN (SELECT json_each.value FROM json_each(?)))")
            marks.append(orjson.dumps(some).decode())
    return _Sql(f"({' OR '.join(tests) or '0'})", marks)


def _wrong(what: str) -> InvalidRequest:
    return InvalidRequest(f"filter {what}", param="filter")


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
