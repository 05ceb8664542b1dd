"""What policy is told of a room: principals, versions and circumstances, as the state has them."""

from __future__ import annotations

from typing import Any

from strongroom.policy.query import ROOM, Resource, Situation, Subject
from strongroom.policy.speaker import Speaker
from strongroom.policy.state import Principal, State

# How many may have one version, unless the log says otherwise: holders, plaintext copies, people who have such copies.
CEILINGS = (100, 5, 3)


def situation(state: State, who: Speaker, ref: str, now: int, **more: Any) -> Situation:
    """What policy may look at, with the counts of the version that leave `who` out."""
    uses = [use for use in state.uses.values() if use.ref == ref]
    others = [use for use in uses if use.holder != who.path]
    return Situation(
        now=now,
        holders=len(others),
        copies=sum(use.copies for use in uses),
        copiers=sum(use.copies > 0 for use in others),
        authentication=who.method,
        **more,
    )


def subject(who: Principal | Speaker) -> Subject:
    """The principal as policy sees it."""
    who = who.principal if isinstance(who, Speaker) else who
    return Subject(who.path, tuple(who.roles), tuple(who.teams), who.person, suspended=not who.active)


def resource(state: State, ref: str) -> Resource:
    """A version under its full reference, or `ROOM`, as policy sees it."""
    if ref == ROOM:
        return Resource.room()
    version = state.versions.get(ref)
    holders, copies, copiers = ceilings(state, ref)
    frozen = version.frozen if version else False
    return Resource(ref, max_holders=holders, max_copies=copies, max_copiers=copiers, frozen=frozen)


def ceilings(state: State, ref: str) -> tuple[int, int, int]:
    """How many may hold a version, copy it, and have copies of it: as set for it, for its name, or `CEILINGS`."""
    holders, copies, copiers = state.ceilings.get(ref) or state.ceilings.get(ref.partition("@")[0]) or CEILINGS
    return holders, copies, copiers
