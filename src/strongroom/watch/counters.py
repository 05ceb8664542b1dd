"""The counters of egress in the room's database: what each scope has used in each window (spec/gateway.md, section 5).

Every change first writes the row of the clock, and so has all counters to itself until it ends: on SQLite by the write
lock, on PostgreSQL by the lock on that row. What is checked then can't be outdated when it is committed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from strongroom.errors import Tampered
from strongroom.storage.db import Database, egress

_CLOCK = {"scope": "clock", "period": "", "start": 0, "who": "", "ref": ""}
VERIFIED = "verified"  # no counter of bits: see `tallies`
DRAWN, ASKED = "drawn", "asked"  # nor these: see `relayed`
PAID = "paid"  # nor this: identifiers of debts that were charged, by period
LAST = 253_402_300_800 - 366 * 86_400  # a year before the calendar's end: windows have an end, too
_PAID_KEPT = 30 * 86_400  # seconds: a worker that was killed pays again when it is started again
_KEEP = {"hour": 3 * 86_400, "day": 8 * 86_400, "month": 100 * 86_400}  # seconds: older windows are not looked at
_COLUMNS = (egress.c.scope, egress.c.period, egress.c.start, egress.c.who, egress.c.ref)


class Key(NamedTuple):
    """One counter. `start`: the window's first second."""

    scope: str
    period: str
    start: int
    who: str
    ref: str


class Counters:
    """What is in the table. Errors are those of `Database`."""

    def __init__(self, store: Database) -> None:
        self._store = store

    @contextmanager
    def changing(self, now: int) -> Iterator[Change]:
        """All counters, for this change alone. Nothing is changed if the block raises."""
        with self._store.counting() as tx:
            yield Change(tx, now)

    def look(self, now: int, refs: Collection[str]) -> tuple[int, list[tuple[Key, int]]]:
        """What time it is, and every counter of `refs`."""
        wanted = sa.select(*_COLUMNS, egress.c.used).where(
            egress.c.ref.in_([*refs, _CLOCK["ref"]]), egress.c.scope.not_in((VERIFIED, DRAWN, ASKED, PAID))
        )
        with self._store.reading() as tx:
            rows = [(Key(*row[:5]), row[5]) for row in tx.execute(wanted)]
        clock = next((used for key, used in rows if key.scope == "clock"), 0)
        return _checked(max(clock, now)), [row for row in rows if row[0].scope != "clock"]


class Change:
    """A transaction that has all counters to itself. `now`: the newest time that any worker has seen: a clock that is
    set back opens no window again."""

    def __init__(self, tx: sa.Connection, now: int) -> None:
        self._tx = tx
        self._insert: Any = (postgresql if tx.dialect.name == "postgresql" else sqlite).insert(egress)
        row = self._insert.values(**_CLOCK, used=_checked(now))
        later = sa.case((row.excluded.used > egress.c.used, row.excluded.used), else_=egress.c.used)
        clock = row.on_conflict_do_update(index_elements=_COLUMNS, set_={"used": later}).returning(egress.c.used)
        self.now = _checked(tx.execute(clock).scalar_one())

    def used(self, keys: Iterable[Key]) -> dict[Key, int]:
        """Bits; 0 for counters that there are not."""
        found = dict.fromkeys(keys, 0)
        rows = self._tx.execute(
            sa.select(*_COLUMNS, egress.c.used).where(sa.tuple_(*_COLUMNS).in_([tuple(key) for key in found]))
        )
        return found | {Key(*row[:5]): row[5] for row in rows}

    def rows(self, scope: str, period: str) -> list[tuple[Key, int]]:
        """Those of one scope and period."""
        wanted = sa.select(*_COLUMNS, egress.c.used).where(egress.c.scope == scope, egress.c.period == period)
        return [(Key(*row[:5]), row[5]) for row in self._tx.execute(wanted)]

    def add(self, bits: Mapping[Key, int]) -> None:
        """Count `bits` more of each."""
        if bits:
            upsert = self._insert.on_conflict_do_update(
                index_elements=_COLUMNS, set_={"used": egress.c.used + self._insert.excluded.used}
            )
            self._tx.execute(upsert, [{**key._asdict(), "used": amount} for key, amount in bits.items()])

    def give_back(self, bits: Mapping[Key, int]) -> None:
        """Count `bits` fewer of each; never below 0 (Conflict)."""
        if bits:
            mine = sa.and_(*(column == sa.bindparam(f"this_{column.name}") for column in _COLUMNS))
            update = sa.update(egress).where(mine).values(used=egress.c.used - sa.bindparam("fewer"))
            self._tx.execute(
                update,
                [
                    {"fewer": amount, **{f"this_{name}": value for name, value in key._asdict().items()}}
                    for key, amount in bits.items()
                ],
            )

    def forget(self) -> None:
        """Delete what nobody looks at any more."""
        old = sa.or_(
            (egress.c.scope == PAID) & (egress.c.start < self.now - _PAID_KEPT),
            *((egress.c.period == period) & (egress.c.start < self.now - seconds) for period, seconds in _KEEP.items()),
        )
        self._tx.execute(sa.delete(egress).where(old))

    def forget_asked(self, before: int) -> None:
        """Delete what was asked before that time."""
        self._tx.execute(sa.delete(egress).where(egress.c.scope == ASKED, egress.c.start < before))


def _checked(now: int) -> int:
    """A time that has windows. Whoever writes to the database may have put any number there."""
    if not 0 <= now < LAST:
        raise Tampered(
            "budget.clock",
            f"the clock, or the newest time in the counters of egress, is second {now}, which no calendar has",
            hint="set the machine's clock, or restore the database from a backup",
        )
    return now
