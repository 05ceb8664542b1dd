"""Records of principals, as entries of the log have them: whose approval counts, and which changes take a second person
(spec/ledger.md, section 4). Custodian and verifier ask the same here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

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
    def subject(self) -> str: ...
    @property
    def active(self) -> bool: ...


def grants(path: str, key: str, roles: Sequence[str]) -> bool:
    """Whether an active principal may bring others in. Who has no key of its own speaks on an authority's word, which
    is not enough for that; and a team does not speak."""
    return bool(key) and not path.startswith("team/") and bool(_GRANTERS & set(roles))


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
