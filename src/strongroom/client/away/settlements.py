"""What a gateway elsewhere charges, and gives back, of its room's budgets (spec/http.md, section 10)."""

from __future__ import annotations

import hashlib
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from strongroom.client import answers
from strongroom.client.away.line import Line
from strongroom.errors import BackendError, Conflict, LimitExceeded, Sealed, StrongroomError, UsageError
from strongroom.formats.entry import Kind
from strongroom.watch.counters import Key
from strongroom.watch.drawing import Drawn, Want

_AT_ONCE = 1000  # counters in one request: a custodian takes 1,024
_REMEMBERED = 800.0  # seconds for which a custodian surely knows what was asked under an identifier
_log = logging.getLogger("strongroom.gateway")


@dataclass(frozen=True)
class _Return:
    """Bits to be given back, under the identifier `asked`, reckoned by `rules`."""

    asked: str
    bits: Mapping[Key, int]
    since: float
    rules: str


@dataclass(frozen=True)
class _Unheard:
    """A draw of which it is not known whether it was made: what was asked, and what of each counter."""

    value: Mapping[str, Any]
    wants: Sequence[Want]
    since: float


class Settlements:
    """All of one gateway, whatever budgets it has reckoned by: what is to be given back does not end with the settings
    under which it was drawn. What was said and not heard is said again under its identifier; what was drawn and not
    heard is drawn under its own, and given back. None of that is kept: what is lost stays charged. Thread-safe."""

    def __init__(self, line: Line, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._line, self._clock = line, clock
        self._lock = threading.Lock()  # held for moments
        self._saying = threading.Lock()  # held while the custodian is asked; taken before the other
        self._returns: deque[_Return] = deque()
        self._unheard: deque[_Unheard] = deque()

    def check(self, rules: str) -> None:
        """Conflict ``budget.other_settings`` where the custodian reckons by others."""
        self._say(secrets.token_hex(16), rules, {}, {})

    def draw(self, value: Mapping[str, Any], wanted: int) -> Drawn:
        """The custodian's answer to the draw `value`, of so many counters."""
        return _drawn(self._post("draws", value, answers.DRAWN), wanted)

    def unheard(self, value: Mapping[str, Any], wants: Sequence[Want]) -> None:
        """The draw `value` may have been made, and nobody has what was drawn."""
        with self._lock:
            self._unheard.append(_Unheard(value, tuple(wants), self._clock()))

    def pay(self, asked: str, rules: str, bits: Mapping[Key, int]) -> None:
        """Charge these, once under the identifier `asked`. BackendError, Sealed: it is not known whether they are. What
        the custodian refuses in any other way is charged nowhere, ever: the gateway's log says so."""
        try:
            self._settle(asked, rules, bits, {})
        except (BackendError, Sealed):
            raise
        except StrongroomError as error:
            # A custodian whose clock is off, or that is being renewed, takes them another time.
            if error.code != "budget.counter":
                said = f"the room does not charge what is owed: {error.message}"
                raise Sealed("gateway.budgets", said, hint=error.hint) from None
            for part, some in self._apart(bits, error):
                self.pay(_part_of(asked, part), rules, some)

    def give_back(self, rules: str, bits: Mapping[Key, int]) -> None:
        """With the next `settle`."""
        pairs = [*bits.items()]
        with self._lock:
            for begin in range(0, len(pairs), _AT_ONCE):
                self._returns.append(self._new(rules, dict(pairs[begin : begin + _AT_ONCE])))

    def settle(self) -> None:
        """Say all that is to be given back. What can't be told now is told later, but for what would be given back
        twice by then."""
        with self._saying:
            if not self._settle_unheard():
                return
            while self._returns:
                each = self._returns[0]
                try:
                    if self._clock() - each.since <= _REMEMBERED:
                        self._settle(each.asked, each.rules, {}, each.bits)
                except (BackendError, Sealed) as error:
                    _log.warning("budgets are settled later: %s", error)
                    return
                except StrongroomError as error:
                    with self._lock:
                        self._returns.extend(self._new(each.rules, some) for _, some in self._apart(each.bits, error))
                self._returns.popleft()

    @staticmethod
    def _apart(bits: Mapping[Key, int], error: StrongroomError) -> list[tuple[tuple[str, str], dict[Key, int]]]:
        """The custodian will not have it so. Where one of the counters is of a budget that there is not any more, the
        others are still to be settled."""
        kinds: dict[tuple[str, str], dict[Key, int]] = {}
        for key, amount in bits.items():
            kinds.setdefault((key.scope, key.period), {})[key] = amount
        if isinstance(error, UsageError) and error.code == "budget.counter" and len(kinds) > 1:
            return [*kinds.items()]
        _log.warning("the custodian does not settle %d bits: %s", sum(bits.values()), error)
        return []

    def _new(self, rules: str, bits: Mapping[Key, int]) -> _Return:
        return _Return(secrets.token_hex(16), bits, self._clock(), rules)

    def _settle_unheard(self) -> bool:
        """Give back what was drawn for an answer that nobody got, if it was: drawn now, if it was not, it is given back
        all the same. Whether that could be done."""
        while self._unheard:
            each = self._unheard[0]
            try:
                if self._clock() - each.since <= _REMEMBERED:
                    found = self.draw(each.value, len(each.wants))
                    pairs = zip(each.wants, found.spare, strict=False)
                    if bits := {want.key: want.missing + spare for want, spare in pairs}:
                        with self._lock:
                            self._returns.append(self._new(str(each.value["rules"]), bits))
            except (BackendError, Sealed) as error:
                _log.warning("budgets are settled later: %s", error)
                return False
            except StrongroomError as error:
                _log.warning("what may have been drawn stays charged: %s", error)
            self._unheard.popleft()
        return True

    def _settle(self, asked: str, rules: str, pay: Mapping[Key, int], back: Mapping[Key, int]) -> None:
        try:
            self._say(asked, rules, pay, back)
        except Conflict as error:
            now = error.evidence.get("rules")
            if error.code != "budget.other_settings" or not isinstance(now, str):
                raise
            # Limits are others there by now. What has left has left all the same, and has to be charged.
            try:
                self._say(asked, now, pay, back)
            except Conflict as changing:
                if changing.code != "budget.other_settings":
                    raise
                raise BackendError(changing.code, changing.message) from None  # others again: it is said later

    def _say(self, asked: str, rules: str, pay: Mapping[Key, int], back: Mapping[Key, int]) -> None:
        value = {"id": asked, "rules": rules, "pay": _listed(pay), "back": _listed(back)}
        self._post("settlements", value, answers.SETTLED)

    def _post(self, name: str, value: Mapping[str, Any], members: Mapping[str, Kind]) -> dict[str, Any]:
        """Errors as of `Line.post`, but that who is told to come again asks again: BackendError ``server.busy``."""
        try:
            return self._line.post(f"/v1/gateway/{name}", value, members)
        except LimitExceeded as error:
            if error.code == "budget.bits":
                raise
            raise BackendError(error.code, f"the custodian is busy: {error.message}", hint=error.hint) from None


def _part_of(asked: str, kind: tuple[str, str]) -> str:
    """The same whenever it is paid again, so that a part is charged once, too."""
    return hashlib.sha256(" ".join((asked, *kind)).encode()).hexdigest()[:32]


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
