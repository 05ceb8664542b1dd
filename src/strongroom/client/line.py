"""The line from a gateway to its custodian: each request signed with the key of the gateway's principal."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from strongroom.client import answers
from strongroom.core.clock import unix
from strongroom.core.settings import Settings
from strongroom.crypto.identity import Identities
from strongroom.crypto.session_key import SessionKeys, acting, signer_of
from strongroom.errors import AuthRequired, Denied, Sealed
from strongroom.formats.card import Card
from strongroom.formats.entry import Kind
from strongroom.formats.statement import Voice
from strongroom.storage.session import Session, authorization

_PATIENCE = 5.0  # seconds for an answer: callers wait, and the log has to be seen each 10 s


class Line:
    """To the room that `card` names, as `principal` (default: the only identity on this machine). Thread-safe. What the
    room has against the gateway itself is Sealed ``gateway.refused``; other errors are those of `Session`."""

    def __init__(self, card: Card, principal: str | None) -> None:
        settings = Settings.from_environment()
        self.room, self._url = card.room, card.url
        self._identities = Identities(settings.identities_folder)
        self._sessions = SessionKeys(settings.state_folder, card.room)
        self._session = Session(card, patience=_PATIENCE)
        self.principal = acting(
            self._identities, self._sessions, principal, whom="the gateway is", new="workload/gateway"
        )

    def voice(self) -> Voice:
        """With the key that is there now: one may be renewed while the gateway runs. AuthRequired
        ``identity.missing``."""
        signer = signer_of(self._identities, self._sessions, self.principal, unix())
        return Voice(self.room.hex(), self.principal, signer, unix)

    def get(self, path: str, members: Mapping[str, Kind]) -> dict[str, Any]:
        return self._ask("GET", path, b"", members, self._call("GET", path, b""))

    def post(self, path: str, value: Mapping[str, Any], members: Mapping[str, Kind]) -> dict[str, Any]:
        body = json.dumps(value).encode()
        return self._ask("POST", path, body, members, self._call("POST", path, body))

    def say(self, path: str, kind: str, body: Mapping[str, Any], members: Mapping[str, Kind]) -> dict[str, Any]:
        """A statement of this kind."""
        said = json.dumps({"statement": self.voice().say(kind, body).envelope}).encode()
        return self._ask("POST", path, said, members, {})

    def _ask(
        self, method: str, path: str, body: bytes, members: Mapping[str, Kind], headers: dict[str, str]
    ) -> dict[str, Any]:
        try:
            return answers.parse(self._session.request(method, path, body, headers), members)
        except (AuthRequired, Denied) as error:
            hint = (
                "a policy that is older than the role gateway lacks the rule gateways-relay; else who may grant "
                f"runs: strongroom principal add {self.principal} --role gateway --public-key KEY"
            )
            raise Sealed(
                "gateway.refused",
                f"{self._url} does not let {self.principal} relay: {error.message}",
                hint=error.hint if error.code == "statement.stale" else hint,  # which is about this machine's clock
            ) from None

    def _call(self, method: str, path: str, body: bytes) -> dict[str, str]:
        return authorization(self.voice(), method, path, body)

    def close(self) -> None:
        self._session.close()
