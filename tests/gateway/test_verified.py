"""What is kept of answers that were run again, whatever becomes of verifier, gateway and database."""

from __future__ import annotations

import asyncio
import json
import threading
from types import SimpleNamespace

import pytest

from gateway.places import Inference, framed
from strongroom.errors import BackendError, Sealed
from strongroom.gateway.answer import Meter
from strongroom.gateway.upstream import Upstream
from strongroom.gateway.verified import Verified
from strongroom.storage.db import Database
from strongroom.watch.tallies import Kept, Tallies
from strongroom.watch.verdict import Tally

REF = "acme/tiny@1"
FLIGHT = SimpleNamespace(ref=REF, route="chat", body={}, meter=Meter(sampled={0: [1]}, text={0: ["a"]}))


def says(arithmetic="float32", **run):
    counts = dict.fromkeys(("good", "suspicious", "dangerous", "others", "open_bits"), 0) | run
    return framed(json.dumps({"run": counts, "arithmetic": arithmetic}).encode())


@pytest.fixture
def verifier():
    made = Inference()
    yield made
    made.stop()


@pytest.fixture
def database(tmp_path):
    made = Database.open(f"sqlite:///{tmp_path}/room.db", create=True)
    yield made
    made.close()


def verified(verifier, database, answers, term=0) -> Verified:
    """A gateway's, after the verifier has given these answers."""

    async def work():
        made = Verified(
            Upstream(f"http://127.0.0.1:{verifier.port}"), 1.0, Tallies(database, term), lambda _: 512, stop=True
        )
        await looked_at(made, verifier, answers)
        return made

    return asyncio.run(work())


async def looked_at(made, verifier, answers):
    """Each of the answers is given, run again, and judged."""
    verify, judged = made._verify, []

    async def counted(*sample):
        try:
            await verify(*sample)
        finally:
            judged.append(sample)

    made._verify = counted
    made.start()
    for number, answer in enumerate(answers):
        verifier.script = lambda _, answer=answer: [answer]
        made.look(FLIGHT)
        async with asyncio.timeout(60):
            while len(judged) == number:  # noqa: ASYNC110 - threads of their own are waited for
                await asyncio.sleep(0.01)
    made.close()
    made._verify = verify


def test_an_alarm_outlives_whoever_raised_it(verifier, database):
    assert verified(verifier, database, [says(good=50)]).verdicts[REF].tokens == 50
    first = verified(verifier, database, [says(good=9, dangerous=1), says(good=40)])
    assert (first.verdicts[REF].tokens, first.verdicts[REF].dangerous) == (100, 1)
    again = verified(verifier, database, [])
    with pytest.raises(Sealed, match="1 of 100 tokens"):
        again.check()
    assert not verified(verifier, database, [says(good=5)], term=1).verdicts[REF].alarm
    with pytest.raises(Sealed, match="1 of 100 tokens"):  # what was counted before is kept
        verified(verifier, database, []).check()


def test_of_each_kind_of_arithmetic_an_alarm_counts(verifier, database):
    made = verified(verifier, database, [says("bfloat16", dangerous=1), says("float32", good=100)])
    with pytest.raises(Sealed, match="1 of 1 tokens"):
        made.check()


def test_no_database_that_fails_clears_an_alarm_and_what_it_missed_is_counted_later(verifier, database, monkeypatch):
    made = verified(verifier, database, [says(dangerous=1)])
    add = Tallies.add

    def fails(*_):
        raise BackendError("db.down", "the database is down")

    async def more(*answers):
        made._verifier = Upstream(f"http://127.0.0.1:{verifier.port}")
        made._samples = asyncio.Queue()
        await looked_at(made, verifier, answers)

    monkeypatch.setattr(Tallies, "add", fails)
    asyncio.run(more(says(good=10), says(good=20)))
    with pytest.raises(Sealed, match="1 of 31 tokens"):
        made.check()
    monkeypatch.setattr(Tallies, "add", add)
    asyncio.run(more(says(good=5)))
    assert made.verdicts[REF].tokens == 36
    assert Tallies(database).newest(REF).tally.tokens == 36


def test_settings_that_are_read_again_meanwhile_lose_no_alarm(verifier, database, monkeypatch):
    """What was found was on its way to a database that is away, and with it the only word of a dangerous token."""
    asked, go = threading.Event(), threading.Event()

    def away(*_):
        asked.set()
        assert go.wait(60)
        raise BackendError("db.down", "the database is down")

    def made():
        return Verified(
            Upstream(f"http://127.0.0.1:{verifier.port}"), 1.0, Tallies(database, 0), lambda _: 1000, stop=True
        )

    async def work():
        first, second = made(), made()
        first.start()
        verifier.script = lambda _: [says(good=9, dangerous=1)]
        first.look(FLIGHT)
        await asyncio.to_thread(asked.wait, 60)
        first.rest()
        second.inherit(first)
        second.check()
        go.set()
        async with asyncio.timeout(60):
            while not second.verdicts:  # noqa: ASYNC110 - a thread is waited for
                await asyncio.sleep(0.01)
        with pytest.raises(Sealed, match="1 of 10 tokens"):
            second.check()
        monkeypatch.undo()
        verifier.script = lambda _: [says(good=5)]
        second.start()
        second.look(FLIGHT)
        async with asyncio.timeout(60):
            while second.verdicts[REF].tokens < 15:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        first.close()
        second.close()

    monkeypatch.setattr(Tallies, "add", away)
    asyncio.run(work())
    tally = Tallies(database).newest(REF).tally
    assert (tally.tokens, tally.dangerous) == (15, 1)


@pytest.mark.parametrize("other", ["is kept", "is lost, too"])
def test_an_alarm_that_is_not_kept_yet_is_not_ended_by_what_comes_meanwhile(verifier, database, monkeypatch, other):
    """Settings were read again: two are on their way at once, and the one that has no alarm comes last."""
    made = verified(verifier, database, [])
    lost, go = threading.Event(), threading.Event()
    add = Tallies.add

    def away(tallies, ref, arithmetic, tally):
        if tally.dangerous:
            raise BackendError("db.down", "the database is down")
        lost.set()
        assert go.wait(60)
        if other == "is kept":
            return add(tallies, ref, arithmetic, tally)
        raise BackendError("db.down", "the database is down")

    async def work():
        good = asyncio.create_task(made._keep(REF, "float32", Tally(good=5)))
        await asyncio.to_thread(lost.wait, 60)
        await made._keep(REF, "float32", Tally(good=9, dangerous=1))
        with pytest.raises(Sealed):
            made.check()
        go.set()
        await good

    monkeypatch.setattr(Tallies, "add", away)
    asyncio.run(work())
    with pytest.raises(Sealed, match="1 of 10 tokens"):
        made.check()
    monkeypatch.undo()
    asyncio.run(made._keep(REF, "float32", Tally(good=5)))
    with pytest.raises(Sealed, match="1 of 20 tokens"):
        made.check()


def test_a_tally_that_is_set_back_ends_no_alarm_of_whoever_has_seen_it(verifier, database):
    made = verified(verifier, database, [says(good=9, dangerous=1)])
    made._judge(made._newest(Kept(REF, 0, "float32", Tally(good=5))))
    with pytest.raises(Sealed, match="1 of 10 tokens"):
        made.check()


@pytest.mark.parametrize(
    "answer",
    [
        framed(b"{}"),
        framed(b"[]"),
        framed(b"{}", "400 No"),
        says(good=-1),
        says(good="1"),
        says(open_bits=float("nan")),
        says(good=True),
        framed(b'{"run": 5, "arithmetic": "x"}'),
        says("float\0"),
        says("float16", good=1),
        says(["float32"], good=1),
    ],
)
def test_a_verifier_that_says_nothing_that_counts(verifier, database, answer):
    made = verified(verifier, database, [answer])
    assert (made.failed, made.verdicts) == (1, {})
    assert Tallies(database).now() == []


def test_nothing_that_goes_wrong_ends_it(verifier, database, monkeypatch):
    """It would be seen by nobody: samples would only wait, and no alarm would ever come."""

    def fails(*_):
        raise RuntimeError("a fault of the driver's")

    add = Tallies.add
    monkeypatch.setattr(Tallies, "add", fails)
    made = verified(verifier, database, [says(good=10)])
    assert made.verdicts[REF].tokens == 10

    monkeypatch.setattr(Tallies, "add", add)
    judge, said = Verified._judge, []

    def fails_once(self, found):
        said.append(found)
        if len(said) == 1:
            raise OSError("the room can't be read")
        judge(self, found)

    monkeypatch.setattr(Verified, "_judge", fails_once)
    made = verified(verifier, database, [says(good=10), says(dangerous=1)])
    assert (made.failed, made.verdicts[REF].good, made.verdicts[REF].dangerous) == (1, 10, 1)


def test_whoever_keeps_the_verifier_busy_does_not_know_what_is_looked_at(verifier, database):
    """Else a server would hide what it hides behind a flood of answers that hide nothing."""

    async def work():
        made = Verified(Upstream("http://127.0.0.1:1"), 1.0, Tallies(database, 0), lambda _: 512, stop=True)
        for k in range(640):
            made.look(SimpleNamespace(**vars(FLIGHT) | {"ref": str(k // 64)}))
        made.close()
        return made.failed, [made._samples.get_nowait()[0] for _ in range(made._samples.qsize())]

    failed, waiting = asyncio.run(work())
    assert (failed, len(waiting)) == (576, 64)
    assert len(set(waiting)) >= 5  # of ten alike; fewer come of it once in 10^20
