"""Who can do what: for each principal, action and resource the answer of the engine, and the path that grants it.

As explain, it asks the engine and reads no policy text, so a review sees what would be decided.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import Any

from strongroom.policy.engine import Decision, Policies
from strongroom.policy.explain import what_is_missing
from strongroom.policy.query import (
    ACTIONS,
    FEATURES,
    LEASED,
    NAMED,
    ON_WEIGHTS,
    Query,
    Resource,
    Situation,
    Subject,
)

NOW, APPROVALS, BREAK_GLASS, NEVER = "now", "approvals", "break-glass", "never"
_NO_LEASES: frozenset[tuple[str, str, str]] = frozenset()


@dataclass(frozen=True)
class Access:
    """What one principal can do. `state`: now; approvals (see `needs`); break-glass (alone, by calling it an
    emergency); never. `path`: from the principal over the role or team that matters to the rule, for example
    ``("user/ana", "role/researcher", "release-under-lease")``; of what is never allowed the rule that forbids it, if
    any."""

    principal: str
    action: str
    ref: str
    state: str
    needs: tuple[str, ...]
    path: tuple[str, ...]

    @property
    def answer(self) -> str:
        """The state for people, with what it needs."""
        if self.state == APPROVALS:
            return f"with approvals: {' and '.join(self.needs)}"
        return "by breaking the glass" if self.state == BREAK_GLASS else self.state

    def as_json(self) -> dict[str, Any]:
        return {
            "principal": self.principal,
            "action": self.action,
            "ref": self.ref,
            "state": self.state,
            "answer": self.answer,
            "needs": list(self.needs),
            "path": list(self.path),
        }


def who(
    policies: Policies,
    resource: Resource,
    subjects: Iterable[Subject],
    *,
    situation: Situation | None = None,
    leases: AbstractSet[tuple[str, str, str]] = _NO_LEASES,
) -> list[Access]:
    """For each of `subjects` and each action on `resource`. See `access` for `situation` and `leases`."""
    return [
        access(policies, subject, action, resource, situation=situation, leases=leases)
        for subject in subjects
        for action in _actions(resource)
    ]


def reach(
    policies: Policies,
    subject: Subject,
    resources: Iterable[Resource],
    *,
    situation: Situation | None = None,
    leases: AbstractSet[tuple[str, str, str]] = _NO_LEASES,
) -> list[Access]:
    """For each of `resources` (`Resource.room()` among them, if wanted) and each action that it takes."""
    return [
        access(policies, subject, action, resource, situation=situation, leases=leases)
        for resource in resources
        for action in _actions(resource)
    ]


def access(
    policies: Policies,
    subject: Subject,
    action: str,
    resource: Resource,
    *,
    situation: Situation | None = None,
    leases: AbstractSet[tuple[str, str, str]] = _NO_LEASES,
) -> Access:
    """One answer. `situation`: time and counts to judge with; its stage, lease and emergency are set here. `leases`:
    those that hold, as (principal, action, ref)."""
    release = action in LEASED and not resource.is_room
    here = replace(
        situation or Situation(),
        stage="release" if release else "direct",
        lease=(subject.path, action, resource.ref) in leases,
        break_glass=False,
    )
    query = Query(subject, action, resource, here)

    def found(state: str, needs: tuple[str, ...], path: tuple[str, ...]) -> Access:
        return Access(subject.path, action, resource.ref, state, needs, path)

    if action in NAMED and not policies.permits(action):  # the usual case: nothing to look for
        return found(NEVER, (), (subject.path,))
    if action in FEATURES:
        # As the gateway asks: what forbids inference, and may not name these, forbids them.
        first = policies.decide(replace(query, action="infer"))
        if not first.allowed:
            return found(NEVER, (), (subject.path, *first.rules[:1]))
    decision = policies.decide(query)
    if decision.allowed:
        return found(NOW, (), _path(policies, query, decision))
    # Before approvals: a review has to see what somebody can do alone.
    emergency = replace(query, situation=replace(here, break_glass=True))
    alone = policies.decide(emergency)
    if alone.allowed:
        return found(BREAK_GLASS, (), _path(policies, emergency, alone))
    if not decision.rules and (missing := what_is_missing(policies, query)) is not None:
        leased = replace(query, situation=replace(here, lease=here.lease or missing.lease))
        path = _path(policies, leased, Decision(allowed=True, rules=missing.rules, errors=(), reason=""))
        return found(APPROVALS, missing.needs(query), path)
    return found(NEVER, (), (subject.path, *decision.rules[:1]))


def _actions(resource: Resource) -> list[str]:
    return [action for action in ACTIONS if not (resource.is_room and action in ON_WEIGHTS)]


def _path(policies: Policies, query: Query, decision: Decision) -> tuple[str, ...]:
    """Principal, the one role or team that would do by itself (several: all of them), rule."""
    subject = query.subject
    rule = decision.rules[0]
    alone = [(f"role/{role}", replace(subject, roles=(role,), teams=())) for role in subject.roles]
    alone += [(team, replace(subject, roles=(), teams=(team,))) for team in subject.teams]
    nothing = policies.decide(replace(query, subject=replace(subject, roles=(), teams=())))
    if rule in nothing.rules:
        return (subject.path, rule)  # the rule names the principal, or everybody
    for name, reduced in alone:
        if rule in policies.decide(replace(query, subject=reduced)).rules:
            return (subject.path, name, rule)
    return (subject.path, *(name for name, _ in alone), rule)
