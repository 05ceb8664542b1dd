"""What requests consist of, read with suspicion: bodies, their members, numbers and ranges."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
from typing import TYPE_CHECKING, Any

from strongroom.core.limits import LIMITS, MIB
from strongroom.errors import LimitExceeded, UsageError
from strongroom.formats.entry import Private

if TYPE_CHECKING:
    from starlette.requests import Request

_MOST = 2 * MIB
_BODY_TIME = 30.0  # seconds that a body may take to come
_RANGE_MOST = 64 * MIB


async def read_body(request: Request) -> bytes:
    """The whole body; LimitExceeded ``server.too_large``, ``server.too_slow``."""
    parts, size = [], 0
    try:
        async with asyncio.timeout(_BODY_TIME):
            async for part in request.stream():
                size += len(part)
                if size > _MOST:
                    raise LimitExceeded("server.too_large", f"a request has at most {_MOST} bytes")
                parts.append(part)
    except TimeoutError:
        raise LimitExceeded("server.too_slow", f"a request has to come within {_BODY_TIME:.0f} seconds") from None
    return b"".join(parts)


def members(body: bytes, known: set[str]) -> dict[str, Any]:
    """The JSON object in a body, with no other members than `known`; UsageError ``server.body``."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict) or not value.keys() <= known:
        raise UsageError("server.body", f"the body is a JSON object of {', '.join(sorted(known))}")
    return value


def text_of(value: dict[str, Any], name: str) -> str:
    """A member that is a text; UsageError ``server.body``."""
    found = value.get(name)
    if not isinstance(found, str):
        raise UsageError("server.body", f"the body has no {name}")
    return found


def reason_of(value: object) -> Private | None:
    """What the commitment in a statement stands for, if it was sent; UsageError ``server.body``."""
    if value is None:
        return None
    if isinstance(value, dict) and value.keys() == {"value", "salt"} and isinstance(value["value"], str):
        salt = value["salt"]
        try:
            if isinstance(salt, str) and len(value["value"]) <= LIMITS.reason:
                return Private("reason", value["value"], base64.b64decode(salt, validate=True))
        except (binascii.Error, ValueError):
            pass
    raise UsageError("server.body", f"a reason is a value of at most {LIMITS.reason} characters and a salt")


def needed(reason: Private | None) -> Private:
    """A reason that has to be there; UsageError ``server.body``."""
    if reason is None:
        raise UsageError("server.body", "the body has no reason")
    return reason


def number_of(text: str) -> int:
    """A number in decimal; UsageError ``server.number``."""
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise UsageError("server.number", f"{text!r:.40} is not a number")
    return int(text)


def range_of(header: str, size: int) -> tuple[int, int]:
    """Begin and end of what a request asks for: all of it, or one range that the object has. UsageError
    ``server.range`` for more than one answer may have (spec/http.md, section 5)."""
    begin, end = 0, size
    if header:
        unit, _, spec = header.partition("=")
        first, _, last = spec.partition("-")
        if unit != "bytes" or not last:
            raise UsageError("server.range", "a range is bytes=FIRST-LAST", hint=_range_hint(size))
        begin, end = number_of(first), number_of(last) + 1
    if not 0 <= begin <= end <= size or end - begin > _RANGE_MOST:
        raise UsageError(
            "server.range",
            f"the object has {size} bytes; an answer has at most {_RANGE_MOST} of them, from a range that lies in it",
            hint=_range_hint(size),
        )
    return begin, end


def _range_hint(size: int) -> str:
    return f"Range: bytes=0-{min(size, _RANGE_MOST) - 1}" if size else "no Range: the object is empty"


def base64_of(data: bytes) -> str:
    """Bytes as they travel in JSON."""
    return base64.b64encode(data).decode()
