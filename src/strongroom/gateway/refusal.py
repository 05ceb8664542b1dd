"""Errors in OpenAI's shape (spec/gateway.md, section 4): what its clients raise as they would for OpenAI's own."""

from __future__ import annotations

from typing import Any

import orjson

from strongroom.errors import (
    AuthRequired,
    BackendError,
    BudgetExceeded,
    Denied,
    LimitExceeded,
    NotFound,
    Sealed,
    StrongroomError,
    UsageError,
)

# The code on the wire: a class's, unless the error's own is known.
_BY_CODE = {
    "body.too_large": ("body_too_large", 413),
    "content.refused": ("content_refused", 400),
    "version.frozen": ("frozen", 403),
    "verify.alarm": ("sealed", 503),
    "upstream.timeout": ("upstream_timeout", 504),
    "upstream.malformed": ("upstream_malformed", 502),
    "upstream.unavailable": ("upstream_unavailable", 502),
    "upstream.aborted": ("upstream_unavailable", 502),
    "gateway.fault": ("internal", 500),
    "route.missing": ("not_found", 404),
    "route.method": ("method_not_allowed", 405),
}
_BY_CLASS: tuple[tuple[type[StrongroomError], str, int], ...] = (
    (BudgetExceeded, "budget_exceeded", 429),
    (LimitExceeded, "rate_limited", 429),
    (AuthRequired, "invalid_api_key", 401),
    (Denied, "permission_denied", 403),
    (NotFound, "model_not_found", 404),
    (Sealed, "sealed", 503),
    (BackendError, "sealed", 503),
    (UsageError, "parameter_invalid", 400),
)
# What the room has against the gateway itself: where that room is, and who the gateway is, is nothing for callers.
_OURS = ("gateway.refused", "gateway.budgets")
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


def wire(error: StrongroomError) -> tuple[int, str]:
    """Status and code of an error."""
    if error.code in _BY_CODE:
        code, status = _BY_CODE[error.code]
        return status, code
    if error.code.startswith(("parameter.", "body.")):
        return 400, error.code.replace(".", "_")
    for kind, code, status in _BY_CLASS:
        if isinstance(error, kind):
            return status, code
    return 500, "internal"


def withheld(error: StrongroomError) -> bool:
    """Whether callers are not told what it is: why a thing of ours failed is for the log of this machine."""
    return wire(error)[0] >= 500 and (error.code in _OURS or not error.code.startswith(("upstream.", "gateway.")))


def body_of(error: StrongroomError) -> bytes:
    """What the caller is told: no more than what it asked, and what it may do next."""
    status, code = wire(error)
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    message = "try again later" if withheld(error) else error.message
    value: dict[str, Any] = {"message": message, "type": kind, "param": error.evidence.get("param"), "code": code}
    if isinstance(error, Denied | LimitExceeded) and error.hint:
        value["hint"] = error.hint
    return orjson.dumps({"error": value})


def headers_of(error: StrongroomError) -> list[tuple[bytes, bytes]]:
    """Retry-After, where waiting helps; and who may be asked for."""
    found: list[tuple[bytes, bytes]] = []
    after = error.evidence.get("retry_after")
    if isinstance(after, int | float):
        found.append((b"retry-after", b"%d" % max(1, -int(-after // 1))))
    if isinstance(error, BudgetExceeded):
        found.append((b"x-should-retry", b"false"))  # the official clients would, after half a second
    if isinstance(error, AuthRequired):
        found.append((b"www-authenticate", b"Bearer"))
    return found
