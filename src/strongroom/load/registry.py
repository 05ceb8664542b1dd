"""Registering and changing principals, by statements of whoever may grant."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from strongroom.core.ids import parse_principal
from strongroom.errors import BackendError, Conflict, StrongroomError, UsageError
from strongroom.formats.authority import subject_of

if TYPE_CHECKING:
    from strongroom.load.room import AnyRoom

_KEY = re.compile(r"[0-9a-f]{64}", re.ASCII)


class Registry:
    """The principals of `room`; `say` signs a statement of whoever changes them."""

    def __init__(self, room: AnyRoom, say: Callable[[str, dict[str, Any]], str]) -> None:
        self._room, self._say = room, say

    def add(
        self,
        path: str,
        roles: Sequence[str],
        teams: Sequence[str],
        person: str | None,
        public_key: str | None,
        oidc: str | None,
        spiffe: str | None,
    ) -> dict[str, Any]:
        """See `strongroom.client.Room.principal_add`."""
        parse_principal(path)
        if public_key is not None and not _KEY.fullmatch(public_key):
            raise UsageError(
                "principal.public_key",
                f"{public_key!r:.80} is not a public key: 64 hexadecimal digits, in lower case",
                hint="strongroom identity new PRINCIPAL, on the machine of whoever it is for, shows it",
            )
        known = {item["path"]: item["state"] for item in self._room.principal_ls()}
        if known.get(path, "removed") != "removed":
            raise Conflict(
                "principal.exists", f"{path} is already registered", hint=f"strongroom principal role {path} ROLE…"
            )
        identities = self._room.identities
        before = self._room.custodian.known(path).entry if path in known else None
        bound = subject_of(oidc, spiffe)
        wanted = public_key is None and not bound
        # A key that an interrupted call left, for somebody whom the log has never heard of, is as good as a new one.
        made = wanted and (path in known or path not in identities.ls())
        signer = identities.create(path) if made else identities.signer(path) if wanted else None
        key = signer.public_key.hex() if signer else public_key or ""
        try:
            return self._change(
                path,
                before,
                key=key,
                person=person or path,
                roles=roles,
                teams=teams,
                state="active",
                subject=bound,
            )
        except StrongroomError as error:
            # Not one that was there before; and an answer that was lost may have been a yes.
            if made and not isinstance(error, BackendError):
                identities.remove(path)
            raise

    def change(self, path: str, roles: Sequence[str] | None, state: str | None) -> dict[str, Any]:
        """Other roles, or another state."""
        old = self._room.custodian.known(path)
        if old.state == "removed" and state != "removed":
            raise Conflict(
                "principal.removed", f"{path} was removed, for good", hint=f"strongroom principal add {path}"
            )
        # Only what is changed is said: of the rest this client knows what a server says.
        return self._change(path, old.entry, roles=roles, state=state)

    def bind(self, path: str, oidc: str | None, spiffe: str | None) -> dict[str, Any]:
        """Another name that an authority gives it, or none."""
        old = self._room.custodian.known(path)
        bound = subject_of(oidc, spiffe)
        return self._change(path, old.entry, subject=bound)

    def _change(
        self,
        path: str,
        before: int | None,
        *,
        key: str | None = None,
        person: str | None = None,
        roles: Sequence[str] | None = None,
        teams: Sequence[str] | None = None,
        state: str | None = None,
        subject: str | None = None,
    ) -> dict[str, Any]:
        """What is left out stays as it is in the record from the entry `before`; an empty `subject`: bound to none."""
        body: dict[str, Any] = {
            "principal": path,
            "key": key,
            "person": person,
            "roles": sorted(set(roles)) if roles is not None else None,
            "teams": sorted(set(teams)) if teams is not None else None,
            "state": state,
            "before": before,
        }
        if subject != "":
            body["subject"] = subject
        return self._room.custodian.change_principal(self._say("principal", body))
