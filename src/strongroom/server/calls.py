"""Who asks: the signed `call` in the header of a request (spec/http.md, section 1), and what guests see (section 6)."""

from __future__ import annotations

import base64
import binascii
import hashlib
from typing import TYPE_CHECKING

from strongroom.core.clock import unix
from strongroom.errors import AuthRequired, StrongroomError
from strongroom.formats.statement import Statement
from strongroom.policy.speaker import Speaker, suspended
from strongroom.vault.custodian import Custodian

if TYPE_CHECKING:
    from starlette.requests import Request

_SCHEME = "Strongroom "


class Calls:
    """The callers of one room."""

    def __init__(self, custodian: Custodian) -> None:
        self._custodian = custodian

    def caller(self, request: Request, body: bytes, *actions: str) -> Speaker:
        """The principal whose `call` this request is; with `actions`, one who may do one of them."""
        header = request.headers.get("authorization", "")
        # As sent, byte for byte: what is decoded first, or made of the header Host, is another text than was signed.
        path, query = request.scope["raw_path"], request.scope["query_string"]
        target = (path + (b"?" + query if query else b"")).decode("latin-1")
        if not header.startswith(_SCHEME):
            raise _unknown()
        try:
            padded = header.removeprefix(_SCHEME).encode("ascii")
            envelope = base64.b64decode(padded + b"=" * (-len(padded) % 4), altchars=b"-_", validate=True)
            statement = Statement.decode(envelope.decode("utf-8"))
        except (binascii.Error, UnicodeError, StrongroomError):
            raise _unknown() from None
        expected = {"method": request.method, "path": target, "body": hashlib.sha256(body).hexdigest()}
        if statement.kind != "call" or dict(statement.body) != expected:
            raise _unknown()
        who = self._identify(statement, told="relay" in actions)
        if actions:
            self._custodian.authorise(who, *actions)
        return who

    def _identify(self, statement: Statement, *, told: bool) -> Speaker:
        """`told`: a gateway that is suspended is told so (spec/http.md, section 10), as nobody else is who asks."""
        try:
            return self._custodian.identify(statement)
        except AuthRequired as error:
            if not told or error.code != "auth.refused":
                raise
            with self._custodian.ledger.view() as state:
                if not suspended(state, statement, unix()):
                    raise
        raise AuthRequired(
            "principal.suspended",
            f"{statement.by} is suspended in this room",
            hint=f"somebody who may grant runs: strongroom principal restore {statement.by}",
        )

    def guest(self, request: Request, body: bytes) -> str:
        """The caller if it is a guest, who sees what concerns itself only; else nothing."""
        who = self.caller(request, body)
        return who.path if who.guest else ""


def _unknown() -> AuthRequired:
    return AuthRequired(
        "auth.refused",
        "the request is not one that a principal of this room has signed",
        hint="ask somebody who may grant to register, or to restore, the key that `strongroom identity ls` shows",
    )
