"""What a request is charged when its client leaves in the middle of being charged."""

from __future__ import annotations

import asyncio
import threading
import time
from types import SimpleNamespace

from gateway.callers import REF, Asker
from strongroom.errors import BackendError
from strongroom.gateway import tolls as tolls_module
from strongroom.gateway.answer import Meter
from strongroom.gateway.flight import Flight
from strongroom.gateway.limits import Limits
from strongroom.gateway.request import Asked
from strongroom.gateway.settings import Settings
from strongroom.gateway.tolls import Tolls
from strongroom.storage.db import Database
from strongroom.vault.spelling import Spelling
from strongroom.watch import meter
from strongroom.watch.budget import Budgets
from strongroom.watch.counters import Counters, Key
from strongroom.watch.drawing import OwnCounters
from strongroom.watch.rules import RULES, Spender


def charged(*, logprobs: int | None = 5, spelling: Spelling | None = None, **given) -> int:
    """Bits of an answer, with five log-probabilities beside each token, of a vocabulary of 1024."""
    limits = Limits(Settings(), time.monotonic)
    tolls = Tolls(Settings(), limits, None, lambda _: 1024, ())  # type: ignore[arg-type] - no budget is asked
    asked = Asked("chat", logprobs=logprobs)
    return tolls._bits(SimpleNamespace(meter=Meter(**given), asked=asked, ref=REF, spelling=spelling))


def test_log_probabilities_cost_what_they_carry_however_an_answer_ends():
    each = 10 + 6 * (10 + 24)
    assert charged(text_bytes=25, chunks=10, listed=10, named=150, reported=10) == 10 * each
    assert charged(text_bytes=30, chunks=10, listed=10, named=150) == 10 * (each - 10) + 8 * 30  # it was cut
    assert charged(listed=10, named=150) == 10 * (each - 10)
    assert charged(listed=10, named=10 * 6 * 15 + 5, reported=10) == 10 * each + 10 * 6 * (4 * 15 - 10) + 4 * 5


def test_text_is_charged_at_least_half_of_what_it_could_carry_whatever_it_is_said_to_be():
    """An upstream that writes any bytes it likes, and says that each token has 16 of them."""
    said = {"logprobs": None, "chunks": 1}
    assert charged(text_bytes=100, reported=100, **said) == 10 * 100  # honest: one byte a token
    assert charged(text_bytes=250, reported=100, **said) == 10 * 100  # two and a half
    assert charged(text_bytes=1600, reported=100, **said) == 4 * 1600
    assert charged(text_bytes=1601, reported=100, **said) == 8 * 1601
    assert charged(text_bytes=1600, channel=100, channelled=True, sampled={0: [1] * 100}, **said) == 4 * 1600


def test_on_the_channel_a_text_that_its_tokens_do_not_spell_is_charged_as_if_it_hid_all():
    """By lengths alone a server would say that all its tokens were the longest of the vocabulary."""
    spelling = Spelling([b"a", b"bc", b" " * 80], (), spaced=False)
    given = {"logprobs": None, "channelled": True, "channel": 3, "spelling": spelling}
    assert charged(text_bytes=4, sampled={0: [0, 1, 0]}, text={0: ["ab", "ca"]}, **given) == 30
    assert charged(text_bytes=240, sampled={0: [2, 2, 2]}, text={0: [" " * 240]}, **given) == 30
    assert charged(text_bytes=240, sampled={0: [2, 2, 2]}, text={0: ["x" * 240]}, **given) == 8 * 240
    assert charged(text_bytes=240, sampled={0: [2]}, text={0: ["x" * 240]}, text_most=100, **given) == 8 * 100
    # Each choice by its own tokens.
    two = {"sampled": {0: [0], 1: [1, 0]}, "text_bytes": 4}
    assert charged(text={0: ["a"], 1: ["bca"]}, **two, **given) == 30
    assert charged(text={0: ["bca"], 1: ["a"]}, **two, **given) == 32


def test_a_client_that_leaves_while_the_database_is_asked_is_charged_nothing(tmp_path):
    """Nothing has been generated yet, and nobody is left to settle it."""
    database = Database.open(f"sqlite:///{tmp_path}/room.db", create=True)
    asked, go = threading.Event(), threading.Event()

    def size(_):
        asked.set()
        assert go.wait(30)
        return 10**9

    now = int(time.time())  # in the windows of that moment, whichever end meanwhile
    budgets = Budgets(OwnCounters(database), RULES, size, lambda: now)
    tolls = Tolls(Settings(), Limits(Settings(), time.monotonic), budgets, lambda _: 1000, ())
    flight = SimpleNamespace(caller=Asker(), destination="10.0.0.0/24", ref=REF, reserved=5000)

    async def work():
        task = asyncio.create_task(tolls._reserve(flight))
        await asyncio.to_thread(asked.wait, 30)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        go.set()
        await asyncio.get_running_loop().shutdown_default_executor()
        for _ in range(20):
            await asyncio.sleep(0)

    asyncio.run(work())
    budgets.close()
    _, rows = Counters(database).look(now, {REF, "acme/tiny"})
    database.close()
    assert {key.scope for key, _ in rows} == {rule.scope for rule in RULES}
    assert {used for _, used in rows} == {0}


def test_a_stream_with_log_probabilities_that_is_cut_is_charged_for_them(tmp_path):
    """Upstream says how many tokens there were at the end only: who leaves before it has had the numbers all the same.
    Eight bits a byte of text are a tenth of what five log-probabilities a token can say."""
    database = Database.open(f"sqlite:///{tmp_path}/room.db", create=True)
    budgets = Budgets(OwnCounters(database), RULES, lambda _: 10**9, time.time)
    tolls = Tolls(Settings(), Limits(Settings(), time.monotonic), budgets, lambda _: 1000, ())

    async def work():
        flight = Flight("chat", Asker(), SimpleNamespace(destination="10.0.0.0/24"), "1", asyncio.current_task())
        flight.ref, flight.asked, flight.most = REF, Asked("chat", logprobs=5), 20
        flight.meter = Meter(text_bytes=30, chunks=10, listed=10)
        flight.reserved = tolls._most(flight)
        flight.toll = await tolls._reserve(flight)
        tolls.settle(flight)
        return flight

    flight = asyncio.run(work())
    budgets.close()
    database.close()
    assert flight.bits == 8 * 30 + meter.bound(10, 1000, logprobs=6) - meter.bound(10, 1000)
    assert flight.bits > meter.bound(10, 1000, logprobs=5)


def test_nothing_that_goes_wrong_ends_the_looking_after_budgets(monkeypatch, caplog):
    """Tranches of the idle would be kept for ever, and debts be paid by whoever draws next alone."""
    monkeypatch.setattr(tolls_module, "_TEND", 0)
    rounds = []

    def tend():
        rounds.append(1)
        raise RuntimeError("a driver's own") if len(rounds) == 1 else BackendError("db.unavailable", "it is away")

    async def work():
        budgets = SimpleNamespace(tend=tend, owed=0, debts=None)
        tolls = Tolls(Settings(), Limits(Settings(), time.monotonic), budgets, lambda _: 1, ())
        tolls.start()
        async with asyncio.timeout(60):
            while len(rounds) < 3:  # noqa: ASYNC110 - a thread is waited for
                await asyncio.sleep(0.01)
        tolls._tending.cancel()

    asyncio.run(work())
    assert caplog.text.count("budgets could not be looked after") == 1


def test_what_is_owed_when_settings_change_is_charged_when_the_database_is_back(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(tolls_module, "_PAUSE", 0.01)

    def made(fails):
        asked = []

        class Failing(OwnCounters):
            def pay(self, now, identifier, bits):
                asked.append(bits)
                if len(asked) <= fails:
                    raise BackendError("db.unavailable", "it is away")
                super().pay(now, identifier, bits)

        database = Database.open(f"sqlite:///{tmp_path}/{fails}.db", create=True)
        budgets = Budgets(Failing(database), RULES, lambda _: 10**9, time.time)
        tolls = Tolls(Settings(), Limits(Settings(), time.monotonic), budgets, lambda _: 1024, ())
        reservation = budgets.reserve(Spender("user/ana", "10.0.0.0/24"), REF, 1000)
        reservation.settle(100_000_000)
        asyncio.run(tolls.close())
        used = dict(Counters(database).look(int(time.time()), {REF})[1])
        database.close()
        return budgets.owed, used[Key("model", "lifetime", 0, "", REF)]

    assert made(2) == (0, 100_000_000)
    assert not caplog.text
    owed, used = made(99)
    assert owed > 0
    assert used < 100_000_000
    assert f"{owed} bits" in caplog.text  # who runs it is told what no budget has
