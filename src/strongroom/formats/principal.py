"""Records of principals, as entries of the log have them: whose approval counts, and which changes take a second person
(spec/ledger.md, section 4). Custodian and verifier ask the same here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from strongroom.errors import UsageError

RANKS = ("executive", "officer", "operator")  # whose approvals count
TOGETHER = 3  # people who may grant, from which on one of them alone may not: before, a room is being set up
_GRANTERS = {"officer", "executive"}


class Record(Protocol):
    """What a principal is."""

    @property
    def key(self) -> str: ...
    @property
    def person(self) -> str: ...
    @property
    def roles(self) -> Sequence[str]: ...
    @property
    def teams(self) -> Sequence[str]: ...
    @property
    def state(self) -> str: ...
    @property
    def subject(self) -> str: ...
    @property
    def active(self) -> bool: ...


def resolved(before: Record | None, body: Mapping[str, Any]) -> dict[str, Any]:
    """The record that a signed change makes of the one `before`: what it leaves open (null) stays as it was, so that
    nobody signs what somebody else has said of it. UsageError ``principal.new`` for a new one that is not whole."""
    whole = {"principal": body["principal"]}
    for name in ("key", "person", "roles", "teams", "state", "subject"):
        value = body.get(name, "")
        if value is None:
            if before is None:
                raise UsageError("principal.new", f"{body['principal']} is new, and nothing of it can stay as it was")
            value = getattr(before, name)
        if value or name != "subject":
            whole[name] = list(value) if name in ("roles", "teams") else value
    return whole


def reinstated(before: Record | None, body: Mapping[str, Any]) -> dict[str, Any]:
    """The record that recovery shares make of the one `before` (section 11): active, with one role more, and with
    another key if there is one. Nothing else of it is theirs to change."""
    path = body["principal"]
    whole = {"principal": path, "key": body["key"], "person": path, "roles": [body["role"]], "teams": []}
    if before is not None:
        whole |= {"key": body["key"] or before.key, "person": before.person, "teams": list(before.teams)}
        whole["roles"] = sorted({*before.roles, body["role"]})
    bound = before.subject if before is not None else ""
    return {**whole, "state": "active"} | ({"subject": bound} if bound else {})


def grants(path: str, key: str, roles: Sequence[str]) -> bool:
    """Whether an active principal may bring others in. Who has no key of its own speaks on an authority's word, which
    is not enough for that; and a team does not speak."""
    return bool(key) and not path.startswith("team/") and bool(_GRANTERS & set(roles))


def gains(before: Record | None, body: Mapping[str, Any]) -> bool:
    """Whether a change gives rights that there were not: a role, a team, an end of suspension, another person's
    approvals. Nobody gives these to themselves."""
    if before is None:
        return bool(body["roles"] or body["teams"])
    gained = {*body["roles"], *body["teams"]} - {*before.roles, *before.teams}
    revived = not before.active and body["state"] == "active"
    return bool(gained) or revived or before.person != body["person"]


def weighty(before: Record | None, body: Mapping[str, Any]) -> bool:
    """Whether a change makes, or makes over, somebody whose approval counts: what one person alone must not do, or
    that person could invent the others. Taking rights away is never held up."""
    ranked = set(RANKS) & set(body["roles"])
    if body["state"] != "active" or not ranked:
        return False
    if before is None or not before.active:
        return True
    held = (before.key, before.person, before.subject)
    return bool(ranked - set(before.roles)) or held != (body["key"], body["person"], body.get("subject", ""))
