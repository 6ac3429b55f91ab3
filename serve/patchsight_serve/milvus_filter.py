"""Filters as Milvus evaluates them, with the meaning that they have everywhere.

Milvus compares what is inside of its JSON fields by rules of its own: of null, of booleans and numbers, of integers
beyond 2⁵³, of keys with quotes. So what can be asked for is written down beside the metadata, in a form that leaves
nothing to such rules: for all that is equality a token for each key and each value, for all that is order texts that
compare as the numbers and strings do for which they stand. In an expression there are letters and digits alone.
"""

import hashlib
import math
import struct
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import orjson

from patchsight_serve.errors import InvalidRequest
from patchsight_serve.filters import Condition, Filter

MAX_TOKENS = 4096  # in an array of Milvus
MAX_JSON = 65_536  # bytes of a JSON field of Milvus
TOKEN = 17  # characters of one
NEVER = 'id == ""'
_ORDER = {"gt": ">", "gte": ">=", "lt": "<", "lte": "<="}


class Findable(NamedTuple):
    """By what an image is found. tokens: its label, its keys, its values. ranges: under a name for each key with a
    number or string, a text that compares with others as those do."""

    tokens: list[str]
    ranges: dict[str, str]


def findable(label: str | None, metadata: str) -> Findable:
    """Of a label and metadata as JSON text. Raises InvalidRequest where they are more than Milvus takes."""
    tokens = [] if label is None else [_token("l", label)]
    ranges = {}
    for steps, value in _walk((), orjson.loads(metadata)):
        tokens.append(_token("e", *steps))
        if not isinstance(value, dict | list):
            tokens.append(_value(steps, value))
        if type(value) in (int, float, str):
            ranges[_name(steps, value)] = _ordered(value)
    if len(tokens) > MAX_TOKENS or len(orjson.dumps(ranges)) > MAX_JSON:
        raise InvalidRequest(
            f"metadata has {len(ranges):,} numbers and strings; what Milvus needs to find them by is more than the "
            f"{MAX_JSON:,} bytes, or the {MAX_TOKENS:,} values, that it takes",
            param="metadata",
        )
    return Findable(tokens, ranges)


def expression(filter: Filter | None) -> str:
    """What Milvus is asked; empty for all images."""
    return " and ".join(f"({_condition(condition)})" for condition in filter.conditions) if filter else ""


def _condition(condition: Condition) -> str:
    steps, operator, operand = condition
    if not steps:
        return _any([_token("l", label) for label in operand])
    if operator == "exists":
        return ("" if operand else "not ") + _any([_token("e", *steps)])
    if operator == "in":
        return _any([_value(steps, value) for value in operand])
    if operator == "ne":
        return f"not {_any([_value(steps, operand)])}"
    return f'ranges["{_name(steps, operand)}"] {_ORDER[operator]} "{_ordered(operand)}"'


def _any(tokens: list[str]) -> str:
    return f"array_contains_any(tokens, {orjson.dumps(sorted(set(tokens))).decode()})" if tokens else NEVER


def _walk(steps: tuple[str, ...], inside: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """All keys, in objects inside of objects too, with what is there."""
    for key, value in inside.items():
        yield (*steps, key), value
        if isinstance(value, dict):
            yield from _walk((*steps, key), value)


def _value(steps: Sequence[str], value: Any) -> str:
    """Equal for what is equal: 1 and 1.0, and no boolean."""
    kind = "n" if type(value) in (int, float) else type(value).__name__
    return _token("v", kind, _ordered(value) if kind in ("n", "str") else str(value), *steps)


def _name(steps: Sequence[str], value: int | float | str) -> str:
    return _token("t" if isinstance(value, str) else "n", *steps)


def _token(kind: str, *said: str) -> str:
    """A letter and 64 bits of a hash."""
    return kind + hashlib.blake2b(orjson.dumps(said), digest_size=8).hexdigest()


def _ordered(value: int | float | str) -> str:
    """A text before that of every greater value of its kind.

    A string: its bytes in UTF-8, which are in the order of its code points. A number: the greatest double that is not
    above it, with its bits turned so that they sort, and how far the number is above that. SQLite has integers of 64
    bits with a sign, and greater ones as doubles; so it is here.
    """
    if isinstance(value, str):
        return "x" + value.encode().hex()
    if isinstance(value, int) and value >= 2**63:
        value = float(value)
    below = float(value) + 0.0  # of −0 makes 0
    if isinstance(value, int) and int(below) > value:
        below = math.nextafter(below, -math.inf)
    above = value - int(below) if isinstance(value, int) else 0
    (bits,) = struct.unpack(">Q", struct.pack(">d", below))
    bits = bits ^ (2**64 - 1) if bits >> 63 else bits | 2**63
    return f"{bits:016x}{above:04x}"
