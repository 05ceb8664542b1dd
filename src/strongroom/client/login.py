"""Logins, on the side of whoever logs in: a key is made here, and an identity provider's token or a workload's
certificate introduces it to the room (spec/ledger.md, section 9)."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from strongroom.core.ids import parse_principal
from strongroom.crypto import svid
from strongroom.crypto.signatures import Signer
from strongroom.errors import NotFound, UsageError
from strongroom.formats.authority import OIDC, X509, audience_name, key_name, svid_message, trust_domain
from strongroom.formats.statement import Statement

if TYPE_CHECKING:
    from strongroom.client.anyroom import AnyRoom


class Login:
    """One login of `who` to `room`, for `duration` seconds at most."""

    def __init__(self, room: AnyRoom, who: str, duration: int) -> None:
        self._room, self._who, self._duration = room, parse_principal(who), duration

    def prepare(self) -> dict[str, str]:
        """Make the key, and say what a token has to name it by: its `nonce`, or its `audience`."""
        key = self._room.sessions.make(self._who).public_key
        return {"audience": audience_name(self._room.id, key), "nonce": key_name(self._room.id, key)}

    def with_token(self, token: str) -> dict[str, Any]:
        """Finish with an ID token, which names the key that `prepare` has made."""
        token = token.strip()
        signer = self._room.sessions.waiting(self._who)
        return self._finish(signer, OIDC, _issuer(token), lambda _: {"token": token})

    def with_certificate(self, chain: str, key: bytes, uri: str) -> dict[str, Any]:
        """Finish with the PEM `chain` of a workload, whose SPIFFE id is `uri`, and its private `key`."""
        try:
            signer = self._room.sessions.waiting(self._who)
        except NotFound:
            signer = self._room.sessions.make(self._who)

        def proof(statement: Statement) -> dict[str, str]:
            signature = svid.sign(key, svid_message(self._room.id, statement.digest))
            return {"chain": chain, "signature": base64.b64encode(signature).decode()}

        return self._finish(signer, X509, trust_domain(uri), proof)

    def end(self) -> bool:
        """Forget the key of the login; whether there was one. What is recorded of it ends by itself."""
        return self._room.sessions.end(self._who)

    def _finish(
        self, signer: Signer, method: str, authority: str, proof: Callable[[Statement], dict[str, str]]
    ) -> dict[str, Any]:
        body = {
            "method": method,
            "authority": authority,
            "public_key": signer.public_key.hex(),
            "duration": self._duration,
        }
        at = self._room.clock()
        said = Statement.sign("login", body, room=self._room.id.hex(), by=self._who, at=at, signer=signer)
        done: dict[str, Any] = self._room.custodian.login(said.envelope, proof(said))
        self._room.sessions.keep(self._who, signer, done["expires_at"])
        return done


def _issuer(token: str) -> str:
    """Who says to have made a token. Nothing rests on it: the custodian checks."""
    try:
        part = token.split(".")[1]
        value = json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
        return str(value["iss"])
    except (IndexError, ValueError, KeyError, TypeError):
        raise UsageError("login.token", "that is no ID token", hint="strongroom login --help") from None
