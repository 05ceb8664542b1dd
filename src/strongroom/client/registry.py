"""Registering and changing principals, by statements of whoever may grant."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from strongroom.core.ids import parse_principal
from strongroom.errors import BackendError, Conflict, StrongroomError, UsageError
from strongroom.formats.authority import subject_of

if TYPE_CHECKING:
    from strongroom.client.anyroom import AnyPrincipal, AnyRoom, Say

_KEY = re.compile(r"[0-9a-f]{64}", re.ASCII)


class Registry:
    """The principals of `room`; `say` signs a statement of whoever changes them. `makes_keys`: of an embedded room,
    whose folder has the keys of all its principals."""

    def __init__(self, room: AnyRoom, say: Say, *, makes_keys: bool) -> None:
        self._room, self._say, self._makes_keys = room, say, makes_keys

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
        if parse_principal(path).startswith("team/"):
            raise UsageError(
                "principal.team",
                f"{path} is a team: it acts through its members, needs no registering, and must have no key",
                hint=f"strongroom principal team PRINCIPAL {path}, for each who is in it",
            )
        if public_key is not None:
            _check(public_key, path)
        known = {item["path"]: item["state"] for item in self._room.principal_ls()}
        if known.get(path, "removed") != "removed":
            raise Conflict(
                "principal.exists",
                f"{path} is already registered",
                hint=f"strongroom principal role {path} ROLE, strongroom principal team {path} team/NAME, or for "
                f"another key: strongroom principal key {path} --public-key KEY",
            )
        identities = self._room.identities
        before = self._room.custodian.known(path).entry if path in known else None
        bound = subject_of(oidc, spiffe)
        wanted = public_key is None and not bound
        # Whoever registers somebody would have that person's key, and could agree to what they ask for themselves.
        if wanted and not self._makes_keys:
            raise UsageError(
                "principal.no_key",
                f"{path} needs a key that is made on its own machine, and not on yours",
                hint=f"there: strongroom identity new {path}; then here: "
                f"strongroom principal add {path} --public-key KEY, with the key that it shows",
            )
        # A key that an interrupted call left, for somebody whom the log has never heard of, is as good as a new one.
        made = wanted and (path in known or path not in identities.ls())
        signer = identities.create(path) if made else identities.signer(path) if wanted else None
        key = signer.public_key.hex() if signer else public_key or ""
        try:
            done = self._change(
                path,
                before,
                key=key,
                person=person or path,
                roles=roles,
                teams=teams,
                state="active",
                subject=bound,
            )
            return {**done, "key_file": str(identities.file(path))} if signer else done
        except StrongroomError as error:
            # Not one that was there before; and an answer that was lost may have been a yes.
            if made and not isinstance(error, BackendError):
                identities.remove(path)
            raise

    def change(
        self, path: str, roles: Sequence[str] | None, teams: Sequence[str] | None, state: str | None
    ) -> dict[str, Any]:
        """Other roles or teams, or another state. UsageError ``principal.team`` for what is no team."""
        for team in teams or ():
            if not parse_principal(team).startswith("team/") or path.startswith("team/"):
                raise UsageError(
                    "principal.team",
                    f"{path} can't be in {team}: teams, team/NAME, have users and workloads in them",
                    hint=f"strongroom principal team {path} team/NAME",
                )
        old = self._room.custodian.known(path) if state == "removed" else self._there(path)
        # Only what is changed is said: of the rest this client knows what a server says.
        return self._change(path, old.entry, roles=roles, teams=teams, state=state)

    def key(self, path: str, public_key: str) -> dict[str, Any]:
        """Another key, in place of the one that is lost, or that somebody else may have."""
        _check(public_key, path)
        return self._change(path, self._there(path).entry, key=public_key)

    def bind(self, path: str, oidc: str | None, spiffe: str | None) -> dict[str, Any]:
        """Another name that an authority gives it, or none."""
        old = self._room.custodian.known(path)
        bound = subject_of(oidc, spiffe)
        return self._change(path, old.entry, subject=bound)

    def _there(self, path: str) -> AnyPrincipal:
        found = self._room.custodian.known(path)
        if found.state == "removed":
            hint = f"strongroom principal add {path} --public-key KEY, which brings the name back"
            raise Conflict("principal.removed", f"{path} was removed, for good", hint=hint)
        return found

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


def _check(public_key: str, path: str) -> None:
    if not _KEY.fullmatch(public_key):
        raise UsageError(
            "principal.public_key",
            f"{public_key!r:.80} is not a public key: 64 hexadecimal digits, in lower case",
            hint=f"on the machine of whoever it is for: strongroom identity new {path} shows it",
        )
