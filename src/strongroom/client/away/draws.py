"""The counters of egress of a served room, and the tallies beside them, as a gateway elsewhere has them (spec/http.md,
section 10)."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from strongroom.client import answers
from strongroom.client.away.line import Line
from strongroom.client.away.settlements import Settlements
from strongroom.errors import BackendError, Conflict, LimitExceeded, NotFound, Sealed, StrongroomError, UsageError
from strongroom.watch.counters import Key
from strongroom.watch.drawing import Drawn, Want
from strongroom.watch.tallies import Kept, heard, told
from strongroom.watch.verdict import Tally


class ServedCounters:
    """`strongroom.watch.drawing.Counting`, under the budgets with the digest `rules`, by way of `settlements`.
    Thread-safe."""

    def __init__(self, rules: str, settlements: Settlements) -> None:
        self._rules, self._settlements = rules, settlements

    def check(self) -> None:
        """Conflict ``budget.other_settings`` where the custodian reckons by others."""
        self._settlements.check(self._rules)

    def draw(self, now: int, ref: str, bits: int, wants: Sequence[Want]) -> Drawn:  # noqa: ARG002 - its own clock
        take = [
            {"scope": key.scope, "window": key.period, "start": key.start, "who": key.who, "missing": each.missing}
            for each in wants
            for key in (each.key,)
        ]
        asked = {"id": secrets.token_hex(16), "rules": self._rules, "ref": ref, "bits": bits, "take": take}
        try:
            return self._settlements.draw(asked, len(wants))
        except BackendError as lost:  # what it may have charged is asked for again: it is charged once
            if lost.code == "server.busy":
                raise
            try:
                return self._settlements.draw(asked, len(wants))
            except StrongroomError as error:  # whatever is said now, the first time something else may have been
                self._settlements.unheard(asked, wants)
                raise _about_us(error) from None
        except StrongroomError as error:
            raise _about_us(error) from None

    def pay(self, now: int, asked: str, bits: Mapping[Key, int]) -> None:  # noqa: ARG002
        self._settlements.pay(asked, self._rules, bits)

    def give_back(self, now: int, bits: Mapping[Key, int], *, forget: bool) -> None:  # noqa: ARG002
        self._settlements.give_back(self._rules, bits)
        self._settlements.settle()


class ServedTallies:
    """`strongroom.gateway.rooms.Keeping` of one term."""

    def __init__(self, line: Line, term: int) -> None:
        self._line, self.term = line, term

    def add(self, ref: str, arithmetic: str, tally: Tally) -> Kept:
        value = {"id": secrets.token_hex(16), "term": self.term, "add": told(Kept(ref, self.term, arithmetic, tally))}
        try:
            found = self._ask(value)
        except BackendError:  # counted once under this identifier
            found = self._ask(value)
        if len(found) != 1:
            raise BackendError("server.answer", "the custodian does not tell the tally that it keeps")
        return found[0]

    def now(self) -> list[Kept]:
        return self._ask({"id": secrets.token_hex(16), "term": self.term, "add": None})

    def _ask(self, value: Mapping[str, Any]) -> list[Kept]:
        found = self._line.post("/v1/gateway/tallies", value, answers.TALLIES)["kept"]
        return [heard(each, self.term) for each in found]


def _about_us(error: StrongroomError) -> StrongroomError:
    """What is wrong with this gateway, and not with who has called it."""
    if isinstance(error, Conflict | NotFound | UsageError):
        return Sealed("gateway.budgets", f"the room charges no budgets: {error.message}", hint=error.hint)
    if isinstance(error, LimitExceeded) and error.code == "budget.bits":  # as beside the room
        return UsageError(error.code, error.message, hint="ask for fewer tokens")
    return error
