"""The tallies of verified inference in the room's database, so that no gateway's end, and no verifier's, clears an
alarm (spec/gateway.md, section 7). They are counters like those of egress, and in the same table."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import ceil
from typing import Any

import sqlalchemy as sa

from strongroom.storage.db import Database, egress
from strongroom.watch.counters import VERIFIED, Change, Counters, Key
from strongroom.watch.verdict import HONEST, Tally, Verdict, verdict

CLASSES = ("good", "suspicious", "dangerous", "others", "open")
_OPEN = 1_000_000  # parts of a bit: the table has whole numbers


@dataclass(frozen=True)
class Kept:
    """One version's tally under one term. `arithmetic`: what was computed in, of server and verifier the rougher."""

    ref: str
    term: int
    arithmetic: str
    tally: Tally

    def verdict(self, vocabulary: int) -> Verdict:
        """What it says."""
        return verdict(self.tally, vocabulary, HONEST.get(self.arithmetic, HONEST["float32"]))


class Tallies:
    """Those of one room. `term` counts up when an alarm has been looked into: what was verified before is kept, and no
    longer added to. Errors are those of the database."""

    def __init__(self, store: Database, term: int = 0) -> None:
        self._store, self.term = store, term

    def add(self, ref: str, arithmetic: str, tally: Tally, *, new: Callable[[Change], bool] = lambda _: True) -> Kept:
        """Count runs, of every gateway; what all of this term come to. They are counted only if they are `new`, which
        is asked in the same transaction."""
        counts = (tally.good, tally.suspicious, tally.dangerous, tally.others, ceil(tally.open_bits * _OPEN))
        keys = [Key(VERIFIED, name, self.term, arithmetic, ref) for name in CLASSES]
        with Counters(self._store).changing(int(time.time())) as change:
            if new(change):
                change.add(dict(zip(keys, counts, strict=True)))
            used = change.used(keys)
        return Kept(ref, self.term, arithmetic, _tally({key.period: used[key] for key in keys}))

    def now(self) -> list[Kept]:
        """All of this term."""
        return _found(self._rows(egress.c.start == self.term))

    def newest(self, ref: str) -> Kept | None:
        """What is known of a version: of its newest term, and of several kinds of arithmetic the one with an alarm, or
        with most tokens."""
        found = _found(self._rows(egress.c.ref == ref))
        last = max((each.term for each in found), default=0)
        return max(
            (each for each in found if each.term == last),
            key=lambda each: (each.tally.dangerous + each.tally.others > 0, each.tally.tokens),
            default=None,
        )

    def _rows(self, which: sa.ColumnElement[bool]) -> Sequence[Any]:
        columns = (egress.c.ref, egress.c.start, egress.c.who, egress.c.period, egress.c.used)
        with self._store.reading() as tx:
            return tx.execute(sa.select(*columns).where(egress.c.scope == VERIFIED, which)).all()


def _found(rows: Iterable[Any]) -> list[Kept]:
    by: dict[tuple[str, int, str], dict[str, int]] = {}
    for ref, term, arithmetic, name, count in rows:
        by.setdefault((ref, term, arithmetic), {})[name] = count
    return [Kept(*key, _tally(counts)) for key, counts in sorted(by.items())]


def told(found: Kept) -> dict[str, Any]:
    """As `heard` takes it: whole numbers only."""
    tally = found.tally
    counts = {name: getattr(tally, name) for name in ("good", "suspicious", "dangerous", "others")}
    return {"ref": found.ref, "arithmetic": found.arithmetic, **counts, "open": ceil(tally.open_bits * _OPEN)}


def heard(value: Mapping[str, Any], term: int) -> Kept:
    """The reverse of `told`; KeyError for what has not all of it."""
    return Kept(value["ref"], term, value["arithmetic"], _tally({name: value[name] for name in CLASSES}))


def _tally(counts: dict[str, int]) -> Tally:
    good, suspicious, dangerous, others, parts = (counts.get(name, 0) for name in CLASSES)
    return Tally(good, suspicious, dangerous, others, parts / _OPEN)


def shown(found: Kept | None, vocabulary: int, tokens: int) -> dict[str, Any] | None:
    """For `strongroom budget`: the verdict, and E_v, the bits that could still be hidden in `tokens` given out."""
    if found is None or not (found.tally.tokens or found.tally.others):
        return None
    said = found.verdict(vocabulary)
    return {
        **asdict(said),
        "others": found.tally.others,
        "term": found.term,
        "arithmetic": found.arithmetic,
        "hidden_bits": ceil(said.bits * tokens),
    }
