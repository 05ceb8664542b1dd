"""API keys, on the custodian's side: recorded, and listed to those whom they concern (spec/ledger.md, section 12)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from strongroom.ledger.log import Draft
from strongroom.policy import apikeys
from strongroom.policy.apikeys import ApiKey
from strongroom.policy.facts import resource, situation, subject
from strongroom.policy.query import Query
from strongroom.policy.speaker import Speaker
from strongroom.vault.upkeep import Recorded

if TYPE_CHECKING:
    from strongroom.policy.state import State
    from strongroom.vault.custodian import Custodian

_OVERSEE = ("audit", "grant")  # whoever may do one of these sees everybody's


class ApiKeys:
    """The API keys of one room. `append` records what is decided about a statement, or that it was refused."""

    def __init__(self, custodian: Custodian, append: Callable[..., Recorded], clock: Callable[[], int]) -> None:
        self._custodian, self._append, self._clock = custodian, append, clock

    def change(self, envelope: str) -> dict[str, Any]:
        """Make a key for oneself, or end one: a statement of the kind ``apikey``. `infers`: whether policy lets it
        infer on any version, shown at a gateway, where it is another authentication than whoever makes it has."""
        statement = self._custodian.statement(envelope, "apikey")
        rules = self._custodian.rules
        done = self._append(statement, lambda state, now: Draft(apikeys.change(rules, state, statement, now)))
        now = self._clock()
        with self._custodian.ledger.view() as state:
            key = state.apikeys[statement.body["key"]]
            # As it is by now: whoever says again what made a key that has ended is not told that there is one.
            good = apikeys.good(state, key, now)
            queries = self._queries(state, key, now) if good else []
            policies = rules.policies(state.policy)
        told = {name: statement.body[name] for name in ("principal", "name", "expires_at")}
        return {
            "id": key.id,
            **told,
            "state": "active" if good else "ended",
            "entry": done.index,
            "infers": any(policies.decide(query).allowed for query in queries),
        }

    def _queries(self, state: State, key: ApiKey, now: int) -> list[Query]:
        """What a gateway asks before it answers this key, about each version; as if none were frozen for now."""
        who = Speaker(state.principals[key.principal], key.method)
        refs = [each.ref for each in state.versions.values() if not each.shredded]
        return [
            Query(
                subject(who),
                "infer",
                replace(resource(state, ref), frozen=False),
                situation(state, who, ref, now, stage="direct"),
            )
            for ref in refs
        ]

    def of(self, principal: str) -> list[dict[str, Any]]:
        """The keys of one principal that are good now."""
        with self._custodian.ledger.view() as state:
            return [_told(each) for each in apikeys.of(state, principal, self._clock())]

    def ls(self, by: str | Speaker, principal: str | None = None) -> list[dict[str, Any]]:
        """The keys that are good now, oldest first, without the keys themselves: those of `principal`, or all that `by`
        may see, which are its own, or, for whoever may audit or grant, everybody's. Denied, and recorded."""
        path = by.path if isinstance(by, Speaker) else by
        everybody = principal != path and self._oversees(by, refuse=principal is not None)
        now, wanted = self._clock(), principal or ("" if everybody else path)
        with self._custodian.ledger.view() as state:
            found = [each for each in state.apikeys.values() if wanted in ("", each.principal)]
            return [_told(each) for each in found if apikeys.good(state, each, now)]

    def _oversees(self, by: str | Speaker, *, refuse: bool) -> bool:
        if refuse:
            self._custodian.authorise(by, *_OVERSEE)
            return True
        return self._custodian.may(by, *_OVERSEE)


def _told(key: ApiKey) -> dict[str, Any]:
    shown = ("principal", "name", "expires_at", "entry")
    return {"id": key.id, "key": key.digest, **{name: getattr(key, name) for name in shown}}
