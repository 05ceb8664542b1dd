"""Fair queueing: nobody starves, bounds hold, and what is cancelled leaves no hole and keeps no place."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import pytest

from strongroom.errors import LimitExceeded
from strongroom.gateway.queue import FairQueue
from strongroom.gateway.settings import Queue

WIDE = Queue(length=10_000, each=10_000, wait=60)


def run(work):
    return asyncio.run(asyncio.wait_for(work, 60))


async def served(queue, asked, count):
    """The order in which `asked` (who, cost) are served, one at a time, after a first that holds the only place."""
    first = await queue.enter("user/first", 1)
    order: list[str] = []

    async def one(who, cost):
        with await queue.enter(who, cost):
            order.append(who)

    tasks = [asyncio.create_task(one(who, cost)) for who, cost in asked]
    while queue.waiting < count:  # noqa: ASYNC110 - the queue has no event for it
        await asyncio.sleep(0)
    first.leave()
    await asyncio.gather(*tasks)
    return order


def test_a_free_place_is_had_at_once():
    async def work():
        queue = FairQueue(2, WIDE)
        async with asyncio.timeout(60):
            with await queue.enter("user/ana", 10), await queue.enter("user/ana", 10):
                assert queue.waiting == 0

    run(work())


def test_one_who_asks_often_does_not_keep_others_waiting():
    asked = [("user/ana", 1000)] * 60 + [("user/ben", 1000)] * 3
    order = run(served(FairQueue(1, WIDE, quantum=1000), asked, 63))
    assert sorted(at for at, who in enumerate(order) if who == "user/ben") == [1, 3, 5]


def test_one_who_asks_for_much_gets_as_many_tokens_as_others():
    asked = [("user/ana", 4000)] * 20 + [("user/ben", 500)] * 160
    order = run(served(FairQueue(1, WIDE, quantum=4000), asked, 180))
    tokens = Counter()
    for who in order[:90]:
        tokens[who] += 4000 if who == "user/ana" else 500
    assert abs(tokens["user/ana"] - tokens["user/ben"]) <= 4000


def test_asking_for_nothing_is_not_free():
    asked = [("user/ana", 0)] * 100 + [("user/ben", 4096)] * 2
    order = run(served(FairQueue(1, WIDE, quantum=4096), asked, 102))
    assert order.index("user/ben") <= 16


def test_bounds_of_one_and_of_all():
    async def work():
        queue = FairQueue(1, Queue(length=3, each=2, wait=60))
        place = await queue.enter("user/first", 1)
        tasks = [asyncio.create_task(queue.enter(who, 1)) for who in ("user/ana", "user/ana", "user/ben")]
        await asyncio.sleep(0)
        for who, scope in (("user/ana", "everybody"), ("user/eva", "everybody")):
            with pytest.raises(LimitExceeded) as caught:
                await queue.enter(who, 1)
            assert (caught.value.code, caught.value.evidence["scope"]) == ("queue.full", scope)
        place.leave()
        (await tasks[0]).leave()
        for each in tasks[1:]:
            (await each).leave()
        place = await queue.enter("user/first", 1)
        tasks = [asyncio.create_task(queue.enter("user/ana", 1)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(LimitExceeded) as caught:
            await queue.enter("user/ana", 1)
        assert caught.value.evidence["scope"] == "identity"
        place.leave()
        for each in tasks:
            (await each).leave()

    run(work())


def test_a_deadline():
    async def work():
        queue = FairQueue(1, Queue(length=9, each=9, wait=0.02))
        place = await queue.enter("user/first", 1)
        with pytest.raises(LimitExceeded) as caught:
            await queue.enter("user/ana", 1)
        assert caught.value.code == "queue.waited"
        assert queue.waiting == 0
        place.leave()
        place.leave()  # once
        (await queue.enter("user/ana", 1)).leave()
        assert queue._free == 1

    run(work())


def test_cancelled_in_the_moment_when_its_turn_comes():
    async def work():
        queue = FairQueue(1, WIDE)
        place = await queue.enter("user/first", 1)
        waiting = asyncio.create_task(queue.enter("user/ana", 1))
        behind = asyncio.create_task(queue.enter("user/ben", 1))
        await asyncio.sleep(0)
        place.leave()  # it is Ana's turn
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        (await behind).leave()
        # And the other way round: cancelled first, and then its turn.
        place = await queue.enter("user/first", 1)
        waiting = asyncio.create_task(queue.enter("user/ana", 1))
        await asyncio.sleep(0)
        waiting.cancel()
        place.leave()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert (queue._free, queue.waiting, queue._lines, list(queue._order)) == (1, 0, {}, [])

    run(work())


def test_whatever_is_cancelled_no_place_is_lost_and_none_is_made():
    async def work():
        queue, chance = FairQueue(5, Queue(length=200, each=50, wait=0.05), quantum=100), random.Random(5)
        running, most, done = 0, 0, Counter()

        async def one(who):
            nonlocal running, most
            with await queue.enter(who, chance.randrange(0, 500)):
                running += 1
                most = max(most, running)
                try:
                    await asyncio.sleep(chance.random() / 500)
                finally:
                    running -= 1
                done[who] += 1

        tasks = []
        for number in range(1500):
            tasks.append(asyncio.create_task(one(f"user/u{number % 7}")))
            if chance.random() < 0.3:
                chance.choice(tasks).cancel()
            if chance.random() < 0.3:
                await asyncio.sleep(chance.random() / 1000)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(each) for each in results} <= {type(None), asyncio.CancelledError, LimitExceeded}
        assert most == 5
        assert (queue._free, queue.waiting, running) == (5, 0, 0)
        assert queue._lines == {}
        assert len(done) == 7

    run(work())
