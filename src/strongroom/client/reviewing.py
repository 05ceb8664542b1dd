"""A review, and what is taken away by it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from strongroom.client.anyroom import AnyCustodian


class _Revoke(Protocol):
    def __call__(self, target: str, *, reason: str) -> dict[str, Any]: ...


class _Act(Protocol):
    def __call__(self, kind: str, body: dict[str, Any]) -> dict[str, Any]: ...


def review(custodian: AnyCustodian, who: str, revoke: _Revoke, act: _Act, *, apply: bool) -> dict[str, Any]:
    """See `Room.review`; `revoke` and `act` say and do things as `who`."""
    if not apply:
        custodian.authorise(who, "audit", "administer")
        return custodian.review().as_json()
    custodian.authorise(who, "administer")
    found = custodian.review()
    removed = sorted({each.removes for each in found.findings if each.removes and each.removes != who})
    for target in removed:
        revoke(target, reason="review: unused or left over")
    # What has come after it was made, nobody has looked at.
    body = {"size": found.size, "findings": len(found.findings), "removed": len(removed)}
    entry = act("review", body)["entry"]
    left = custodian.review().emergencies if found.emergencies else []
    reviewed = [each for each in found.emergencies if each not in left]
    return {**found.as_json(), "removed": removed, "reviewed": reviewed, "left": left, "entry": entry}
