"""Errors as the custodian answers them: RFC 9457 problem documents (spec/http.md, section 3)."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from starlette.responses import JSONResponse, Response

from strongroom.errors import BackendError, NotFound, Sealed, StrongroomError

if TYPE_CHECKING:
    from starlette.requests import Request

_LOG = logging.getLogger("strongroom.server")
_UNABLE = "the custodian can't do this now: its store, database or key store does not answer, or its clock is wrong"


def problem(error: StrongroomError) -> Response:
    """An error of ours, as RFC 9457 has it. Where this host keeps keys and database, and what is wrong with them, is
    in its own log, and not in the answer."""
    if isinstance(error, BackendError | Sealed) and error.code != "server.not_ready":
        _LOG.warning("%s: %r", error.code, error.message)
        error = type(error)(error.code, _UNABLE, hint="try again; whoever runs the custodian: strongroom doctor")
    value = {
        "type": "about:blank",
        "title": type(error).__name__,
        "status": error.http_status,
        "detail": error.message,
        "code": error.code,
        "hint": error.hint,
        "evidence": error.evidence,
    }
    return JSONResponse(value, error.http_status, media_type="application/problem+json")


async def missing(_: Request, __: Exception) -> Response:
    """The answer at an address that is none."""
    return problem(NotFound("server.no_route", "there is nothing at this address"))


async def fault(_: Request, __: Exception) -> Response:
    """The answer to a fault of ours, which says nothing of it."""
    value = {"type": "about:blank", "title": "Fault", "status": 500, "code": "server.fault", "detail": "", "hint": ""}
    return JSONResponse({**value, "evidence": {}}, 500, media_type="application/problem+json")
