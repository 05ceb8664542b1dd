"""The counters of egress for gateways that run elsewhere, where the room's database is (spec/http.md, section 10).

What a gateway says is not taken for more than it is: limits and time are reckoned here, what was done under an
identifier is done once, and nobody gives back what somebody else has drawn.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from strongroom.core import canonical
from strongroom.core.ids import Ref
from strongroom.errors import Conflict, LimitExceeded, UsageError
from strongroom.storage.db import Database
from strongroom.watch.counters import ASKED, DRAWN, LAST, PAID, Change, Counters, Key
from strongroom.watch.drawing import Drawn, Want, draw
from strongroom.watch.rules import Rule, counted_ref, window_at

MOST = 1 << 32  # bits of an answer: no sum of them leaves the range of a database's integers in a hundred years
_REMEMBERED = 900  # seconds for which what was asked under an identifier is answered again
_PRUNE_EVERY = 60.0  # seconds
_WHO = 200  # characters


@dataclass(frozen=True)
class Taken:
    """What one counter lacks of an answer, as a gateway says it."""

    scope: str
    window: str
    start: int
    who: str
    missing: int


@dataclass(frozen=True)
class Settled:
    """Bits of one counter that are charged more, or less."""

    scope: str
    window: str
    start: int
    who: str
    ref: str
    bits: int


def digest_of(rules: Sequence[Rule], bits_per_parameter: int, compression: int) -> str:
    """What gateways and custodian compare: all that limits are reckoned by."""
    told = sorted([each.scope, each.window, repr(each.share), each.floor, each.hard] for each in rules)
    value = {"bits_per_parameter": bits_per_parameter, "compression": compression, "rules": told}
    return hashlib.sha256(canonical.encode(value)).hexdigest()


class RelayedCounters:
    """The counters of one room, under its `rules`. `sizes` gives W_eff in bits of a version, `clock` Unix time. Errors
    are those of the database, and UsageError ``budget.counter`` for what is none of these rules."""

    def __init__(
        self, store: Database, rules: Sequence[Rule], sizes: Callable[[str], int], clock: Callable[[], int]
    ) -> None:
        self._counters, self._sizes, self._clock = Counters(store), sizes, clock
        self._rules = {(each.scope, each.window): each for each in rules}
        self._lock = threading.Lock()
        self._pruned = 0.0

    def draw(self, gateway: str, asked: str, ref: str, bits: int, taken: Sequence[Taken]) -> Drawn:
        """As `Counting.draw`, for the principal `gateway`, once under the identifier `asked`. LimitExceeded
        ``budget.bits``."""
        size = self._sizes(ref)
        wants = []
        for each in taken:
            rule = self._rule(each.scope, each.window)
            key = _key(each.scope, each.window, each.start, each.who, counted_ref(each.scope, ref))
            wants.append(Want(key, rule.limit(size), rule.hard, _checked(each.missing)))
        _checked(bits)
        if len({each.key for each in wants}) < len(wants):
            raise _none("the same counter twice")
        with self._counters.changing(self._clock()) as change:
            if (before := _done(change, asked, gateway)) is not None:
                return _again(change, before, wants)
            found = draw(change, bits, wants)
            if not found.moved and found.full is None:
                more = {each.key: each.missing + spare for each, spare in zip(wants, found.spare, strict=True)}
                change.add({_by(gateway, key): amount for key, amount in more.items()})
                _did(change, asked, gateway, found.spare)
                self._prune(change)
            return found

    def settle(self, gateway: str, asked: str, pay: Sequence[Settled], back: Sequence[Settled]) -> int:
        """Charge what answers had beyond what was drawn, and give back what was not spent, once under the identifier
        `asked`; what time it is. Conflict ``budget.not_drawn`` for more than `gateway` has drawn and not given back.
        What was charged is remembered for as long as gateways that were killed may come back: see `debts`."""
        owed = {self._settled(each): _checked(each.bits) for each in pay}
        returned = {self._settled(each): each.bits for each in back}  # of any size: no more than was drawn
        if len(owed) < len(pay) or len(returned) < len(back):
            raise _none("the same counter twice")
        try:
            with self._counters.changing(self._clock()) as change:
                if any(_done(change, asked, gateway, scope) is not None for scope in (PAID, ASKED)):
                    return change.now
                if any(key.start > change.now for key in (*owed, *returned)):
                    raise _none("a window that is not open yet")
                change.add(owed)
                change.add({_by(gateway, key): amount for key, amount in owed.items()})
                mine = {_by(gateway, key): amount for key, amount in returned.items()}
                drawn = change.used(mine)
                if any(drawn[key] < amount for key, amount in mine.items()):
                    raise _not_drawn(gateway)
                change.give_back(mine)
                change.give_back(returned)
                _did(change, asked, gateway, (), PAID if any(owed.values()) else ASKED)
                self._prune(change)
                return change.now
        except Conflict as error:
            # A counter of long ago that was deleted, and begun again, has less.
            raise error if error.code == "budget.not_drawn" else _not_drawn(gateway) from None

    def once(self, gateway: str, asked: str) -> Callable[[Change], bool]:
        """Whether nothing was done under this identifier yet; from then on it was."""

        def new(change: Change) -> bool:
            if _done(change, asked, gateway) is not None:
                return False
            _did(change, asked, gateway, ())
            self._prune(change)
            return True

        return new

    def _settled(self, said: Settled) -> Key:
        self._rule(said.scope, said.window)
        if said.scope == "everybody":
            named = Ref.parse(said.ref).number is None
        else:
            named = Ref.parse(said.ref).number is not None
        if not named or said.start >= LAST or window_at(said.window, said.start)[0] != said.start:
            raise _none("a window or a version that no counter has")
        return _key(said.scope, said.window, said.start, said.who, said.ref)

    def _rule(self, scope: str, window: str) -> Rule:
        rule = self._rules.get((scope, window))
        if rule is None:
            raise _none(f"{scope!r:.40} each {window!r:.40}")  # half a character could not be answered with
        return rule

    def _prune(self, change: Change) -> None:
        with self._lock:
            if time.monotonic() - self._pruned < _PRUNE_EVERY:
                return
            self._pruned = time.monotonic()
        change.forget()
        change.forget_asked(change.now - _REMEMBERED)


def _key(scope: str, window: str, start: int, who: str, ref: str) -> Key:
    if len(who) > _WHO or not (who.isascii() and who.isprintable()) or (not who) != (scope in ("model", "everybody")):
        raise _none("somebody whom no counter is of")
    return Key(scope, window, start, who, ref)


def _by(gateway: str, key: Key) -> Key:
    """What `gateway` has drawn of a counter, and not given back."""
    return Key(DRAWN, key.period, key.start, f"{gateway} {key.scope} {key.who}", key.ref)


def _done(change: Change, asked: str, gateway: str, scope: str = ASKED) -> list[int] | None:
    """The spare bits that were drawn under this identifier, if it is known."""
    rows = change.rows(scope, asked)
    mine = {int(each.who.rpartition(" ")[2]): used for each, used in rows if each.who.rpartition(" ")[0] == gateway}
    return [mine[place] for place in sorted(mine) if place >= 0] if mine else None


def _did(change: Change, asked: str, gateway: str, spare: Sequence[int], scope: str = ASKED) -> None:
    rows = {Key(scope, asked, change.now, f"{gateway} {place}", ""): more for place, more in enumerate(spare)}
    change.add({Key(scope, asked, change.now, f"{gateway} -1", ""): 0, **rows})


def _again(change: Change, spare: Sequence[int], wants: Sequence[Want]) -> Drawn:
    """What was answered the first time, but for what the counters have had since."""
    if len(spare) != len(wants):
        raise Conflict("budget.drawn", "something else was drawn under this identifier", hint="draw under another one")
    used = change.used([each.key for each in wants])
    before = (used[each.key] - each.missing - more for each, more in zip(wants, spare, strict=True))
    return replace(Drawn(change.now, spare=tuple(spare)), used=tuple(max(0, each) for each in before))


def _checked(bits: int) -> int:
    if not 0 <= bits <= MOST:
        raise LimitExceeded("budget.bits", f"{bits} bits: an answer has from none to {MOST}")
    return bits


def _none(what: str) -> UsageError:
    return UsageError(
        "budget.counter",
        f"the budgets of this room have no counter for that: {what}",
        hint="give custodian and gateway the same [budgets]: strongroom serve --gateway-settings FILE",
    )


def _not_drawn(gateway: str) -> Conflict:
    return Conflict("budget.not_drawn", f"{gateway} has not drawn so much of these budgets as it gives back")
