"""Canonical JSON: one byte string for one value, so that a signature over it means something.

RFC 8785 restricted to what Strongroom writes: objects with string keys, arrays, strings, integers, booleans and null.
Floats are refused when writing (their text form is where canonicalisers disagree). Reading refuses what a lenient
parser lets two readers see differently: duplicate keys, NaN, bad UTF-8, deep nesting, and any text that is not the
canonical form of its own value.
"""

from __future__ import annotations

import json
from typing import Any

import orjson

from strongroom.errors import Tampered

MAX_DEPTH = 32
MAX_INTEGER = 2**53 - 1  # RFC 8785 section 3.2.2.3: beyond it readers of other languages round


# Made once: json.dumps and json.loads make new ones at every call with options such as these.
_SORTING = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False, sort_keys=True)
_KEEPING = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def encode(value: Any) -> bytes:
    """The canonical bytes of `value`; TypeError or ValueError on a value the format has no form for (a bug of ours)."""
    text = _SORTING.encode(value) if _plain(value, 0) else _KEEPING.encode(_form(value, 0))
    return text.encode("utf-8")


def encode_typed(value: Any) -> bytes:
    """As `encode`, and several times as fast, for a caller that has looked at the type and range of every value itself,
    and whose keys are ASCII."""
    try:
        return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)
    except TypeError:  # for half a surrogate pair, too, of which `encode` says what it is
        return encode(value)


def decode(data: bytes, *, what: str = "document") -> Any:
    """Parse canonical JSON; Tampered unless `data` is exactly the canonical form of what it says."""
    try:
        text = data.decode("utf-8")
        value = _PARSER.decode(text)
        # Few brackets nest little, and ASCII sorts alike in every encoding: what the parser let pass has a form then,
        # so that it need not be looked through again.
        if text.isascii() and text.count("{") + text.count("[") <= MAX_DEPTH:
            canonical = _SORTING.encode(value) == text
        else:
            canonical = encode(value) == data
    except (ValueError, TypeError, RecursionError) as error:
        raise Tampered("json.malformed", f"{what} is not canonical JSON: {type(error).__name__}") from None
    if not canonical:
        raise Tampered("json.not_canonical", f"{what} is JSON, but not in its canonical form")
    return value


def decode_typed(data: bytes, *, what: str) -> Any:
    """As `decode`, and several times as fast, for a caller that looks at the type and range of every value itself.

    Fractions, and integers beyond `MAX_INTEGER`, are not refused here; an object that has a key twice is
    ``json.not_canonical``.
    """
    if not data.isascii():
        return decode(data, what=what)  # keys may sort otherwise
    try:
        value = orjson.loads(data)
        canonical = orjson.dumps(value, option=orjson.OPT_SORT_KEYS) == data
    except (ValueError, TypeError) as error:
        raise Tampered("json.malformed", f"{what} is not canonical JSON: {type(error).__name__}") from None
    if not canonical:
        raise Tampered("json.not_canonical", f"{what} is JSON, but not in its canonical form")
    return value


def _plain(value: Any, depth: int) -> bool:
    """Whether `value` has a form whose keys sort alike as code points and as UTF-16: what entries are made of. Quick,
    and says no where in doubt."""
    if type(value) is str or value is None or type(value) is bool:
        return True
    if type(value) is int:
        return -MAX_INTEGER <= value <= MAX_INTEGER
    if depth >= MAX_DEPTH:
        return False
    if type(value) is dict:
        for key, item in value.items():
            if type(key) is not str or not key.isascii() or not _plain(item, depth + 1):
                return False
        return True
    return type(value) is list and len(value) < 64 and all(_plain(item, depth + 1) for item in value)


def _form(value: Any, depth: int) -> Any:
    """`value` with the keys of its objects in order; TypeError or ValueError where it has no canonical form."""
    if depth > MAX_DEPTH:
        raise ValueError("nested too deeply")
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, int):
        if abs(value) > MAX_INTEGER:
            raise ValueError("integer out of range")
        return value
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise TypeError("object keys are strings")
        # RFC 8785 section 3.2.3: keys in the order of their UTF-16 code units.
        return {key: _form(value[key], depth + 1) for key in sorted(value, key=_utf16)}
    if isinstance(value, list | tuple):
        if depth < MAX_DEPTH and set(map(type, value)) == {int}:  # a layout has a number for each segment
            if max(value) > MAX_INTEGER or min(value) < -MAX_INTEGER:
                raise ValueError("integer out of range")
            return value
        return [_form(item, depth + 1) for item in value]
    raise TypeError(f"no canonical form for {type(value).__name__}")


def _utf16(key: str) -> bytes:
    return key.encode("utf-16-be")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("duplicate key")
    return result


def _refuse(name: str) -> Any:
    raise ValueError(name)


def _integer(text: str) -> int:
    if len(text) > 17 or abs(value := int(text)) > MAX_INTEGER:
        raise ValueError("integer out of range")
    return value


_PARSER = json.JSONDecoder(
    object_pairs_hook=_no_duplicates, parse_constant=_refuse, parse_float=_refuse, parse_int=_integer
)
