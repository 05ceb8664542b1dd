"""The counters of egress of a served room, and the tallies beside them, as a gateway elsewhere has them (spec/http.md,
section 10)."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from strongroom.client import answers
from strongroom.client.line import Line
from strongroom.errors import BackendError, Conflict, LimitExceeded, NotFound, Sealed, StrongroomError, UsageError
from strongroom.formats.entry import Kind
from strongroom.watch.counters import Key
from strongroom.watch.drawing import Drawn, Want
from strongroom.watch.relayed import MOST
from strongroom.watch.tallies import Kept, heard, told
from strongroom.watch.verdict import Tally

_AT_ONCE = 1000  # counters in one request: a custodian takes 1,024
_REMEMBERED = 800.0  # seconds for which a custodian surely knows what was asked under an identifier
_log = logging.getLogger("strongroom.gateway")


@dataclass(frozen=True)
class _Settling:
    """Bits to be charged (`back`: to be given back), under the identifier `asked`."""

    asked: str
    back: bool
    bits: Mapping[Key, int]
    since: float


@dataclass(frozen=True)
class _Unheard:
    """A draw of which it is not known whether it was made: what was asked, and what of each counter."""

    value: Mapping[str, Any]
    wants: Sequence[Want]
    since: float


class ServedCounters:
    """`strongroom.watch.drawing.Counting`, under the budgets with the digest `rules`. What was paid or given back and
    not heard is said again under its identifier; what was drawn and not heard is drawn under its own, and given back.
    Thread-safe."""

    def __init__(self, line: Line, rules: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._line, self._rules, self._clock = line, rules, clock
        self._lock = threading.Lock()
        self._settling: deque[_Settling] = deque()
        self._unheard: deque[_Unheard] = deque()

    def check(self) -> None:
        """Conflict ``budget.other_settings`` where the custodian reckons by others."""
        self._settle(secrets.token_hex(16), {}, {})

    def draw(self, now: int, ref: str, bits: int, wants: Sequence[Want]) -> Drawn:  # noqa: ARG002 - its own clock
        take = [
            {"scope": key.scope, "window": key.period, "start": key.start, "who": key.who, "missing": each.missing}
            for each in wants
            for key in (each.key,)
        ]
        asked = {"id": secrets.token_hex(16), "rules": self._rules, "ref": ref, "bits": bits, "take": take}
        try:
            found = self._post("draws", asked, answers.DRAWN)
        except BackendError as lost:  # what it may have charged is asked for again: it is charged once
            if lost.code == "server.busy":
                raise
            try:
                found = self._post("draws", asked, answers.DRAWN)
            except StrongroomError as error:  # whatever is said now, the first time something else may have been
                with self._lock:
                    self._unheard.append(_Unheard(asked, tuple(wants), self._clock()))
                raise _about_us(error) from None
        except StrongroomError as error:
            raise _about_us(error) from None
        return _drawn(found, len(wants))

    def _post(self, name: str, value: Mapping[str, Any], members: Mapping[str, Kind]) -> dict[str, Any]:
        """Errors as of `Line.post`, but that who is told to come again asks again: BackendError ``server.busy``."""
        try:
            return self._line.post(f"/v1/gateway/{name}", value, members)
        except LimitExceeded as error:
            if error.code == "budget.bits":
                raise
            raise BackendError(error.code, f"the custodian is busy: {error.message}", hint=error.hint) from None

    def pay(self, now: int, bits: Mapping[Key, int]) -> None:  # noqa: ARG002
        self._later(bits, back=False)
        self._settle_all()

    def give_back(self, now: int, bits: Mapping[Key, int], *, forget: bool) -> None:  # noqa: ARG002
        self._later(bits, back=True)
        self._settle_all()

    def _later(self, bits: Mapping[Key, int], *, back: bool) -> None:
        pairs = [(key, amount if back else min(amount, MOST)) for key, amount in bits.items()]
        more = {} if back else {key: amount - MOST for key, amount in bits.items() if amount > MOST}
        with self._lock:
            for begin in range(0, len(pairs), _AT_ONCE):
                some = dict(pairs[begin : begin + _AT_ONCE])
                self._settling.append(_Settling(secrets.token_hex(16), back, some, self._clock()))
        if more:
            self._later(more, back=False)

    def _settle_all(self) -> None:
        """What can't be told now is told later, but for what would be given back twice by then."""
        with self._lock:
            if not self._settle_unheard():
                return
            while self._settling:
                each = self._settling[0]
                late = self._clock() - each.since > _REMEMBERED
                try:
                    if not (each.back and late):
                        pay, back = ({}, each.bits) if each.back else (each.bits, {})
                        self._settle(each.asked, pay, back)
                except (BackendError, Sealed) as error:
                    _log.warning("budgets are settled later: %s", error)
                    return
                except StrongroomError as error:
                    _log.warning("the custodian does not settle %d bits: %s", sum(each.bits.values()), error)
                self._settling.popleft()

    def _settle_unheard(self) -> bool:
        """Give back what was drawn for an answer that nobody got, if it was: drawn now, if it was not, it is given back
        all the same. Whether that could be done."""
        while self._unheard:
            each = self._unheard[0]
            try:
                if self._clock() - each.since <= _REMEMBERED:
                    found = _drawn(self._post("draws", each.value, answers.DRAWN), len(each.wants))
                    bits = {
                        want.key: want.missing + spare for want, spare in zip(each.wants, found.spare, strict=False)
                    }
                    if bits:
                        self._settling.append(_Settling(secrets.token_hex(16), True, bits, self._clock()))
            except (BackendError, Sealed) as error:
                _log.warning("budgets are settled later: %s", error)
                return False
            except StrongroomError as error:
                _log.warning("what may have been drawn stays charged: %s", error)
            self._unheard.popleft()
        return True

    def _settle(self, asked: str, pay: Mapping[Key, int], back: Mapping[Key, int]) -> None:
        value = {"id": asked, "rules": self._rules, "pay": _listed(pay), "back": _listed(back)}
        self._post("settlements", value, answers.SETTLED)

    def close(self) -> None:
        """Settle what is left, if that can be."""
        self._settle_all()


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
    return error


def _listed(bits: Mapping[Key, int]) -> list[dict[str, Any]]:
    return [
        {
            "scope": key.scope,
            "window": key.period,
            "start": key.start,
            "who": key.who,
            "ref": key.ref,
            "bits": amount,
        }
        for key, amount in bits.items()
    ]


def _drawn(found: Mapping[str, Any], wanted: int) -> Drawn:
    """The custodian's answer, if it is one to what was asked."""
    used = tuple(each["used"] for each in found["counters"])
    spare = tuple(each["spare"] for each in found["counters"])
    now, full, moved = found["now"], found["full"], found["moved"]
    if moved:
        return Drawn(now, moved=True)
    if len(used) != wanted or (full is not None and full >= wanted):
        raise BackendError("server.answer", "the custodian tells of other counters than it was asked about")
    return Drawn(now, used, full=full) if full is not None else Drawn(now, used, spare)
