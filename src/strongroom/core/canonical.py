"""Canonical JSON: one byte string for one value, so that a signature over it means something.

RFC 8785 restricted to what Strongroom writes: objects with string keys, arrays, strings, integers, booleans and null.
Floats are refused when writing (their text form is where canonicalisers disagree). Reading refuses what a lenient
parser lets two readers see differently: duplicate keys, NaN, bad UTF-8, deep nesting, and any text that is not the
canonical form of its own value.
"""

from __future__ import annotations

import json
from typing import Any

from strongroom.errors import Tampered

MAX_DEPTH = 32
MAX_INTEGER = 2**53 - 1  # RFC 8785 section 3.2.2.3: beyond it readers of other languages round


def encode(value: Any) -> bytes:
    """The canonical bytes of `value`; TypeError or ValueError on a value the format has no form for (a bug of ours)."""
    _check(value, 0)
    return json.dumps(_ordered(value), ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode("utf-8")


def decode(data: bytes, *, what: str = "document") -> Any:
    """Parse canonical JSON; Tampered unless `data` is exactly the canonical form of what it says."""
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_refuse)
        canonical = encode(value) == data
    except (ValueError, TypeError, RecursionError) as error:
        raise Tampered("json.malformed", f"{what} is not canonical JSON: {type(error).__name__}") from None
    if not canonical:
        raise Tampered("json.not_canonical", f"{what} is JSON, but not in its canonical form")
    return value


def _check(value: Any, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise ValueError("nested too deeply")
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError("object keys are strings")
            _check(item, depth + 1)
    elif isinstance(value, list | tuple):
        for item in value:
            _check(item, depth + 1)
    elif isinstance(value, int) and not isinstance(value, bool):
        if abs(value) > MAX_INTEGER:
            raise ValueError("integer out of range")
    elif value is not None and not isinstance(value, str | bool):
        raise TypeError(f"no canonical form for {type(value).__name__}")


def _ordered(value: Any) -> Any:
    # RFC 8785 section 3.2.3: keys in the order of their UTF-16 code units.
    if isinstance(value, dict):
        return {key: _ordered(value[key]) for key in sorted(value, key=lambda k: k.encode("utf-16-be"))}
    if isinstance(value, list | tuple):
        return [_ordered(item) for item in value]
    return value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("duplicate key")
    return result


def _refuse(name: str) -> Any:
    raise ValueError(name)
