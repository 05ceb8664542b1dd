"""API keys, on the custodian's side: recorded, and listed to those whom they concern (spec/ledger.md, section 12)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from strongroom.ledger.log import Draft
from strongroom.policy import apikeys
from strongroom.policy.apikeys import ApiKey
from strongroom.policy.speaker import Speaker
from strongroom.vault.upkeep import Recorded

if TYPE_CHECKING:
    from strongroom.vault.custodian import Custodian

_OVERSEE = ("audit", "grant")  # whoever may do one of these sees everybody's


class ApiKeys:
    """The API keys of one room. `append` records what is decided about a statement, or that it was refused."""

    def __init__(self, custodian: Custodian, append: Callable[..., Recorded], clock: Callable[[], int]) -> None:
        self._custodian, self._append, self._clock = custodian, append, clock

    def change(self, envelope: str) -> dict[str, Any]:
        """Make a key for oneself, or end one: a statement of the kind ``apikey``."""
        statement = self._custodian.statement(envelope, "apikey")
        rules = self._custodian.rules
        done = self._append(statement, lambda state, now: Draft(apikeys.change(rules, state, statement, now)))
        with self._custodian.ledger.view() as state:
            # As it is by now: whoever says again what made a key that has ended is not told that there is one.
            good = apikeys.good(state, state.apikeys[statement.body["key"]], self._clock())
        told = {name: statement.body[name] for name in ("principal", "name", "expires_at")}
        state_now = "active" if good else "ended"
        return {"id": statement.body["key"][:16], **told, "state": state_now, "entry": done.index}

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
