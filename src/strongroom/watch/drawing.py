"""Drawing bits of budgets: what is charged in one transaction, wherever the database is (spec/gateway.md, section
5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from strongroom.storage.db import Database
from strongroom.watch.counters import PAID, Change, Counters, Key
from strongroom.watch.rules import window_at

_PART = 16  # a tranche is this part of what is left, so workers that die together can't use a budget up
_BEYOND = 4096  # answers, in a tranche of a budget that is an alarm and has sounded: a transaction costs 5 ms of CPU
_MOST = 1 << 32  # bits of one, so that no number of them leaves the range of a database's integers


@dataclass(frozen=True)
class Want:
    """What an answer takes of one counter: `missing`, which may be 0, are the bits that its worker does not have of it.
    `limit`, and whether it refuses (`hard`), are the rule's."""

    key: Key
    limit: int
    hard: bool
    missing: int


@dataclass(frozen=True)
class Drawn:
    """What became of it, at `now`. Of each counter what was `used` before, and the `spare` bits that were charged
    beyond what was missing. Nothing was charged where windows had `moved`: others are open; or where the counter at
    the place `full` has not so much left."""

    now: int
    used: tuple[int, ...] = ()
    spare: tuple[int, ...] = ()
    full: int | None = None
    moved: bool = False


class Counting(Protocol):
    """The counters, of this machine's database or a served room's. Each call is one transaction. Errors are those of
    the database, or of the room: after one of `draw` bits may be charged, and nobody has them."""

    def draw(self, now: int, ref: str, bits: int, wants: Sequence[Want]) -> Drawn:
        """Charge what an answer of `bits` bits of the version `ref` lacks, in all counters or in none."""
        ...

    def pay(self, now: int, asked: str, bits: Mapping[Key, int]) -> None:
        """Charge what was spent beyond what was drawn, once under the identifier `asked`. Any error: it may have been
        done, and is asked for again."""
        ...

    def give_back(self, now: int, bits: Mapping[Key, int], *, forget: bool) -> None:
        """Charge so much less; with `forget` counters of long ago are deleted."""
        ...


def draw(change: Change, bits: int, wants: Sequence[Want]) -> Drawn:
    """See `Counting.draw`."""
    if any(window_at(each.key.period, change.now)[0] != each.key.start for each in wants):
        return Drawn(change.now, moved=True)
    found = change.used([each.key for each in wants])
    used = tuple(found[each.key] for each in wants)
    spare: list[int] = []
    for place, (each, before) in enumerate(zip(wants, used, strict=True)):
        left = each.limit - before
        if each.hard and each.missing > left:
            return Drawn(change.now, used, full=place)
        if each.hard:
            spare.append(max(left - each.missing, 0) // _PART)
        else:  # nothing ends at an alarm: small steps before it, so that it is no false one, and large ones after
            spare.append(each.limit // 64 if left > 0 else min(_BEYOND * bits, _MOST))
    change.add({each.key: each.missing + more for each, more in zip(wants, spare, strict=True)})
    return Drawn(change.now, used, tuple(spare))


class OwnCounters:
    """`Counting` where the room's database is."""

    def __init__(self, store: Database) -> None:
        self._counters = Counters(store)

    def draw(self, now: int, ref: str, bits: int, wants: Sequence[Want]) -> Drawn:  # noqa: ARG002 - limits are ours
        with self._counters.changing(now) as change:
            return draw(change, bits, wants)

    def pay(self, now: int, asked: str, bits: Mapping[Key, int]) -> None:
        with self._counters.changing(now) as change:
            if not any(key.who == "" for key, _ in change.rows(PAID, asked)):  # else a gateway's elsewhere
                change.add({Key(PAID, asked, change.now, "", ""): 0, **bits})

    def give_back(self, now: int, bits: Mapping[Key, int], *, forget: bool) -> None:
        if bits or forget:
            with self._counters.changing(now) as change:
                change.give_back(bits)
                if forget:
                    change.forget()
