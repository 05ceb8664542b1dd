"""The engine: a parsed and validated set of Cedar policies, and its decision about a query.

Nothing here reads a clock, a database or the network: the same query has the same decision for ever, so decisions can
be tested and replayed. Policies and schema are parsed once: with 200 policies that is 30 to 40 times as many decisions
a second as passing the text each time.

Cedar skips a policy whose condition errs (docs.cedarpolicy.com/auth/authorization.html), so a `forbid` that errs
forbids nothing. Hence nothing is allowed here unless Cedar says Allow and no policy erred.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, lru_cache
from importlib.resources import files
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from strongroom.errors import UsageError
from strongroom.policy.query import (
    ACTIONS,
    NAMED,
    ON_WEIGHTS,
    RELEASES,
    ROLES,
    ROOM,
    Query,
    Resource,
    Situation,
    Subject,
)
from strongroom.policy.text import Statement, invalid, statements

if TYPE_CHECKING:
    import cedarpy

__all__ = [
    "ACTIONS",
    "ON_WEIGHTS",
    "POLICY_ERROR",
    "RELEASES",
    "ROLES",
    "ROOM",
    "SHIPPED",
    "Decision",
    "Policies",
    "Query",
    "Resource",
    "Rule",
    "Situation",
    "Subject",
]

SHIPPED = ("team", "solo")
POLICY_ERROR = "policy-error"  # what is named as the rule when no decision could be made
_RESERVED = (POLICY_ERROR, "default")
_ID = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*", re.ASCII)
_ID_MAX = 64
_ANNOTATION_MAX = 300
_PROBLEMS_MAX = 20
_NOTHING_PERMITS = "no rule permits it"


@dataclass(frozen=True)
class Rule:
    """One policy. `reason` and `ask` are what its author wrote for people; `effect` is permit or forbid."""

    id: str
    effect: str
    reason: str
    ask: str
    line: int


@dataclass(frozen=True)
class Decision:
    """`rules` determined it: the permits that allow, the forbids that deny, none if nothing permits, and first of all
    ``policy-error`` if a policy could not be evaluated (`errors`), which always denies."""

    allowed: bool
    rules: tuple[str, ...]
    errors: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class Policies:
    """A set of policies that is valid under the schema. Equal if the text is; safe to share between threads."""

    text: str
    digest: str = field(compare=False)
    rules: Mapping[str, Rule] = field(compare=False, repr=False)
    roles: tuple[str, ...] = field(compare=False)
    _scoped: Mapping[str, tuple[Statement, frozenset[str]]] = field(compare=False, repr=False)  # @id: text, actions
    _slices: dict[str, _Slice] = field(compare=False, repr=False)  # by action, each parsed when it is first asked for

    @classmethod
    def parse(cls, text: str) -> Policies:
        """Parse and validate; the same text again costs nothing. UsageError ``policy.invalid`` for anything that is not
        a valid set of policies, each with an @id of its own; the evidence has the `line`, and the `problems` that Cedar
        found."""
        return _parsed(text)

    @classmethod
    def _of(cls, text: str) -> Policies:
        found = statements(text)
        import cedarpy

        try:
            cedarpy.PolicySet.from_str(text)
            structure = json.loads(cedarpy.policies_to_json_str(text))
        except (ValueError, RecursionError) as error:
            line = _first_bad(found)
            raise invalid(f"line {line}: {str(error)[:_ANNOTATION_MAX]}", line=line) from None
        if structure["templates"]:
            raise invalid("a template (?principal, ?resource) permits and forbids nothing; write the policy out")
        if not found or len(found) != len(structure["staticPolicies"]):
            raise invalid("the text has no policy" if not found else "the policies can't be told from each other")
        names, rules = _rules(structure["staticPolicies"], found)
        _validate(text, names, rules)
        digest = hashlib.sha256(text.encode()).hexdigest()
        roles = tuple(sorted(_role_names(structure)))
        scoped = {
            names[f"policy{number}"]: (statement, _actions(structure["staticPolicies"][f"policy{number}"]))
            for number, statement in enumerate(found)
        }
        return cls(text, digest, MappingProxyType(rules), roles, MappingProxyType(scoped), {})

    @classmethod
    def shipped(cls, name: str) -> Policies:
        """One of `SHIPPED`. UsageError ``policy.unknown``."""
        if name not in SHIPPED:
            raise UsageError("policy.unknown", f"{name!r:.80} is not a shipped policy; there are {', '.join(SHIPPED)}")
        return _shipped(name)

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(self.rules)

    def permits(self, action: str) -> bool:
        """Whether there is a rule that could permit this action, to anybody, under whatever circumstances."""
        return any(action in named and self.rules[name].effect == "permit" for name, (_, named) in self._scoped.items())

    def decide(self, query: Query) -> Decision:
        """Allow or deny; it never raises, and never allows when anything is unclear."""
        try:
            return self._decide(query)
        except Exception as error:  # noqa: BLE001 - whatever it is: no decision, so no permission
            return _unclear(f"{type(error).__name__}: {error}")
        except BaseException as error:
            # A panic of Cedar's arrives as a BaseException of its own; what interrupts the program goes on doing so.
            if type(error).__name__ != "PanicException":
                raise
            return _unclear(f"{type(error).__name__}: {error}")

    def _decide(self, query: Query) -> Decision:
        import cedarpy

        # The schema checks the request as well: a context that lacks an attribute is refused as a whole, before any
        # rule could err on it.
        entities = _entities(query.subject, query.resource)
        slice_ = self._slice(query.action)
        result = cedarpy.is_authorized(query.request(), slice_.parsed, entities, _schema())
        errors = tuple(slice_.named(error) for error in result.diagnostics.errors)
        rules = tuple(sorted((slice_.names[name] for name in result.diagnostics.reasons), key=self.ids.index))
        reason = "; ".join(self.rules[rule].reason or rule for rule in rules)
        if errors or result.decision is cedarpy.Decision.NoDecision:
            denying = tuple(rule for rule in rules if self.rules[rule].effect == "forbid")
            return Decision(
                allowed=False,
                rules=(POLICY_ERROR, *denying),
                errors=errors,
                reason="a policy could not be evaluated, so nothing is allowed",
            )
        if result.decision is not cedarpy.Decision.Allow:
            return Decision(allowed=False, rules=rules, errors=(), reason=reason or _NOTHING_PERMITS)
        if not rules or any(self.rules[rule].effect != "permit" for rule in rules):
            return _unclear("Cedar allowed it without a permit")
        return Decision(allowed=True, rules=rules, errors=(), reason=reason)

    def _slice(self, action: str) -> _Slice:
        """The policies whose scope has this action: no other can have a part in the decision, and with hundreds of them
        looking at each takes longer than all else."""
        found = self._slices.get(action)
        if found is None:
            import cedarpy

            ids = [name for name, (_, actions) in self._scoped.items() if action in actions]
            text = "\n".join(self._scoped[name][0].text for name in ids)
            names = {f"policy{number}": name for number, name in enumerate(ids)}
            found = self._slices[action] = _Slice(cedarpy.PolicySet.from_str(text), names)
        return found


@dataclass(frozen=True)
class _Slice:
    """Some of the policies, parsed; `names` from Cedar's own policy0, policy1, … to the @id."""

    parsed: cedarpy.PolicySet
    names: Mapping[str, str]

    def named(self, error: str) -> str:
        return re.sub("`(policy[0-9]+)`", lambda match: f"`{self.names.get(match[1], match[1])}`", error)


def _unclear(error: str) -> Decision:
    return Decision(
        allowed=False,
        rules=(POLICY_ERROR,),
        errors=(error[:_ANNOTATION_MAX],),
        reason="no decision could be made, so nothing is allowed",
    )


def _rules(structure: dict[str, Any], found: list[Statement]) -> tuple[dict[str, str], dict[str, Rule]]:
    """The @id of each of Cedar's policies, which it numbers in the order of the text; and the rules by their @id."""
    names: dict[str, str] = {}
    rules: dict[str, Rule] = {}
    for number, statement in enumerate(found):
        policy = structure[f"policy{number}"]
        notes = {name: value or "" for name, value in policy.get("annotations", {}).items()}
        name, line = notes.get("id", ""), statement.line
        if not _ID.fullmatch(name) or len(name) > _ID_MAX or name in _RESERVED:
            raise invalid(
                f"line {line}: the policy has no @id, or one that is not a short-name-like-this: {name!r:.80}",
                line=line,
                hint='put @id("what-it-is-about") before it: decisions and the log name it',
            )
        if name in rules:
            raise invalid(f'line {line}: @id("{name}") is that of line {rules[name].line} already', line=line)
        for key in ("reason", "ask"):
            # They go to terminals and into the log.
            if len(notes.get(key, "")) > _ANNOTATION_MAX or not notes.get(key, "").isprintable():
                raise invalid(f"line {line}: @{key} is one line of at most {_ANNOTATION_MAX} characters", line=line)
        names[f"policy{number}"] = name
        rules[name] = Rule(name, policy["effect"], notes.get("reason", ""), notes.get("ask", ""), line)
    return names, rules


def _actions(policy: Mapping[str, Any]) -> frozenset[str]:
    """The actions of a policy's scope. The schema has no groups of actions: `in` is one of a list. Who permitted
    everything did not mean what did not exist then: the features of inference, and `relay`, have to be named."""
    scope = policy["action"]
    if scope["op"] == "All":
        return frozenset(ACTIONS) - (frozenset(NAMED) if policy["effect"] == "permit" else frozenset())
    return frozenset(entity["id"] for entity in scope.get("entities", [scope.get("entity")]))


def _validate(text: str, names: Mapping[str, str], rules: Mapping[str, Rule]) -> None:
    import cedarpy

    result = cedarpy.validate_policies(text, _schema())
    if result.validation_passed and not result.errors:
        return
    problems = []
    for error in result.errors[:_PROBLEMS_MAX]:
        rule = rules.get(names.get(error.policy_id, ""))
        problem = error.error.removeprefix(f"for policy `{error.policy_id}`, ")[:_ANNOTATION_MAX]
        problems.append({"rule": rule.id if rule else "", "line": rule.line if rule else 0, "problem": problem})
    # Cedar reports in no particular order.
    problems.sort(key=lambda each: (each["line"], each["problem"]))
    first = problems[0] if problems else {"rule": "", "line": 0, "problem": "Cedar does not say why"}
    raise invalid(
        f"line {first['line']}: {first['rule']}: {first['problem']}",
        line=first["line"],
        rule=first["rule"],
        problems=problems,
    )


def _first_bad(found: list[Statement]) -> int:
    """The line of the first statement that does not parse by itself: Cedar's errors have no position."""
    import cedarpy

    for statement in found:
        try:
            cedarpy.PolicySet.from_str(statement.text)
        except ValueError:
            return statement.line
    return found[-1].line if found else 1


def _role_names(value: Any) -> set[str]:
    """The roles that the policies speak of."""
    if isinstance(value, list):
        return set().union(*map(_role_names, value))
    if not isinstance(value, dict):
        return set()
    if value.get("type") == "Strongroom::Role" and isinstance(value.get("id"), str):
        return {value["id"]}
    return set().union(*map(_role_names, value.values()))


def _read(name: str) -> str:
    return files("strongroom.policy").joinpath(name).read_text("utf-8")


@lru_cache(maxsize=8)
def _parsed(text: str) -> Policies:
    return Policies._of(text)  # noqa: SLF001 - the same noun; a cache can't hold a class method of a frozen class


@cache
def _shipped(name: str) -> Policies:
    return Policies.parse(_read(f"{name}.cedar"))


@cache
def _schema() -> cedarpy.Schema:
    import cedarpy

    return cedarpy.Schema.from_str(_read("schema.cedarschema"))


@lru_cache(maxsize=1024)
def _entities(subject: Subject, resource: Resource) -> cedarpy.Entities:
    """Validated against the schema here, which a parsed set is not again when it is used."""
    import cedarpy

    # Which action and situation make no difference to the entities.
    return cedarpy.Entities.from_json_str(Query(subject, "approve", resource, Situation()).entities(), _schema())
