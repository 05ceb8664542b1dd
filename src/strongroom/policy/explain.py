"""Why a query is denied, and what would change that: for people, and as JSON.

What is missing is found by asking the engine about hypothetical situations (more approvals, a lease, a role), never by
reading policy text: so an explanation can't say what the policy does not. It takes for granted that approvals and
leases don't hurt; under a policy where they do, it may say "never" too early, and that is all.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations_with_replacement
from typing import Any

from strongroom.errors import Denied, UsageError
from strongroom.policy.engine import POLICY_ERROR, Policies
from strongroom.policy.query import ALONE, RELEASES, ROLES, ROOM, Query, Resource, Situation, Subject

_MORE_MAX = 5  # approvals beyond those there are; a policy that asks for more is explained as "never"
_ALTERNATIVES_MAX = 3
_COUNTED = ("operator", "officer", "executive")  # from the one whose approval is cheapest to the dearest
_ANYBODY = ""  # somebody who may approve, and is counted in the total only
_FIELDS = {"operator": "operators", "officer": "officers", "executive": "executives"}
_SOME_WEIGHTS = Resource("some/weights@1", 100, 100, 100, frozen=False)  # no rule names them
_SOMEBODY = "user/somebody-else"  # the hypothetical approver: no rule names it


@dataclass(frozen=True)
class Missing:
    """What would turn a denial into an allow. `combinations`: of approvals, each the roles of those who give them, the
    smallest number of people, the cheapest first; empty if none are needed."""

    lease: bool
    combinations: tuple[tuple[str, ...], ...]
    rules: tuple[str, ...]  # which would permit it then

    def needs(self, query: Query) -> tuple[str, ...]:
        """For people, one entry a thing."""
        lease = (f"a lease to {query.action} {query.resource.ref}",) if self.lease else ()
        return lease + ((_approvals(self.combinations),) if self.combinations else ())


@dataclass(frozen=True)
class Explanation:
    """`rule`: the first that forbids (or permits), else ``default``; `rules`: all of them.

    `needs`: what others can give to make it allowed, approvals and a lease; empty if that would not help. `roles`: with
    which further role (and what it asks for then) it would be allowed; looked for only where `needs` is empty. That it
    should be taken is advised (`hint`) only of one that goes with those that there are.
    """

    query: Query
    allowed: bool
    rule: str
    rules: tuple[str, ...]
    message: str
    needs: tuple[str, ...]
    roles: tuple[str, ...]
    hint: str
    errors: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return {
            "allowed": self.allowed,
            "rule": self.rule,
            "rules": list(self.rules),
            "message": self.message,
            "needs": list(self.needs),
            "roles": list(self.roles),
            "hint": self.hint,
            "principal": self.query.subject.path,
            "action": self.query.action,
            "ref": self.query.resource.ref,
        }

    def denied(self) -> Denied:
        """The error to raise: ``denied.rule`` where a rule forbids, ``denied.default`` where none permits."""
        if self.allowed:
            raise UsageError("policy.allowed", f"{self.message}: there is no denial to raise")
        code = "denied.default" if self.rule == "default" else "denied.rule"
        evidence = {name: value for name, value in self.as_json().items() if name not in ("allowed", "message", "hint")}
        return Denied(code, self.message, hint=self.hint, **evidence)


def explain(policies: Policies, query: Query, *, act: str = "", about: str = "") -> Explanation:
    """What decides `query`, and if it is denied what is missing. It costs some dozens of decisions where nothing
    permits, and one where a rule forbids. `act`: what it was asked for, if that is another word than the action's
    (renew, revoke); `about`: the identifier of the request."""
    decision = policies.decide(query)
    what = f"{query.subject.path} may {{}}{act or query.action} {_about(query)}"
    if decision.rules:
        rule = decision.rules[0]
        message = f"{what.format('' if decision.allowed else 'not ')}: {decision.reason} (rule {rule})"
        hint = "" if decision.allowed else _filled(_asking(policies, decision.rules), query, act, about)
        return Explanation(query, decision.allowed, rule, decision.rules, message, (), (), hint, errors=decision.errors)
    missing = what_is_missing(policies, query)
    if missing is not None:
        needs = missing.needs(query)
        message = f"{what.format('not ')} yet: it needs {' and '.join(needs)}"
        return Explanation(query, False, "default", (), message, needs, (), _request(query))
    roles = which_roles(policies, query)
    if roles:
        message = f"{what.format('not ')}: that takes the role {' or '.join(roles)}"
        return Explanation(query, False, "default", (), message, (), roles, _further(policies, query, roles))
    message = f"{what.format('not ')}: no rule permits it, whatever lease, approvals or roles there are"
    return Explanation(query, False, "default", (), message, (), (), f"strongroom reach {query.subject.path}")


def what_is_missing(policies: Policies, query: Query) -> Missing | None:
    """The lease and the fewest approvals with which a denied query would be allowed; None if none would do."""
    kinds = _approvers(policies, query)
    for lease in (False, True) if not query.situation.lease else (False,):
        # A lease is what keys are released under: to be given one, or for anything else, it is no help.
        if lease and query.situation.stage != "release":
            continue
        asked = _with(query, lease=query.situation.lease or lease)
        if lease and (decision := policies.decide(asked)).allowed:
            # Can the lease be had? It takes approvals of its own, decided in stage "grant".
            grant = _with(query, stage="grant", break_glass=False)
            if policies.decide(grant).allowed:
                return Missing(True, (), decision.rules)
            found = _fewest(policies, grant, kinds)
            return Missing(True, found, decision.rules) if found else None
        if found := _fewest(policies, asked, kinds):
            return Missing(lease, found, policies.decide(_approved(asked, found[0])).rules)
    return None


def which_roles(policies: Policies, query: Query) -> tuple[str, ...]:
    """With which one further role the query would be allowed, given all approvals and the lease that it asks for."""
    found = []
    kinds = _approvers(policies, query)
    for role in dict.fromkeys((*ROLES, *policies.roles)):
        if role in query.subject.roles:
            continue
        subject = replace(query.subject, roles=(*query.subject.roles, role))
        given = replace(query, subject=subject)
        if any(policies.decide(each).allowed for each in _generous(given, kinds)):
            found.append(role)
    return tuple(found)


def _further(policies: Policies, query: Query, roles: tuple[str, ...]) -> str:
    """Advice on how to come by one of `roles`: for somebody else, where none goes with what the principal has."""
    mine = query.subject.roles
    fitting = next((role for role in roles if _goes_with(policies, query, role)), None)
    if fitting is not None:
        return f"{_granter(policies)} runs: strongroom principal role {query.subject.path} {' '.join((*mine, fitting))}"
    new = "workload/NAME" if roles[0] in ALONE else "user/NAME"
    return (
        f"{roles[0]} does not go with {', '.join(mine)}: let another principal do it; if nobody has that role, "
        f"{_granter(policies)} runs: strongroom principal add {new} --role {roles[0]} --public-key KEY"
    )


def _goes_with(policies: Policies, query: Query, role: str) -> bool:
    """Whether `role` takes nothing from the principal that its other roles are for: by the policy an auditor, or a
    gateway, holds no weights, whatever else it is. And a gateway is nothing else."""
    before = query.subject
    if not before.roles:
        return True
    if role in ALONE or not set(ALONE).isdisjoint(before.roles):
        return False
    after = replace(before, roles=(*before.roles, role))
    about = _SOME_WEIGHTS if query.resource.is_room else query.resource
    given = _approved(_with(query, stage="grant"), (*_COUNTED, _ANYBODY) * _MORE_MAX).situation
    return not any(
        policies.decide(Query(before, action, about, given)).allowed
        and not policies.decide(Query(after, action, about, given)).allowed
        for action in RELEASES
    )


def _generous(query: Query, kinds: list[str]) -> Iterator[Query]:
    """The query as it is, and with everything that others could give."""
    yield query
    everything = _approved(query, kinds * _MORE_MAX)
    yield everything
    if query.situation.stage == "release":
        yield _with(everything, lease=True)


def _approvers(policies: Policies, query: Query) -> list[str]:
    """The roles whose holders may approve this; `_ANYBODY` stands for those that only count in the total."""
    kinds = dict.fromkeys(role if role in _COUNTED else _ANYBODY for role in _may_approve(policies, query))
    return [kind for kind in (_ANYBODY, *_COUNTED) if kind in kinds]


def _may_approve(policies: Policies, query: Query) -> Iterator[str]:
    situation = Situation(now=query.situation.now, asked=query.action)
    for role in dict.fromkeys((*ROLES, *policies.roles)):
        approver = Subject(_SOMEBODY, (role,), (), _SOMEBODY, suspended=False)
        if policies.decide(Query(approver, "approve", query.resource, situation)).allowed:
            yield role


def _fewest(policies: Policies, query: Query, kinds: list[str]) -> tuple[tuple[str, ...], ...]:
    """All combinations of approvals that would do, of the smallest number of people; empty if none would."""
    if not kinds:
        return ()
    # One question first: a denial that no approval changes is the usual one, and must not cost a hundred.
    if not policies.decide(_approved(query, kinds * _MORE_MAX)).allowed:
        return ()
    for people in range(1, _MORE_MAX + 1):
        found = tuple(
            combination
            for combination in combinations_with_replacement(kinds, people)
            if policies.decide(_approved(query, combination)).allowed
        )
        if found:
            return found
    return ()


def _approved(query: Query, more: tuple[str, ...] | list[str]) -> Query:
    """The query with approvals of people of these roles on top of those it has."""
    situation = query.situation
    counts = {_FIELDS[kind]: getattr(situation, _FIELDS[kind]) + more.count(kind) for kind in _COUNTED}
    return _with(query, approvals=situation.approvals + len(more), **counts)


def _with(query: Query, **changes: Any) -> Query:
    return replace(query, situation=replace(query.situation, **changes))


def _approvals(combinations: tuple[tuple[str, ...], ...]) -> str:
    """For example: 2 more approvals by others (officer and executive, or 2 executives)."""
    people = len(combinations[0])
    if set(combinations[0]) == {_ANYBODY}:
        who = ""  # it does not matter who
    else:
        shown = [_people(each) for each in combinations[:_ALTERNATIVES_MAX]]
        more = ", or others" if len(combinations) > _ALTERNATIVES_MAX else ""
        who = f" ({', or '.join(shown)}{more})"
    return f"{people} more approval{'s' if people > 1 else ''} by others{who}"


def _people(kinds: tuple[str, ...]) -> str:
    counted = Counter(kind or "other approver" for kind in kinds)
    return " and ".join(kind if count == 1 else f"{count} {kind}s" for kind, count in counted.items())


def _about(query: Query) -> str:
    return "in this room" if query.resource.is_room else query.resource.ref


def _asking(policies: Policies, rules: tuple[str, ...]) -> str:
    if rules[0] == POLICY_ERROR:
        return "strongroom policy check FILE; until it is mended nothing that the rule is about is allowed"
    return policies.rules[rules[0]].ask or f"strongroom policy show {rules[0]}"


def _filled(hint: str, query: Query, act: str, about: str) -> str:
    """What a policy advises, with the names that it could not know."""
    if about:
        command = f"strongroom {act or 'approve'} {about}" + (" --reason TEXT" if act in ("deny", "revoke") else "")
        hint = re.sub(r"strongroom approve ID\b", command, hint)
    return hint if query.resource.is_room else re.sub(r"\bREF\b", query.resource.ref, hint)


def _granter(policies: Policies) -> str:
    """An officer or executive: who, by the policy, may give roles to others."""
    asked = Situation()
    roles = [
        role
        for role in dict.fromkeys((*ROLES, *policies.roles))
        if policies.decide(
            Query(Subject(_SOMEBODY, (role,), (), _SOMEBODY, suspended=False), "grant", Resource.room(), asked)
        ).allowed
    ]
    if not roles:
        return "somebody who may grant"
    return f"{'an' if roles[0][0] in 'aeiou' else 'a'} {' or '.join(roles)}"


def either(refusals: Sequence[Denied]) -> Denied:
    """One refusal of what any of several rights would do for, in place of one that names the first only."""
    first = refusals[0]
    each = [refusal.evidence for refusal in refusals]
    roles = list(dict.fromkeys(role for one in each for role in one["roles"]))
    if len(refusals) == 1 or not all(one["roles"] for one in each):
        return first
    actions = " or ".join(one["action"] for one in each)
    where = "in this room" if first.evidence["ref"] == ROOM else first.evidence["ref"]
    message = f"{first.evidence['principal']} may not {actions} {where}: that takes the role {' or '.join(roles)}"
    return Denied(first.code, message, hint=first.hint, **{**first.evidence, "roles": roles})


def _request(query: Query) -> str:
    """The next command: of the one who asks, or in stage "grant" of those who approve."""
    if query.situation.stage == "grant":
        return "they run: strongroom approve ID (strongroom requests lists the IDs)"
    if query.action in (*RELEASES, "trace") and not query.resource.is_room:
        return (
            f"strongroom request {query.resource.ref} --action {query.action} --for {query.subject.path} "
            "--duration 8h --reason TEXT"
        )
    return "strongroom requests"
