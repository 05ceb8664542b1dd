"""What the gateway remembers of a room, and for how long."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from gateway.callers import Clock
from gateway.places import ANA, REF
from strongroom.errors import AuthRequired, Denied, Sealed
from strongroom.gateway import door as door_module
from strongroom.gateway.door import Door
from strongroom.vault.callers import Callers
from strongroom.vault.vault import Vault


@pytest.fixture
def vault(place):
    made = Vault(place.folder)
    yield made
    made.close()


def test_a_key_is_remembered_until_it_ends_and_no_longer(place, vault, monkeypatch):
    """That a key ends by time alone is no entry of the log, which would make the gateway forget it."""
    with place.room(ANA) as room:
        key = room.apikeys.new("short", 30)["key"]

    async def ask():
        clock = Clock()
        door = Door(Callers(vault), clock=clock)
        await door.look()
        assert (await door.caller(key)).principal == ANA
        end = int(time.time()) + 31
        monkeypatch.setattr(vault, "clock", lambda: end)
        assert (await door.caller(key)).principal == ANA  # remembered
        clock.now += 31
        with pytest.raises(AuthRequired):
            await door.caller(key)
        door.close()

    asyncio.run(ask())


def test_a_denial_that_is_remembered_keeps_nothing_of_those_who_were_told_it(place, vault):
    async def ask():
        door = Door(Callers(vault))
        await door.look()
        caller = await door.caller(place.keys[ANA])
        depths = set()
        for _ in range(20):
            with pytest.raises(Denied) as caught:
                await door.allow(caller, ["infer", "infer_logprobs"], REF, REF)
            depths.add(len(caught.traceback))
        door.close()
        return depths

    assert len(asyncio.run(ask())) == 1


def test_what_a_look_has_found_is_as_old_as_its_question(vault):
    """Whoever holds back the room's answers would else keep a freeze from the gateway for twice as long."""

    async def ask():
        clock, callers = Clock(), Callers(vault)
        version = callers.version

        def late():
            found = version()
            clock.now += 8
            return found

        callers.version = late
        door = Door(callers, clock=clock)
        await door.look()
        assert door.awake
        clock.now += 3
        with pytest.raises(Sealed):
            door.check()
        door.close()

    asyncio.run(ask())


def test_nobody_waits_for_a_room_behind_all_who_came_before(vault, monkeypatch):
    monkeypatch.setattr(door_module, "_PATIENCE", 0.1)
    go, asked = threading.Event(), []

    async def ask():
        callers = Callers(vault)

        def dark(digest):
            asked.append(digest)
            assert go.wait(60)

        callers.by_key = dark
        door = Door(callers, threads=1)
        keys = [f"sr-{number:043d}" for number in range(20)]
        found = await asyncio.gather(*map(door.caller, keys), return_exceptions=True)
        assert {each.code for each in found} == {"gateway.blind"}
        go.set()
        door.close()
        assert len(asked) == 1  # nor is the room asked what nobody waits for any more

    asyncio.run(ask())
