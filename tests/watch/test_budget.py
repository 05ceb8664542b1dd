"""Budgets: what is granted is charged before, never passes a limit, and is freed by nothing but its own answer."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from strongroom.errors import BackendError, BudgetExceeded, Tampered, UsageError
from strongroom.storage.db import egress
from strongroom.watch.budget import Alarm, Budgets
from strongroom.watch.drawing import OwnCounters
from strongroom.watch.rules import RULES as DEFAULTS
from strongroom.watch.rules import Rule, Spender, window_at
from watch.budgets import ANA, BEN, NOON, REF, RULES, SIZE, Desk

HOUR, DAY = 3600, 86_400
IDENTITY = 100_000  # bits of RULES' first, a hundredth of SIZE


def refused(worker, who, bits, ref=REF):
    with pytest.raises(BudgetExceeded) as caught:
        worker.reserve(who, ref, bits)
    return caught.value


# -- one worker ------------------------------------------------------------------------------------------------------


def test_up_to_the_limit_and_no_further(desk):
    worker = desk.worker()
    for _ in range(9):
        worker.reserve(ANA, REF, 10_000)
    error = refused(worker, ANA, 10_001)
    assert error.code == "budget.identity"
    assert error.evidence == {
        "scope": "identity",
        "window": "day",
        "used": 90_000,
        "limit": IDENTITY,
        "left": 10_000,
        "resets_at": NOON + DAY // 2,
        "retry_after": DAY // 2,
    }
    worker.reserve(ANA, REF, 10_000)
    assert refused(worker, ANA, 1).evidence["left"] == 0
    worker.reserve(ANA, REF, 0)


def test_every_scope_or_none(desk):
    """Ben is refused by the network that Ana used up, and that costs him nothing of his own."""
    worker = desk.worker()
    others = [Spender(f"user/{name}", ANA.destination) for name in ("eva", "kim")]
    for who in others:
        worker.reserve(who, REF, IDENTITY)
    assert refused(worker, BEN, 1).code == "budget.destination"
    worker.close()
    assert desk.used("identity", "day", "user/ben") == 0
    assert desk.used("team", "day", "team/blue") == 0
    assert desk.used("destination", "day", ANA.destination) == 2 * IDENTITY
    assert desk.used("model", "hour") == 2 * IDENTITY


def test_keys_of_one_identity_and_members_of_one_team_share(desk):
    worker = desk.worker((*RULES[:2], Rule("team", "day", 0.005, hard=True)))
    worker.reserve(Spender("user/ana", "10.0.0.0/24", ("team/red",), key="a" * 16), REF, 30_000)
    worker.reserve(Spender("user/ana", "10.9.0.0/24", ("team/red",), key="b" * 16), REF, 10_000)
    assert refused(worker, BEN, 10_001).code == "budget.team"
    worker.reserve(Spender("user/ana", "10.1.0.0/24", key="c" * 16), REF, 60_000)  # of no team
    assert refused(worker, Spender("user/ana", "10.2.0.0/24", key="d" * 16), 1).code == "budget.identity"


def test_what_was_not_used_is_given_back(desk):
    worker = desk.worker()
    for _ in range(50):
        worker.reserve(ANA, REF, 50_000).settle(1000)
    assert refused(worker, ANA, IDENTITY).evidence["left"] == 50_000
    worker.close()
    assert desk.used("identity", "day", "user/ana") == 50_000


def test_more_than_was_reserved_is_charged_in_full(desk):
    worker = desk.worker()
    worker.reserve(ANA, REF, 10).settle(2 * IDENTITY)
    assert desk.used("identity", "day", "user/ana") >= 2 * IDENTITY
    error = refused(worker, ANA, 1)
    assert (error.evidence["left"], error.evidence["used"]) == (0, 2 * IDENTITY)
    worker.close()
    for counted in (("identity", "day", "user/ana"), ("model", "hour"), ("team", "day", "team/red")):
        assert desk.used(*counted) == 2 * IDENTITY


def test_settled_once(desk):
    worker = desk.worker()
    reservation = worker.reserve(ANA, REF, IDENTITY)
    reservation.settle(40_000)
    reservation.settle(0)
    reservation.settle(90_000)
    worker.close()
    assert desk.used("identity", "day", "user/ana") == 40_000


def test_what_is_never_settled_stays_charged(desk):
    worker = desk.worker()
    worker.reserve(ANA, REF, 70_000)
    worker.close()
    assert desk.used("identity", "day", "user/ana") == 70_000
    assert refused(desk.worker(), ANA, 30_001).evidence["left"] == 30_000


def test_in_memory_while_there_is_a_tranche(desk):
    worker = desk.worker()
    assert worker.take(ANA, REF, 100) is None
    worker.reserve(ANA, REF, 100)
    assert worker.take(ANA, REF, 100) is not None
    assert worker.take(ANA, REF, 90_000) is None


def test_what_one_has_at_hand_another_may_have_to_the_last_bit(desk):
    """What waits for the next answer of one is no less of what they share."""
    eva = Spender("user/eva", ANA.destination)
    worker = desk.worker((Rule("destination", "day", 0.01, hard=True),))
    worker.reserve(ANA, REF, 1)
    worker.reserve(eva, REF, 1)
    before = desk.used("destination", "day", ANA.destination)
    for _ in range(20):
        worker.take(ANA, REF, 10).settle(5)
    assert worker.take(eva, REF, before - 101) is None
    assert worker.take(eva, REF, before - 102) is not None
    assert desk.used("destination", "day", ANA.destination) == before
    worker.reserve(eva, REF, IDENTITY - before)
    assert refused(worker, ANA, 1).evidence["left"] == 0


def test_what_the_next_draw_has_paid_is_owed_no_more(desk):
    """Else each answer after it would touch every counter, for as long as the worker lives."""
    worker = desk.worker()
    late = []
    worker.reserve(ANA, REF, 100).settle(50_000, pay=late.append)
    worker.reserve(ANA, REF, 20_000).settle(20_000)
    assert worker.owed == 0
    late[0]()
    turned, turn = [], worker._turn_out
    worker._turn_out = lambda: (turned.append(1), turn())
    for _ in range(20):
        worker.reserve(ANA, REF, 1).settle(1)
    assert len(turned) <= 1
    worker.close()
    assert desk.used("identity", "day", ANA.principal) == 70_020


def test_fewer_bits_than_none(desk):
    worker = desk.worker()
    for call in (
        lambda: worker.reserve(ANA, REF, -1),
        lambda: worker.reserve(ANA, REF, 5).settle(-1),
        lambda: worker.reserve(ANA, REF, 1 << 70),
    ):
        with pytest.raises(UsageError):
            call()
    worker.close()
    assert desk.used("identity", "day", "user/ana") == 5


def test_one_rule_for_a_scope_and_window(desk):
    with pytest.raises(UsageError):
        desk.worker((RULES[0], RULES[0]))


# -- windows and clocks ----------------------------------------------------------------------------------------------


def test_the_next_day_is_another_budget(desk):
    worker = desk.worker()
    open_still = worker.reserve(ANA, REF, IDENTITY)
    desk.now += DAY
    worker.reserve(ANA, REF, IDENTITY)
    open_still.settle(0)  # of yesterday: gives nothing to today
    assert refused(worker, ANA, 1).code == "budget.identity"
    worker.close()
    assert desk.used("identity", "day", "user/ana", at=NOON) == 0
    assert desk.used("identity", "day", "user/ana") == IDENTITY
    assert desk.used("everybody", "lifetime", ref="acme/tiny") == IDENTITY


def test_a_clock_that_is_set_back_opens_no_window_again(desk):
    first, second = desk.worker(), desk.worker()
    desk.now += DAY
    first.reserve(ANA, REF, IDENTITY)
    desk.now -= DAY  # yesterday's budget was not touched
    for worker in (first, second, desk.worker()):
        assert refused(worker, ANA, 1).evidence["resets_at"] == NOON + DAY // 2 + DAY
    desk.now += 2 * DAY
    second.reserve(ANA, REF, IDENTITY)


def test_a_clock_that_is_set_back_keeps_no_refusal_and_no_tranche(desk):
    first, second = desk.worker(), desk.worker()
    reserved = [first.reserve(ANA, REF, 1_000) for _ in range(95)]
    refused(second, ANA, 10_000)
    desk.now -= HOUR
    for each in reserved:
        each.settle(0)
    desk.now += 1
    first.tend()
    assert desk.used("identity", "day", ANA.principal) == 0
    second.reserve(ANA, REF, 10_000)


def test_a_clock_that_jumps_to_and_fro_gives_one_budget_a_window(desk):
    workers = [desk.worker() for _ in range(3)]
    chance, granted = random.Random(3), 0
    for _ in range(200):
        desk.now = NOON + chance.choice([-3, 0, 1, 2]) * DAY
        with_luck = chance.choice(workers)
        try:
            with_luck.reserve(ANA, REF, 7000)
            granted += 7000
        except BudgetExceeded:
            pass
    assert granted <= 4 * IDENTITY


@pytest.mark.parametrize("what", [-5, 1 << 62])
def test_a_time_that_no_calendar_has(desk, what):
    with desk.db.transaction() as tx:
        row = {"scope": "clock", "period": "", "start": 0, "who": "", "ref": ""}
        used = max(what, 0)
        tx.execute(sa.insert(egress).values(**row, used=used))
    desk.now = min(what, 0) or NOON
    with pytest.raises(Tampered):
        desk.worker().reserve(ANA, REF, 1)


@given(st.integers(0, 4_000_000_000))
def test_windows_follow_one_another(now):
    for window in ("hour", "day", "month"):
        start, end = window_at(window, now)
        assert start <= now < end
        assert window_at(window, end)[0] == end
        assert window_at(window, start) == (start, end)


def test_limits_are_the_same_everywhere():
    assert Rule("identity", "day", 1e-5, 2_000_000).limit(10**12) == 10_000_000
    assert Rule("identity", "day", 1e-5, 2_000_000).limit(10**9) == 2_000_000
    assert Rule("model", "day", 0.1).limit(30) == 3  # 0.1 · 30 is below 3 in no arithmetic of ours
    assert [rule.scope for rule in DEFAULTS if rule.hard] == ["identity", "destination"]


# -- idle and failing ------------------------------------------------------------------------------------------------


def test_tranches_of_the_idle_are_given_back_to_others(desk):
    one, other = desk.worker(), desk.worker()
    one.reserve(ANA, REF, 1000).settle(1000)
    assert desk.used("identity", "day", "user/ana") > 1000
    one.tend()
    assert desk.used("identity", "day", "user/ana") > 1000  # not yet
    desk.now += 61
    one.tend()
    assert desk.used("identity", "day", "user/ana") == 1000
    other.reserve(ANA, REF, IDENTITY - 1000)
    assert refused(one, ANA, 1).evidence["left"] == 0


def test_an_answer_that_is_under_way_keeps_its_counters(desk):
    worker = desk.worker()
    reservation = worker.reserve(ANA, REF, 5000)
    desk.now += 3 * HOUR
    worker.tend()
    worker.reserve(ANA, REF, 10).settle(10)  # in another hour
    worker.tend()
    reservation.settle(2000)
    desk.now += 61
    worker.tend()
    assert desk.used("identity", "day", "user/ana") == 2010
    assert desk.used("model", "hour", at=NOON) == 2000


def test_old_windows_are_forgotten_and_lifetimes_are_not(desk):
    worker = desk.worker()
    worker.reserve(ANA, REF, 10).settle(10)
    desk.now += 200 * DAY
    worker.tend()
    assert desk.used("identity", "day", "user/ana", at=NOON) == 0
    assert desk.used("everybody", "lifetime", ref="acme/tiny") == 10


def test_without_its_database_a_worker_gives_out_what_it_has_drawn(desk):
    """The safe side: what was drawn is charged already. Beyond, nothing."""
    worker = desk.worker()
    worker.reserve(ANA, REF, 1000).settle(1000)
    drawn = desk.used("identity", "day", "user/ana")
    with desk.db.transaction() as tx:
        tx.execute(sa.text("ALTER TABLE egress RENAME TO elsewhere"))
    granted = 1000
    while worker.take(ANA, REF, 100):
        granted += 100
    with pytest.raises(BackendError):
        worker.reserve(ANA, REF, 100)
    surplus = worker.take(ANA, REF, 0)
    surplus.settle(50_000)  # can't be written: it is owed
    with desk.db.transaction() as tx:
        tx.execute(sa.text("ALTER TABLE elsewhere RENAME TO egress"))
    assert 1000 < granted <= drawn
    worker.close()
    assert desk.used("identity", "day", "user/ana") == granted + 50_000


def test_nothing_is_drawn_while_something_is_owed(desk):
    """Else a limit that is used up beyond its end would be open, to whoever asks before the surplus is charged."""
    worker, late = desk.worker(), []
    worker.reserve(ANA, REF, 1000).settle(2 * IDENTITY, pay=late.append)
    assert worker.owed > 0
    assert refused(worker, ANA, 1).evidence["used"] == 2 * IDENTITY
    assert worker.owed == 0
    late[0]()
    assert desk.used("identity", "day", "user/ana") == 2 * IDENTITY


def test_nobody_waits_behind_all_who_pay_at_a_network_that_has_gone_dark(desk):
    """Each of them waits for it for seconds, in one of few threads: who asks then, and who ends the gateway, would be
    told after an hour. Whoever pays next pays for all."""

    class Dark(OwnCounters):
        tries, down, asked, go = 0, True, threading.Event(), threading.Event()

        def pay(self, *what):
            if self.down:
                self.tries += 1
                self.asked.set()
                assert self.go.wait(60)
                raise BackendError("server.unreachable", "no answer")
            super().pay(*what)

    table = Dark(desk.db)
    worker = Budgets(table, RULES, lambda _: SIZE, lambda: desk.now)
    answers, paying = [worker.reserve(ANA, REF, 10) for _ in range(50)], []
    with ThreadPoolExecutor(50) as threads:
        try:
            for each in answers:
                each.settle(5000, pay=lambda work: paying.append(threads.submit(work)))
            assert table.asked.wait(60)
            end = time.monotonic() + 60
            while sum(each.done() for each in paying) < len(paying) - 2:
                assert time.monotonic() < end
                time.sleep(0.01)
        finally:
            table.go.set()
    assert table.tries == 2  # one paid, and one waited
    assert len(paying) > 10
    assert worker.owed > 0
    table.down = False
    worker.pay()
    assert worker.owed == 0
    worker.close()
    assert desk.used("identity", "day", "user/ana") == 50 * 5000


def test_whoever_waited_behind_a_draw_that_was_lost_does_not_wait_for_one_of_their_own(desk):
    """Each waits for the network for seconds: of a hundred the last one would be told after a quarter of an hour, and
    so would those who come when the room is back."""
    asked, go = threading.Event(), threading.Event()

    class Gone(OwnCounters):
        draws = 0

        def draw(self, *_):
            Gone.draws += 1
            asked.set()
            assert go.wait(60)
            raise BackendError("server.unreachable", "no answer")

    told, came = [], []
    worker = Budgets(Gone(desk.db), RULES, lambda _: came.append(1) or SIZE, lambda: desk.now)

    def ask():
        with pytest.raises(BackendError) as caught:
            worker.reserve(ANA, REF, 10)
        told.append(caught.value.code)

    threads = [threading.Thread(target=ask) for _ in range(20)]
    threads[0].start()
    assert asked.wait(60)
    for each in threads[1:]:
        each.start()
    end = time.monotonic() + 60
    while len(came) < 20:
        assert time.monotonic() < end
        time.sleep(0.01)
    go.set()
    for each in threads:
        each.join()
    assert told == ["server.unreachable"] * 20
    assert Gone.draws == 1
    worker._table = OwnCounters(desk.db)
    worker.reserve(ANA, REF, 10)  # the next one asks


@pytest.mark.parametrize("ends", [False, True])
def test_what_is_owed_is_charged_however_long_the_database_is_away(desk, ends):
    """Its caller has gone long ago, and the worker's settings may be others by then."""
    worker = desk.worker()
    worker.reserve(ANA, REF, 1000).settle(1000)
    drawn = desk.used("identity", "day", "user/ana")
    with desk.db.transaction() as tx:
        tx.execute(sa.text("ALTER TABLE egress RENAME TO elsewhere"))
    worker.take(ANA, REF, 0).settle(50_000)
    assert worker.owed > 0
    desk.now += 600
    with pytest.raises(BackendError):  # what is given back meanwhile stays charged
        worker.close() if ends else worker.tend()
    with desk.db.transaction() as tx:
        tx.execute(sa.text("ALTER TABLE elsewhere RENAME TO egress"))
    worker.close()
    assert worker.owed == 0
    assert 51_000 <= desk.used("identity", "day", "user/ana") <= drawn + 50_000


# -- alarms and report -----------------------------------------------------------------------------------------------


def test_alarms_at_half_at_80_and_at_100(desk):
    worker = desk.worker((Rule("team", "day", 0.01), Rule("model", "day", 0.1, hard=True)))
    seen = []
    for _ in range(12):
        worker.reserve(ANA, REF, 10_000).settle(10_000)  # the team's limit is no more than an alarm
        seen.append([each.percent for each in desk.alarms if each.scope == "team"])
    assert seen[3] == []
    assert seen[4] == [50]
    assert seen[-1] == [50, 80, 100]
    first = desk.alarms[0]
    assert first == Alarm("team", "day", "team/red", REF, 50, first.used, IDENTITY, hard=False)
    assert IDENTITY // 2 <= first.used < IDENTITY * 0.6


def test_an_alarm_that_is_passed_by_what_an_answer_had_beyond_all_is_sounded(desk):
    """A server that gives more than was reserved for is what alarms are for."""
    worker = desk.worker((Rule("team", "day", 0.01),))
    worker.reserve(ANA, REF, 10).settle(60_000)
    assert desk.alarms == []
    desk.worker((Rule("team", "day", 0.01),)).reserve(BEN, REF, 10).settle(10)  # others have not passed it
    worker.reserve(ANA, REF, 10).settle(10)
    assert [(each.who, each.percent) for each in desk.alarms] == [("team/red", 50)]
    worker.take(ANA, REF, 10).settle(200_000)
    worker.reserve(ANA, REF, 10).settle(300_000)
    assert [each.percent for each in desk.alarms] == [50, 80, 100]
    worker.reserve(ANA, REF, 10)
    assert [each.percent for each in desk.alarms] == [50, 80, 100]


def test_of_weights_smaller_than_an_answer_it_is_said_once_and_no_alarm_is_sounded(desk):
    told = []
    worker = desk.worker(DEFAULTS, size=1_000_000, small=lambda *said: told.append(said))
    for _ in range(10):
        worker.reserve(ANA, REF, 9000).settle(9000)
    # One percent a month, a tenth for good: of 1 Mbit that is less than an answer, and 100,000 bits.
    assert told == [(REF, 1_000_000)]
    assert [(each.window, each.percent) for each in desk.alarms if each.scope == "team"] == [
        ("lifetime", 50),
        ("lifetime", 80),
    ]
    assert desk.report(DEFAULTS, size=1_000_000)["too_small"]
    assert not desk.report(DEFAULTS, size=100_000_000)["too_small"]


def test_everybody_is_all_versions_of_a_name(desk):
    worker = desk.worker((Rule("everybody", "day", 0.01, hard=True),))
    worker.reserve(ANA, "acme/tiny@1", 60_000)
    worker.reserve(BEN, "acme/other@1", 90_000)
    assert refused(worker, BEN, 40_001, "acme/tiny@2").code == "budget.everybody"


def test_the_report(desk):
    class Use:
        holder, ref, last, releases, copies = "user/eva", REF, NOON, 3, 1

    worker = desk.worker()
    worker.reserve(ANA, REF, 30_000).settle(20_000)
    worker.reserve(BEN, REF, 4000).settle(4000)
    worker.close()
    desk.now += HOUR
    found = desk.report(uses=[Use], answered=(6500, 11_000))
    by = {(each["scope"], each["window"], each["who"]): each for each in found["budgets"]}
    assert by["identity", "day", "user/ana"]["used"] == 20_000
    assert by["identity", "day", "user/ana"]["left"] == 80_000
    assert by["destination", "day", "10.0.0.0/24"]["used"] == 24_000
    assert by["model", "hour", ""] == {
        **by["model", "hour", ""],
        "used": 0,
        "limit": 300_000,
        "hard": True,
        "resets_at": NOON + 2 * HOUR,
    }
    assert by["everybody", "lifetime", ""]["used"] == 24_000
    assert by["everybody", "lifetime", ""]["resets_at"] is None
    # 24,000 bits in 13 hours; a caller has 1 % a day at most, all together 3 % a day.
    assert found["charged_bits_a_day"] == -(-24_000 * 24 // 13)
    assert found["bits_a_day"] == 12_000  # 6,500 in 13 hours: what was drawn in advance has not left
    assert found["exfiltration"] == {
        "current_seconds": -(-SIZE * 13 * HOUR // 6500),
        "charged_seconds": -(-SIZE * 13 * HOUR // 24_000),
        "caller_seconds": 100 * DAY,
        "together_seconds": -(-SIZE * DAY // 300_000),
        "alarm_seconds": None,
    }
    assert (found["releases"], found["copies"], found["artefacts"][0]["holder"]) == (3, 1, "user/eva")


def test_the_report_of_what_nobody_asked(desk):
    found = desk.report(DEFAULTS)
    assert found["bits_a_day"] == found["charged_bits_a_day"] == 0
    assert found["exfiltration"]["current_seconds"] is found["exfiltration"]["charged_seconds"] is None
    # Where the budgets have no counter of the version's day, the log is all that is known.
    alone = desk.report((), answered=(0, 86_400))
    assert alone["bits_a_day"] == alone["charged_bits_a_day"] == 86_400
    assert found["exfiltration"]["together_seconds"] == 0
    assert {each["scope"] for each in found["budgets"]} == {"model", "everybody"}


# -- many workers ----------------------------------------------------------------------------------------------------


def start(desk, seed, threads, answers, *, die=False):
    code = f"from watch.budgets import spend; spend({desk.url!r}, {seed}, {threads}, {answers}, die={die})"
    here = Path(__file__).parents[1]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), *filter(None, [os.environ.get("PYTHONPATH")])])}
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=env, text=True)


def test_processes_and_threads_together_never_pass_a_limit(desk):
    """The sum of what was granted is what is charged, of every scope, to the bit."""
    workers = [start(desk, seed, 6, 400) for seed in range(4)]
    charged: Counter[str] = Counter()
    for worker in workers:
        said, _ = worker.communicate(timeout=240)
        assert worker.returncode == 0
        for line in said.splitlines():
            principal, bits = line.split()
            charged[principal] += int(bits)
    assert sum(charged.values()) == desk.used("model", "day") == desk.used("model", "hour") <= 300_000
    assert sum(charged.values()) == desk.used("everybody", "lifetime", ref="acme/tiny")
    for principal, bits in charged.items():
        assert bits == desk.used("identity", "day", principal) <= IDENTITY
    assert charged["user/ana"] + charged["user/ben"] == desk.used("destination", "day", "10.0.0.0/24") <= 200_000
    assert charged["user/ana"] + charged["user/ben"] == desk.used("team", "day", "team/red")
    assert charged["user/ben"] == desk.used("team", "day", "team/blue")
    # Somebody was refused: there was less than was asked for.
    assert sum(charged.values()) > 200_000


def test_killed_workers_free_nothing(desk):
    chance = random.Random(11)
    granted: Counter[str] = Counter()
    for round_ in range(3):
        workers = [start(desk, round_ * 2 + number, 3, 10_000, die=True) for number in range(2)]
        outputs: list[list[str]] = [[], []]
        readers = [
            threading.Thread(target=lambda out, pipe: out.extend(pipe), args=(out, worker.stdout))
            for out, worker in zip(outputs, workers, strict=True)
        ]
        for reader in readers:
            reader.start()
        # Later rounds may find nothing left to spend, and then say nothing.
        deadline = time.monotonic() + (120 if not round_ else 8)
        while not all(outputs) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(chance.random() / 20)
        for worker in workers:
            os.kill(worker.pid, signal.SIGKILL)
            worker.wait()
        for reader, worker in zip(readers, workers, strict=True):
            reader.join()
            worker.stdout.close()
        for line in [line for out in outputs for line in out if line.endswith("\n")]:
            principal, bits = line.split()
            granted[principal] += int(bits)
    desk.settled()
    assert sum(granted.values()) > 0
    for principal, bits in granted.items():
        assert bits <= desk.used("identity", "day", principal) <= IDENTITY
    assert sum(granted.values()) <= desk.used("model", "day") <= 300_000
    # What is left is what a new worker gets, and no more.
    left = IDENTITY - desk.used("identity", "day", "user/ana")
    elsewhere = Spender("user/ana", "10.77.0.0/24")
    assert refused(desk.worker(RULES[:1]), elsewhere, left + 1).code == "budget.identity"
    desk.worker(RULES[:1]).reserve(elsewhere, REF, left)


OPERATION = st.one_of(
    st.tuples(st.just("reserve"), st.integers(0, 2), st.sampled_from([ANA, BEN]), st.integers(0, 60_000)),
    st.tuples(st.just("settle"), st.integers(0, 30), st.floats(0, 1.2)),
    st.tuples(st.just("clock"), st.sampled_from([-DAY, -HOUR, 30, 61, HOUR, DAY])),
    st.tuples(st.just("tend"), st.integers(0, 2)),
    st.tuples(st.just("die"), st.integers(0, 2)),
)


@settings(max_examples=40)
@given(st.lists(OPERATION, min_size=1, max_size=40))
def test_whatever_happens_no_more_is_granted_than_charged(operations):
    """Three workers on one database: what is granted and not given back is at most what is charged, and that at most
    the limit, but for answers that had more than they reserved."""
    with tempfile.TemporaryDirectory() as folder:
        desk = Desk(f"sqlite:///{folder}/room.db")
        workers = [desk.worker() for _ in range(3)]
        under_way = []
        spent: Counter[tuple[str, int]] = Counter()
        surplus: Counter[tuple[str, int]] = Counter()
        for name, *arguments in operations:
            match name:
                case "reserve":
                    which, who, bits = arguments
                    try:
                        reservation = workers[which].reserve(who, REF, bits)
                    except BudgetExceeded:
                        continue
                    day = (who.principal, reservation._purse.counters[0].key.start)
                    spent[day] += bits
                    under_way.append((reservation, day, bits))
                case "settle":
                    which, part = arguments
                    if which < len(under_way):
                        reservation, day, bits = under_way.pop(which)
                        actual = round(bits * part)
                        reservation.settle(actual)
                        spent[day] += actual - bits
                        surplus[day] += max(actual - bits, 0)
                case "clock":
                    desk.now += arguments[0]
                case "tend":
                    workers[arguments[0]].tend()
                case "die":
                    workers[arguments[0]] = desk.worker()
            for (principal, start), bits in spent.items():
                used = desk.used("identity", "day", principal, at=start)
                assert bits <= used <= IDENTITY + surplus[principal, start]
        desk.db.close()
