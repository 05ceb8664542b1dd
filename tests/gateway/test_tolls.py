"""What a request is charged when its client leaves in the middle of being charged."""

from __future__ import annotations

import asyncio
import threading
import time
from types import SimpleNamespace

from gateway.callers import REF, Asker
from strongroom.gateway.answer import Meter
from strongroom.gateway.flight import Flight
from strongroom.gateway.limits import Limits
from strongroom.gateway.request import Asked
from strongroom.gateway.settings import Settings
from strongroom.gateway.tolls import Tolls
from strongroom.storage.db import Database
from strongroom.watch import meter
from strongroom.watch.budget import Budgets
from strongroom.watch.rules import RULES


def charged(**given) -> int:
    """Bits of an answer with five log-probabilities beside each token, of a vocabulary of 1024."""
    limits = Limits(Settings(), time.monotonic)
    tolls = Tolls(Settings(), limits, None, lambda _: 1024, ())  # type: ignore[arg-type] - no budget is asked
    asked = Asked("chat", logprobs=5)
    return tolls._bits(SimpleNamespace(meter=Meter(**given), asked=asked, ref=REF))


def test_log_probabilities_cost_what_they_carry_however_an_answer_ends():
    each = 10 + 6 * (10 + 24)
    assert charged(text_bytes=30, chunks=10, listed=10, spelled=300, reported=10) == 10 * each
    assert charged(text_bytes=30, chunks=10, listed=10, spelled=300) == 10 * (each - 10) + 8 * 30  # it was cut
    assert charged(listed=10, spelled=300) == 10 * (each - 10)
    assert charged(listed=10, spelled=10 * 6 * 16 + 5, reported=10) == 10 * each + 8 * 5


def test_a_client_that_leaves_while_the_database_is_asked_is_charged_nothing(tmp_path):
    """Nothing has been generated yet, and nobody is left to settle it."""
    database = Database.open(f"sqlite:///{tmp_path}/room.db", create=True)
    asked, go = threading.Event(), threading.Event()

    def size(_):
        asked.set()
        assert go.wait(30)
        return 10**9

    budgets = Budgets(database, RULES, size, time.time)
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
    found = budgets.report(REF)
    database.close()
    assert found["gone_bits"] == 0
    assert all(each["used"] == 0 for each in found["budgets"])


def test_a_stream_with_log_probabilities_that_is_cut_is_charged_for_them(tmp_path):
    """Upstream says how many tokens there were at the end only: who leaves before it has had the numbers all the same.
    Eight bits a byte of text are a tenth of what five log-probabilities a token can say."""
    database = Database.open(f"sqlite:///{tmp_path}/room.db", create=True)
    budgets = Budgets(database, RULES, lambda _: 10**9, time.time)
    tolls = Tolls(Settings(), Limits(Settings(), time.monotonic), budgets, lambda _: 1000, ())
    flight = Flight("chat", Asker(), "", "1", "10.0.0.0/24", ref=REF, asked=Asked("chat", logprobs=5), most=20)
    flight.meter = Meter(text_bytes=30, chunks=10, listed=10)

    async def work():
        flight.reserved = tolls._most(flight)
        flight.toll = await tolls._reserve(flight)
        tolls.settle(flight)

    asyncio.run(work())
    budgets.close()
    database.close()
    assert flight.bits == 8 * 30 + meter.bound(10, 1000, logprobs=6) - meter.bound(10, 1000)
    assert flight.bits > meter.bound(10, 1000, logprobs=5)
