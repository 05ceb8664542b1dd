"""A table of expected decisions, for ``strongroom policy test``: what a policy is meant to do, against what it does.

TOML. `subjects` are all who appear; each case is one action in one situation, and names those who are allowed:
everybody else in the table has to be refused, so that a rule which permits too much fails without anybody having
thought of it. ::

    [subjects]
    researcher = { roles = ["researcher"] }
    officer = { roles = ["officer"] }

    [[case]]
    name = "weights are loaded under a lease"
    action = "load"
    situation = { stage = "release", lease = true }     # fields of Situation; optional
    resource = { max_holders = 3 }                      # ref and fields of Resource; optional, `ref = "room"`: the room
    allow = ["researcher"]
    rules = { researcher = "release-under-lease", officer = "officers-never-load" }   # who decided; optional
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from strongroom.core.limits import MIB
from strongroom.errors import StrongroomError, UsageError
from strongroom.policy.engine import Policies
from strongroom.policy.query import ON_WEIGHTS, ROOM, Query, Resource, Situation, Subject

_TEXT_MAX = MIB
_NAME_MAX = 200
_CASES_MAX = 10_000
_SUBJECT = {"path", "roles", "teams", "person", "suspended"}
_CASE = {"name", "action", "situation", "resource", "allow", "rules"}
_SITUATION = {field.name for field in dataclasses.fields(Situation)}
_RESOURCE = {field.name for field in dataclasses.fields(Resource)}
_WEIGHTS = {"ref": "acme/tiny@1", "max_holders": 100, "max_copies": 5, "max_copiers": 3, "frozen": False}


@dataclass(frozen=True)
class Expectation:
    """One subject in one case. `rule`: one that has to be among those that decide, or empty."""

    case: str
    subject: str
    query: Query
    allowed: bool
    rule: str


@dataclass(frozen=True)
class Outcome:
    """What became of an expectation. `rules`: those that decided; none if nothing permits."""

    expectation: Expectation
    allowed: bool
    rules: tuple[str, ...]
    passed: bool

    def as_json(self) -> dict[str, Any]:
        expected = self.expectation
        return {
            "case": expected.case,
            "subject": expected.subject,
            "action": expected.query.action,
            "expected": expected.allowed,
            "allowed": self.allowed,
            "expected_rule": expected.rule,
            "rules": list(self.rules),
            "passed": self.passed,
        }


@dataclass(frozen=True)
class Table:
    """All expectations of a table, a case after the other."""

    expectations: tuple[Expectation, ...]

    @classmethod
    def parse(cls, text: str) -> Table:
        """UsageError ``table.malformed`` for whatever is not exactly such a table: a misspelt key would be a case that
        tests something else."""
        try:
            if len(text.encode()) > _TEXT_MAX:
                raise _malformed(f"it is larger than {_TEXT_MAX} bytes")
            value = tomllib.loads(text)
        except (ValueError, RecursionError) as error:
            raise _malformed(str(error)[:_NAME_MAX] or "it is nested too deeply") from None
        _keys(value, {"subjects", "case"}, "the table")
        subjects = {name: _subject(name, each) for name, each in _table(value.get("subjects"), "subjects").items()}
        cases = value.get("case")
        if not subjects or not isinstance(cases, list) or not 0 < len(cases) <= _CASES_MAX:
            raise _malformed("it has [subjects] and at least one [[case]]")
        return cls(tuple(each for number, case in enumerate(cases, 1) for each in _case(number, case, subjects)))

    def run(self, policies: Policies) -> list[Outcome]:
        """Decide everything; an expectation fails on the wrong decision, and on the right one by another rule."""
        outcomes = []
        for each in self.expectations:
            decision = policies.decide(each.query)
            passed = decision.allowed == each.allowed and (not each.rule or each.rule in decision.rules)
            outcomes.append(Outcome(each, decision.allowed, decision.rules, passed))
        return outcomes


def _subject(name: str, value: Any) -> Subject:
    what = f"the subject {name!r:.80}"
    given = _table(value, what)
    _keys(given, _SUBJECT, what)
    path = given.get("path", f"user/{name}")
    try:
        return Subject(
            path,
            _strings(given.get("roles", []), what),
            _strings(given.get("teams", []), what),
            given.get("person", path),
            given.get("suspended", False),
        )
    except StrongroomError as error:
        raise _malformed(f"{what}: {error.message}") from None


def _case(number: int, value: Any, subjects: Mapping[str, Subject]) -> list[Expectation]:
    case = _table(value, f"case {number}")
    name = case.get("name", f"case {number}")
    if not isinstance(name, str) or not name.isprintable() or len(name) > _NAME_MAX:
        raise _malformed(f"the name of case {number} is one line")
    _keys(case, _CASE, name)
    if "action" not in case or "allow" not in case:
        raise _malformed(f"{name}: a case has an action, and says whom it allows")
    allow = _strings(case["allow"], name)
    rules = _table(case.get("rules", {}), name)
    if strangers := (set(allow) | set(rules)) - set(subjects):
        raise _malformed(f"{name}: {min(strangers)!r:.80} is not among the subjects")
    _strings(list(rules.values()), name)
    situation = _table(case.get("situation", {}), name)
    _keys(situation, _SITUATION, name)
    try:
        resource = _resource(name, case["action"], _table(case.get("resource", {}), name))
        return [
            Expectation(
                name,
                who,
                Query(subject, case["action"], resource, Situation(**situation)),
                who in allow,
                rules.get(who, ""),
            )
            for who, subject in subjects.items()
        ]
    except StrongroomError as error:
        raise _malformed(f"{name}: {error.message}") from None


def _resource(name: str, action: Any, given: dict[str, Any]) -> Resource:
    """What the case says; else some weights, which every action takes."""
    _keys(given, _RESOURCE, name)
    if given.get("ref") == ROOM:
        if len(given) > 1 or action in ON_WEIGHTS:
            raise _malformed(f"{name}: the room has no ceilings, and is not loaded")
        return Resource.room()
    return Resource(**{**_WEIGHTS, **given})


def _table(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _malformed(f"{what}: a table was expected")
    return value


def _keys(value: dict[str, Any], known: set[str], what: str) -> None:
    if unknown := set(value) - known:
        raise _malformed(f"{what}: unknown key {min(unknown)!r:.80}; known: {', '.join(sorted(known))}")


def _strings(value: Any, what: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise _malformed(f"{what}: a list of texts was expected")
    return tuple(value)


def _malformed(message: str) -> UsageError:
    return UsageError("table.malformed", f"the table of decisions: {message}", hint="strongroom policy test --explain")
