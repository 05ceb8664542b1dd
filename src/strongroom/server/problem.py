"""Errors as the custodian answers them: RFC 9457 problem documents (spec/http.md, section 3)."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from starlette.responses import JSONResponse, Response

from strongroom.errors import BackendError, NotFound, Sealed, StrongroomError

if TYPE_CHECKING:
    from starlette.requests import Request

_RETRY = "10"  # seconds; an upload takes some
_LOG = logging.getLogger("strongroom.server")
_UNABLE = "the custodian can't do this now: its store, database or key store does not answer, or its clock is wrong"


FAULT = {
    "type": "about:blank",
    "title": "Fault",
    "status": 500,
    "detail": "",
    "code": "server.fault",
    "hint": "",
    "evidence": {},
}


def described(error: StrongroomError) -> dict[str, Any]:
    """An error of ours, as RFC 9457 has it. Where this host keeps keys and database, and what is wrong with them, is
    in its own log, and not in the answer."""
    if isinstance(error, BackendError | Sealed) and error.code != "server.not_ready":
        _LOG.warning("%s: %r", error.code, error.message)
        error = type(error)(error.code, _UNABLE, hint="try again; whoever runs the custodian: strongroom doctor")
    return {
        "type": "about:blank",
        "title": type(error).__name__,
        "status": error.http_status,
        "detail": error.message,
        "code": error.code,
        "hint": error.hint,
        "evidence": error.evidence,
    }


def problem(error: StrongroomError) -> Response:
    """The answer to a request that ended in `error`."""
    headers = {"Retry-After": _RETRY} if error.code == "server.busy" else None
    return JSONResponse(described(error), error.http_status, headers, media_type="application/problem+json")


async def missing(_: Request, __: Exception) -> Response:
    """The answer at an address that is none."""
    return problem(NotFound("server.no_route", "there is nothing at this address"))


async def fault(_: Request, __: Exception) -> Response:
    """The answer to a fault of ours, which says nothing of it."""
    return JSONResponse(FAULT, 500, media_type="application/problem+json")
