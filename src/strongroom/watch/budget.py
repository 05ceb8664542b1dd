"""Budgets: bits are reserved before anything is generated, and settled afterwards (spec/gateway.md, section 5).

The counters are in the room's database, one for each scope and window, and every worker of every replica draws from
them. So that an answer costs no transaction, a worker draws more than it needs, a *tranche*, and spends it in memory.
What is drawn is charged: a worker that dies has spent it all. Tranches are a part of what is left, so they shrink as a
limit comes near; `Budgets.tend` gives back those of callers that are idle, `close` all. What an answer had beyond what
was reserved is taken out of tranches, and where these do not have so much it is owed: see `Debts`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from strongroom.core import clock as texts
from strongroom.errors import BackendError, BudgetExceeded, Sealed, StrongroomError, UsageError
from strongroom.watch.counters import Key
from strongroom.watch.debts import Debts
from strongroom.watch.drawing import Counting, Drawn, Want
from strongroom.watch.rules import ANSWER, Rule, Spender, counted_ref, window_at

_IDLE = 60.0  # seconds after which a caller's tranches are given back
_REMEMBERED = 1.0  # seconds for which a refusal is repeated without asking the database
_MOST = 1 << 53  # bits of an answer, so that no sum of them leaves the range of a database's integers
_CODES = {
    "identity": "budget.identity",
    "destination": "budget.destination",
    "team": "budget.team",
    "model": "budget.model",
    "everybody": "budget.everybody",
}
_ALARMS = (50, 80, 100)  # per cent
_POCKET = 64  # answers that a pocket is filled for at most
_PART = 8  # of what is there a pocket gets this part
_TRIES = 4  # to find the windows that are open, by the clock of the counters


@dataclass(frozen=True)
class Alarm:
    """A budget has passed `percent` of its limit. It may be told again after bits were given back, and by others."""

    scope: str
    window: str
    who: str
    ref: str
    percent: int
    used: int
    limit: int
    hard: bool


class _Counter:
    """One counter as this worker has it. `free`: bits that are charged and not spent; `seen`: what it had after
    the last draw."""

    __slots__ = ("ends", "free", "key", "limit", "rule", "seen")

    def __init__(self, rule: Rule, key: Key, limit: int, ends: int | None) -> None:
        self.rule, self.key, self.limit, self.ends = rule, key, limit, ends
        self.free = self.seen = 0


class _Purse:
    """The counters that one spender's answers of one version fall under, until the first of their windows ends.
    `pocket`: bits that were taken from each of them and not spent, so that most answers touch one number. They are the
    counters' whenever it matters: see `Budgets._turn_out`."""

    __slots__ = ("at", "counters", "out", "pocket", "refused", "since", "until")

    def __init__(self, counters: tuple[_Counter, ...], at: float) -> None:
        self.counters = counters
        self.since = max((each.key.start for each in counters), default=0)
        self.until = min((each.ends for each in counters if each.ends is not None), default=float("inf"))
        self.at = at
        self.out = 0  # reservations that are not settled
        self.pocket = 0
        self.refused: tuple[float, int, BudgetExceeded] | None = None  # until when, from how many bits on, and why


class Reservation:
    """Bits that are charged in every budget of a spender. What is never settled stays charged."""

    __slots__ = ("_budgets", "_purse", "_settled", "bits")

    def __init__(self, budgets: Budgets, purse: _Purse, bits: int) -> None:
        self._budgets, self._purse, self.bits = budgets, purse, bits
        self._settled = False

    def settle(self, bits: int, *, pay: Callable[[Callable[[], None]], object] = lambda work: work()) -> bool:
        """Charge `bits` instead: the rest is given back; of more, all is charged, beyond any limit. The first call
        counts, others do nothing. Whether something is owed, which `Debts.written` has on disk.

        UsageError ``budget.bits`` for fewer than none, or absurdly many. If the database can't be written, what is owed
        is charged later. `pay` is given what writes it, and may have that done in another thread.
        """
        if not 0 <= bits <= _MOST:
            raise _absurd(bits)
        owes = self._budgets._settle(self, bits)  # noqa: SLF001 - one thing in two classes
        if owes:
            pay(self._budgets.pay)
        return owes

    def extend(self, bits: int, *, pay: Callable[[Callable[[], None]], object]) -> bool:
        """Reserve `bits` more, whatever limits there are: they are going to be given out. Whether something is owed:
        then as `settle`."""
        with self._budgets._memory:  # noqa: SLF001
            owes = not self._settled and self._budgets._owe(self._purse, bits)  # noqa: SLF001
            self.bits += bits
        if owes:
            pay(self._budgets.pay)
        return owes


class Budgets:
    """The budgets of one worker. Thread-safe. `sizes` gives W_eff in bits of a version, `clock` Unix time in seconds;
    `alarm` is called, in the thread that reserves, when a budget passes 50, 80 and 100 % of its limit; `small` once for
    a version so small that budgets which are alarms are less than one answer, with its W_eff: they sound none. `debts`:
    those of the worker, whatever settings it has (default: its memory has them, and nothing else)."""

    def __init__(
        self,
        counters: Counting,
        rules: Sequence[Rule],
        sizes: Callable[[str], int],
        clock: Callable[[], float],
        *,
        alarm: Callable[[Alarm], None] = lambda _: None,
        small: Callable[[str, int], None] = lambda *_: None,
        debts: Debts | None = None,
    ) -> None:
        self._table = counters
        self._rules, self._sizes, self._clock = tuple(rules), sizes, clock
        self._alarm, self._small = alarm, small
        self.debts = debts or Debts()
        self._newest = 0  # the time that the counters had last
        self._known_small: set[str] = set()
        self._memory = threading.Lock()  # held for moments only
        self._drawing = threading.Lock()  # held during transactions; taken before the other
        self._about_to_pay = threading.Lock()  # held while that one is waited for, by who pays; taken before both
        self._purses: dict[tuple[str, str, tuple[str, ...], str], _Purse] = {}
        self._retired: list[_Purse] = []
        self._filled: set[_Purse] = set()  # those that may have something in their pocket
        self._counters: dict[tuple[Key, int], _Counter] = {}
        self._lost: BackendError | Sealed | None = None  # why the counters could not be asked, the last time
        self._forgotten = 0
        if len({(rule.scope, rule.window) for rule in self._rules}) < len(self._rules):
            raise UsageError("budget.rules", "two budgets are for one scope and window")

    # -- the hot path ----------------------------------------------------------------------------------------------

    def take(self, who: Spender, ref: str, bits: int) -> Reservation | None:
        """As `reserve`, from memory alone; None where the database must be asked, which takes milliseconds."""
        if not 0 <= bits <= _MOST:
            raise _absurd(bits)
        with self._memory:
            purse = self._purses.get((who.principal, who.destination, who.teams, ref))
            now = self._clock()
            if purse is None or now >= purse.until:
                return None
            if purse.pocket < bits and not self._fill(purse, bits):
                self._repeat(purse, bits, now)
                return None
            purse.pocket -= bits
            purse.out += 1
            purse.at = now
        return Reservation(self, purse, bits)

    def reserve(self, who: Spender, ref: str, bits: int) -> Reservation:
        """Charge `bits` in every budget that `who` falls under, or none.

        `ref` is a version, NAME@N. BudgetExceeded ``budget.SCOPE``, with scope, window, used, limit, left (bits), and
        resets_at and retry_after (Unix time, and seconds; null of a lifetime); UsageError ``budget.bits``; errors of
        the database, which is asked when a tranche is used up: then nothing more is given out.
        """
        return self.take(who, ref, bits) or self._draw(who, ref, bits)

    def _fill(self, purse: _Purse, bits: int) -> bool:
        """Whether `bits` are in its pocket now. Of what others could use as well it takes a part."""
        if min((each.free for each in purse.counters), default=bits) + purse.pocket < bits:
            self._turn_out()
        missing = bits - purse.pocket
        there = min((each.free for each in purse.counters), default=missing)
        if there < missing:
            return False
        amount = max(missing, min(there // _PART, _POCKET * bits))
        for counter in purse.counters:
            counter.free -= amount
        purse.pocket += amount
        self._filled.add(purse)
        return True

    def _turn_out(self) -> None:
        """All pockets are empty, and counters have what was in them: nothing is drawn, refused, paid or given back by
        what is left of a counter while somebody else holds a part of that."""
        for purse in self._filled:
            for counter in purse.counters:
                counter.free += purse.pocket
            purse.pocket = 0
        self._filled.clear()

    def _repeat(self, purse: _Purse, bits: int, now: float) -> None:
        """A caller that is refused and asks on costs no transaction each time."""
        if purse.refused and 0 < purse.refused[0] - now <= _REMEMBERED and bits >= purse.refused[1]:
            said = purse.refused[2]
            raise BudgetExceeded(said.code, said.message, hint=said.hint, **said.evidence)

    def _settle(self, reservation: Reservation, bits: int) -> bool:
        """Whether something is owed."""
        purse = reservation._purse  # noqa: SLF001
        with self._memory:
            if reservation._settled:  # noqa: SLF001
                return False
            reservation._settled = True  # noqa: SLF001
            purse.out -= 1
            return self._owe(purse, bits - reservation.bits)

    def _owe(self, purse: _Purse, bits: int) -> bool:
        """Take so many out of what was drawn, or put back if it is fewer than none. Whether something is owed: what was
        drawn has not so much."""
        purse.pocket -= bits
        self._filled.add(purse)
        if purse.pocket >= 0:
            return False
        self._turn_out()
        short = [counter for counter in purse.counters if counter.free < 0]
        if short:
            self.debts.add({counter.key: -counter.free for counter in short})
            for counter in short:
                counter.free = 0
        return bool(short)

    # -- transactions ----------------------------------------------------------------------------------------------

    def _draw(self, who: Spender, ref: str, bits: int) -> Reservation:
        before, size = self._lost, self._sizes(ref)
        with self._drawing:
            if ref not in self._known_small and not all(rule.means(size) for rule in self._rules):
                self._known_small.add(ref)
                self._small(ref, size)
            if drawn := self.take(who, ref, bits):  # by another thread, while this one waited
                return drawn
            # Else each of a hundred who wait would wait for the network in its turn, and who comes then behind them.
            if (lost := self._lost) is not None and lost is not before:
                raise type(lost)(lost.code, lost.message, hint=lost.hint)
            try:
                purse, alarms = self._charge(who, ref, size, bits)
            except (BackendError, Sealed) as error:
                self._lost = type(error)(error.code, error.message, hint=error.hint)
                raise
            self._lost = None
        for each in alarms:
            self._alarm(each)
        return Reservation(self, purse, bits)

    def _charge(self, who: Spender, ref: str, size: int, bits: int) -> tuple[_Purse, list[Alarm]]:
        """Out of the counters, in the windows that are open by their clock. What is owed comes first: else whoever has
        used up a limit beyond its end would find it open."""
        self._settle_debts()
        now = max(int(self._clock()), self._newest)
        for _ in range(_TRIES):
            purse = self._purse(who, ref, size, now)
            held: dict[_Counter, int] = {}
            kept = False
            try:
                self._hold(purse, bits, held)
                low = [counter for counter, amount in held.items() if amount < bits or counter.free < bits]
                wants = [Want(each.key, each.limit, each.rule.hard, bits - held[each]) for each in low]
                drawn = self._table.draw(int(self._clock()), ref, bits, wants)
                now = self._newest = drawn.now
                if drawn.full is not None:
                    counter = low[drawn.full]
                    with self._memory:
                        self._turn_out()
                    used = drawn.used[drawn.full] - counter.free - held[counter]
                    raise self._refuse(purse, bits, counter, used, now)
                kept = not drawn.moved
            finally:
                if not kept:
                    with self._memory:
                        for counter, amount in held.items():
                            counter.free += amount
            if kept:
                # Committed: only now is it ours to spend. A commit whose answer is lost has charged, and gives nothing.
                with self._memory:
                    for counter, amount in zip(low, drawn.spare, strict=True):
                        counter.free += amount
                    purse.out += 1
                    purse.at, purse.refused = self._clock(), None
                return purse, [each for each in self._passed(low, wants, drawn) if each.hard or each.limit >= ANSWER]
        raise BackendError(
            "budget.clock", "the time that budgets are counted by does not stand still", hint="strongroom doctor"
        )

    def _passed(self, low: Sequence[_Counter], wants: Sequence[Want], drawn: Drawn) -> list[Alarm]:
        """What a draw has passed, and with it what debts had before: nobody is told when these are paid."""
        found = []
        raised = self.debts.raised(each.key for each in wants)
        for counter, want, (before, after) in zip(low, wants, _spans(wants, drawn), strict=True):
            since = min(counter.seen, before) if want.key in raised else before
            found += _crossed(want, (since, after))
            counter.seen = after
        return found

    def _purse(self, who: Spender, ref: str, size: int, now: int) -> _Purse:
        """That of now; one whose window has ended is kept until its last answer is settled."""
        names = (who.principal, who.destination, who.teams, ref)
        with self._memory:
            old = self._purses.get(names)
            if old is not None and old.since <= now < old.until:
                return old
            counters = []
            for rule in self._rules:
                start, ends = window_at(rule.window, now)
                limit, where = rule.limit(size), counted_ref(rule.scope, ref)
                for name in dict.fromkeys(who.counted(rule.scope)):
                    key = Key(rule.scope, rule.window, start, name, where)
                    # Versions of one name differ in size, and so in the limit of what they share.
                    fresh = _Counter(rule, key, limit, ends)
                    counters.append(self._counters.setdefault((key, limit), fresh))
            if old is not None and old.out:
                self._retired.append(old)
            purse = self._purses[names] = _Purse(tuple(counters), self._clock())
            return purse

    def _hold(self, purse: _Purse, bits: int, held: dict[_Counter, int]) -> None:
        """Take what there is of `bits` out of memory, so that nobody else spends it."""
        with self._memory:
            self._turn_out()
            for counter in purse.counters:
                held[counter] = min(counter.free, bits)
                counter.free -= held[counter]

    def _refuse(self, purse: _Purse, bits: int, counter: _Counter, used: int, now: int) -> BudgetExceeded:
        rule, ends = counter.rule, counter.ends
        left = max(counter.limit - used, 0)
        refused = BudgetExceeded(
            _CODES[rule.scope],
            f"the answer may have {bits} bits; of the {counter.limit} that this {rule.scope} has each {rule.window}, "
            f"{left} are left",
            hint="ask for fewer tokens" + (f", or after {texts.text(ends)}" if ends else ""),
            scope=rule.scope,
            window=rule.window,
            used=used,
            limit=counter.limit,
            left=left,
            resets_at=ends,
            retry_after=None if ends is None else max(ends - now, 1),
        )
        purse.refused = (self._clock() + _REMEMBERED, bits, refused)
        return refused

    def pay(self) -> None:
        """Charge what is owed; what can't be charged now is owed still. Back at once where another thread is about to:
        else all who pay at a network that has gone dark would keep the threads that others need, each for seconds."""
        if self._about_to_pay.acquire(blocking=False):
            try:
                self._drawing.acquire()
            finally:
                self._about_to_pay.release()
            try:
                with suppress(StrongroomError):
                    self._settle_debts()
            finally:
                self._drawing.release()

    def _settle_debts(self) -> None:
        """Errors of the database, or the room."""
        self.debts.settle(lambda asked, bits: self._table.pay(int(self._clock()), asked, bits))

    @property
    def owed(self) -> int:
        """Bits that were spent beyond what was reserved, and are in no counter yet: of the one that lacks most."""
        return self.debts.owed

    def tend(self) -> None:
        """Pay what is owed, give back tranches of callers that are idle, delete counters of long ago. To be called each
        few seconds, beside the hot path. Errors of the database: what was to be given back then stays charged."""
        self._give_back(_IDLE)

    def close(self) -> None:
        """Give back every tranche. Reservations that are not settled stay charged. Errors as `tend`."""
        self._give_back(0)

    def _give_back(self, idle: float) -> None:
        self.pay()
        with self._drawing:
            with self._memory:
                now = self._clock()
                self._turn_out()
                self._retired = [purse for purse in self._retired if purse.out]
                for names, purse in list(self._purses.items()):
                    if not idle or (not purse.out and (now >= purse.until or abs(now - purse.at) >= idle)):
                        del self._purses[names]
                        if purse.out:
                            self._retired.append(purse)
                kept = [*self._purses.values(), *self._retired]
                in_use = {counter for purse in kept for counter in purse.counters}
                given = {}
                for name, counter in list(self._counters.items()):
                    if counter in in_use and idle:
                        continue
                    # Not ours from here on, whatever becomes of the transaction: a commit may be done and not told.
                    if counter.free > 0:
                        given[counter] = counter.free
                        counter.free = 0
                    if counter not in in_use:
                        del self._counters[name]
            today = int(now) // 86_400
            self._table.give_back(int(now), _sums(given), forget=today != self._forgotten)
            self._forgotten = today


def _spans(wants: Sequence[Want], drawn: Drawn) -> list[tuple[int, int]]:
    """What each counter had before, and has now."""
    return [
        (before, before + each.missing + more)
        for each, before, more in zip(wants, drawn.used, drawn.spare, strict=True)
    ]


def _crossed(want: Want, span: tuple[int, int]) -> list[Alarm]:
    (before, after), key, limit = span, want.key, want.limit
    return [
        Alarm(key.scope, key.period, key.who, key.ref, percent, after, limit, want.hard)
        for percent in _ALARMS
        if before * 100 < percent * limit <= after * 100
    ]


def _sums(bits: Mapping[_Counter, int]) -> dict[Key, int]:
    """By key: in one worker, versions of one name may have a counter each of what they share."""
    sums: dict[Key, int] = {}
    for counter, amount in bits.items():
        sums[counter.key] = sums.get(counter.key, 0) + amount
    return sums


def _absurd(bits: int) -> UsageError:
    return UsageError("budget.bits", f"{bits} bits: an answer has from none to {_MOST}")
