"""The counters as gateways elsewhere draw from them: what is asked twice is done once, limits and time are the room's,
and nobody gives back what somebody else has drawn."""

from __future__ import annotations

import threading

import pytest

from strongroom.errors import Conflict, LimitExceeded, StrongroomError, UsageError
from strongroom.watch.budget import Budgets
from strongroom.watch.counters import Counters
from strongroom.watch.drawing import Drawn
from strongroom.watch.relayed import MOST, RelayedCounters, Settled, Taken, digest_of
from strongroom.watch.rules import RULES as DEFAULTS
from strongroom.watch.rules import Rule
from watch.budgets import ANA, NOON, REF, RULES, SIZE

GATE, OTHER = "workload/gate", "workload/other"
HOUR, DAY = 3600, 86_400
LIMIT = SIZE // 100  # of an identity, a day


def identifiers():
    number = 0
    while True:
        number += 1
        yield f"{number:032x}"


IDS = identifiers()


@pytest.fixture
def room(desk):
    return RelayedCounters(desk.db, RULES, lambda _: SIZE, lambda: int(desk.now))


def today(missing, who="user/ana", start=NOON - NOON % DAY):
    return Taken("identity", "day", start, who, missing)


def back(bits, who="user/ana", start=NOON - NOON % DAY):
    return Settled("identity", "day", start, who, REF, bits)


class Relay:
    """`Counting` over the counters of a served room, without a network; `lose` has so many answers lost, each after
    what was asked is done."""

    def __init__(self, room, gateway=GATE):
        self.room, self.gateway, self.lose, self.asked = room, gateway, 0, 0

    def draw(self, now, ref, bits, wants):
        taken = [Taken(w.key.scope, w.key.period, w.key.start, w.key.who, w.missing) for w in wants]
        self.asked += 1
        return self.room.draw(self.gateway, next(IDS), ref, bits, taken)

    def pay(self, now, asked, bits):
        self.room.settle(self.gateway, asked, _settled(bits), ())

    def give_back(self, now, bits, *, forget):
        self.room.settle(self.gateway, next(IDS), (), _settled(bits))


def _settled(bits):
    return [Settled(key.scope, key.period, key.start, key.who, key.ref, amount) for key, amount in bits.items()]


def test_a_worker_elsewhere_and_one_here_charge_the_same_counters(desk, room):
    here, there = desk.worker(), Budgets(Relay(room), RULES, lambda _: SIZE, lambda: desk.now)
    for worker in (here, there):
        worker.reserve(ANA, REF, 1000).settle(700)
    there.reserve(ANA, REF, 500).settle(900)  # more than was reserved
    for worker in (here, there):
        worker.close()
    assert desk.used("identity", "day", "user/ana") == 700 + 700 + 900
    assert desk.used("model", "hour") == 2300
    assert desk.used("everybody", "lifetime", ref="acme/tiny") == 2300
    # And a limit that refuses holds for both together.
    there.reserve(ANA, REF, LIMIT - 2300)
    with pytest.raises(StrongroomError) as caught:
        here.reserve(ANA, REF, 1)
    assert caught.value.code == "budget.identity"
    assert caught.value.evidence["left"] == 0


def test_of_many_workers_elsewhere_no_limit_is_passed(desk, room):
    workers = [Budgets(Relay(room, f"workload/{n}"), RULES, lambda _: SIZE, lambda: desk.now) for n in range(3)]
    given = []

    def run(worker):
        while True:
            try:
                worker.reserve(ANA, REF, 377)
            except StrongroomError as error:
                assert error.code == "budget.identity"
                return
            given.append(377)

    threads = [threading.Thread(target=run, args=(worker,)) for worker in workers]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert LIMIT * 0.5 < sum(given) <= LIMIT
    assert desk.used("identity", "day", "user/ana") <= LIMIT


def test_a_clock_that_is_ahead_or_behind_opens_no_window(desk, room):
    """Time is the room's: a gateway whose clock is a day ahead spends of today, and one that is behind, too."""
    for away in (DAY, -DAY, 0):
        worker = Budgets(Relay(room), RULES, lambda _: SIZE, lambda away=away: desk.now + away)
        worker.reserve(ANA, REF, 1000).settle(1000)
        worker.close()
    assert desk.used("identity", "day", "user/ana") == 3000
    assert desk.used("identity", "day", "user/ana", at=NOON + DAY) == 0
    for start in (NOON - NOON % DAY + DAY, NOON - NOON % DAY - DAY, NOON):
        assert room.draw(GATE, next(IDS), REF, 10, [today(10, start=start)]) == Drawn(NOON, moved=True)
    desk.now += DAY
    worker = Budgets(Relay(room), RULES, lambda _: SIZE, lambda: NOON)
    worker.reserve(ANA, REF, LIMIT)  # a new day, there
    assert desk.used("identity", "day", "user/ana") == LIMIT


def test_what_is_asked_again_is_answered_again_and_charged_once(desk, room):
    asked = next(IDS)
    first = room.draw(GATE, asked, REF, 1000, [today(1000)])
    assert first.spare[0] > 0
    charged = desk.used("identity", "day", "user/ana")
    room.draw(OTHER, next(IDS), REF, 500, [today(500)])
    again = room.draw(GATE, asked, REF, 1000, [today(1000)])
    assert (again.spare, again.full, again.moved) == (first.spare, None, False)
    assert desk.used("identity", "day", "user/ana") - charged < 500 + LIMIT // 16 + 1
    # Under the identifier of another one's draw nothing is told.
    assert room.draw(OTHER, asked, REF, 10, [today(10)]).spare != first.spare
    with pytest.raises(Conflict) as caught:
        room.draw(GATE, asked, REF, 10, [today(10), Taken("model", "hour", NOON, "", 10)])
    assert caught.value.code == "budget.drawn"
    settled, before = next(IDS), desk.used("identity", "day", "user/ana")
    for _ in range(3):
        room.settle(GATE, settled, (), [back(300)])
    assert desk.used("identity", "day", "user/ana") == before - 300
    paid = next(IDS)
    for _ in range(3):
        room.settle(GATE, paid, [back(40)], ())
    assert desk.used("identity", "day", "user/ana") == before - 260


def test_nobody_gives_back_what_somebody_else_has_drawn(desk, room):
    """Else whoever has one gateway's key could empty the counters of all."""
    desk.worker().reserve(ANA, REF, 1000)  # a gateway beside the room
    room.draw(OTHER, next(IDS), REF, 1000, [today(1000)])
    mine = room.draw(GATE, next(IDS), REF, 500, [today(500)])
    have, before = 500 + mine.spare[0], desk.used("identity", "day", "user/ana")
    for bits in (have + 1, before):
        with pytest.raises(Conflict) as caught:
            room.settle(GATE, next(IDS), (), [back(bits)])
        assert caught.value.code == "budget.not_drawn"
        assert desk.used("identity", "day", "user/ana") == before
    room.settle(GATE, next(IDS), (), [back(have)])
    assert desk.used("identity", "day", "user/ana") == before - have
    with pytest.raises(Conflict):
        room.settle(GATE, next(IDS), (), [back(1)])


@pytest.mark.parametrize(
    "taken",
    [
        Taken("identity", "hour", NOON, "user/ana", 1),  # no rule of this room
        Taken("verified", "good", 0, "float32", 1),  # what else is in the table
        Taken("clock", "", 0, "", 1),
        Taken("drawn", "day", 0, "x", 1),
        today(1, who=""),
        today(1, who="x" * 201),
        today(1, who="user/ana\n"),
        Taken("model", "hour", NOON, "user/ana", 1),  # a counter for all is nobody's
    ],
)
def test_what_is_no_counter_of_these_budgets(desk, room, taken):
    with pytest.raises(UsageError) as caught:
        room.draw(GATE, next(IDS), REF, 1, [taken])
    assert caught.value.code == "budget.counter"
    settled = Settled(taken.scope, taken.window, taken.start, taken.who, REF, 1)
    with pytest.raises(UsageError):
        room.settle(GATE, next(IDS), [settled], ())


def test_more_than_any_answer_has_and_the_same_counter_twice(desk, room):
    for bits, missing in ((MOST + 1, 1), (1, MOST + 1)):
        with pytest.raises(LimitExceeded) as caught:
            room.draw(GATE, next(IDS), REF, bits, [today(missing)])
        assert caught.value.code == "budget.bits"
    with pytest.raises(UsageError):
        room.draw(GATE, next(IDS), REF, 1, [today(1), today(2)])
    for pay, give in (([back(1), back(2)], []), ([], [back(1), back(1)]), ([back(1, start=NOON)], [])):
        with pytest.raises(UsageError):
            room.settle(GATE, next(IDS), pay, give)
    tomorrow = back(1, start=NOON - NOON % DAY + DAY)  # a budget of tomorrow can't be used up today
    with pytest.raises(UsageError):
        room.settle(GATE, next(IDS), [tomorrow], ())
    for ref in ("acme/tiny", "x" * 300, "@"):
        with pytest.raises(UsageError):
            room.settle(GATE, next(IDS), [Settled("model", "hour", NOON, "", ref, 1)], ())
    assert desk.used("identity", "day", "user/ana") == 0


def test_a_month_that_no_calendar_has(desk):
    """It was no error of ours: 500, and a traceback in the custodian's log for each."""
    room = RelayedCounters(desk.db, DEFAULTS, lambda _: SIZE, lambda: NOON)
    for start in (1 << 40, (1 << 53) - 1):
        with pytest.raises(UsageError) as caught:
            room.settle(GATE, next(IDS), [Settled("model", "month", start, "", REF, 1)], ())
        assert caught.value.code == "budget.counter"


def test_what_was_asked_is_forgotten_and_no_budget_shows_it(desk, room):
    for _ in range(5):
        room.draw(GATE, next(IDS), REF, 10, [today(10)])
    assert {each["scope"] for each in desk.report()["budgets"]} <= {rule.scope for rule in RULES}
    desk.now += 1000
    room._pruned = -1e9
    room.settle(GATE, next(IDS), [back(1)], ())
    with Counters(desk.db).changing(int(desk.now)) as change:
        kept = change.rows("asked", f"{1:032x}")
        drawn = change.rows("drawn", "day")
    assert kept == []
    assert [(key.who, used > 50) for key, used in drawn] == [(f"{GATE} identity user/ana", True)]


def test_what_was_paid_is_remembered_for_a_month_and_whose_it_is(desk, room):
    """A gateway that was killed before it heard of it pays again when it is started again."""
    asked = next(IDS)
    for days, paid in ((0, 40), (29, 40), (31, 80)):
        desk.now = float(NOON + days * DAY)
        room._pruned = -1e9
        room.settle(GATE, next(IDS), (), ())
        room.settle(GATE, asked, [Settled("everybody", "lifetime", 0, "", "acme/tiny", 40)], ())
        assert desk.used("everybody", "lifetime", ref="acme/tiny") == paid
    room.settle(OTHER, asked, [Settled("everybody", "lifetime", 0, "", "acme/tiny", 2)], ())
    assert desk.used("everybody", "lifetime", ref="acme/tiny") == 82


def test_what_charges_nothing_is_not_remembered_for_a_month(desk, room):
    """Else whoever has a gateway's key could fill the database with it."""
    for _ in range(3):
        room.settle(GATE, next(IDS), [Settled("everybody", "lifetime", 0, "", "acme/tiny", 0)], ())
    with desk.db.reading() as tx:
        rows = tx.exec_driver_sql("SELECT scope, count(*) FROM egress WHERE scope IN ('paid', 'asked') GROUP BY scope")
        assert [tuple(each) for each in rows] == [("asked", 3)]


def test_a_digest_is_of_all_that_limits_are_reckoned_by():
    digests = {
        digest_of(rules, bits, compression)
        for rules in (DEFAULTS, DEFAULTS[1:], (*DEFAULTS[1:], Rule("identity", "day", 1e-5, 2_000_001, hard=True)))
        for bits in (4, 8)
        for compression in (16, 17)
    }
    assert len(digests) == 12
    assert digest_of(tuple(reversed(DEFAULTS)), 4, 16) == digest_of(DEFAULTS, 4, 16)


def test_a_tranche_of_any_size_is_given_back(desk):
    """A sixteenth of a large budget is more than an answer can have: what could not be given back stayed charged."""
    size = 400_000_000_000
    rules = (Rule("model", "lifetime", 0.5, hard=True),)
    there = Budgets(Relay(RelayedCounters(desk.db, rules, lambda _: size, lambda: NOON)), rules, lambda _: size,
                    lambda: desk.now)  # fmt: skip
    there.reserve(ANA, REF, 1000).settle(700)
    assert desk.used("model", "lifetime") > 2 * MOST
    there.close()
    assert desk.used("model", "lifetime") == 700
