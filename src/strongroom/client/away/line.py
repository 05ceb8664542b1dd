"""The line from a gateway to its custodian: each request signed with the key of the gateway's principal."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from strongroom.client import answers
from strongroom.core.clock import unix
from strongroom.core.settings import Settings
from strongroom.crypto.identity import Identities
from strongroom.crypto.session_key import SessionKeys, acting, signer_of
from strongroom.errors import AuthRequired, Denied, Sealed, StrongroomError
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
        return self._ask("GET", path, b"", members, lambda: self._call("GET", path, b""))

    def post(self, path: str, value: Mapping[str, Any], members: Mapping[str, Kind]) -> dict[str, Any]:
        body = json.dumps(value).encode()
        return self._ask("POST", path, body, members, lambda: self._call("POST", path, body))

    def say(self, path: str, kind: str, body: Mapping[str, Any], members: Mapping[str, Kind]) -> dict[str, Any]:
        """A statement of this kind."""
        with self._about_us():
            said = json.dumps({"statement": self.voice().say(kind, body).envelope}).encode()
        return self._ask("POST", path, said, members, dict)

    def _ask(
        self, method: str, path: str, body: bytes, members: Mapping[str, Kind], headers: Callable[[], dict[str, str]]
    ) -> dict[str, Any]:
        with self._about_us():
            return answers.parse(self._session.request(method, path, body, headers()), members)

    @contextlib.contextmanager
    def _about_us(self) -> Iterator[None]:
        """What the room has against the gateway, or that the gateway's own key is gone, is no AuthRequired or Denied:
        that would be taken for something about a caller."""
        try:
            yield
        except (AuthRequired, Denied) as error:
            message = f"{self._url} does not let {self.principal} relay: {error.message}"
            raise Sealed("gateway.refused", message, hint=self._advice(error)) from None

    def _advice(self, error: StrongroomError) -> str:
        """What is missing, as far as the room says: it tells nobody but a principal's own key what it has against
        it."""
        who = self.principal
        if error.code == "auth.refused":
            looks = f"who may grant looks with strongroom principal show {who}"
            if who not in self._identities.ls():
                return f"the login here is not good there (any more): strongroom login --as {who}; {looks}"
            key = self._identities.signer(who).public_key.hex()
            return (
                f"the room has nobody of that name, or with another key than the one here, {key}; {looks}, and runs: "
                f"strongroom principal add {who} --role gateway --public-key {key}, or, where it is there, "
                f"strongroom principal key {who} --public-key {key}"
            )
        if error.code == "denied.default" and not error.evidence.get("roles"):
            return (
                "no rule of the room's policy permits relay: it is older than the role gateway; an officer adds the "
                "rule gateways-relay (docs/how-to/give-inference.md) to what strongroom policy show prints, and runs: "
                "strongroom policy propose FILE "
                "--reason TEXT"
            )
        return error.hint  # of a clock that is off, a principal that is suspended, a role that it lacks

    def _call(self, method: str, path: str, body: bytes) -> dict[str, str]:
        return authorization(self.voice(), method, path, body)

    def close(self) -> None:
        self._session.close()
