"""What the gateway remembers of a room, and for how long."""

from __future__ import annotations

import asyncio
import time

import pytest

from gateway.callers import Clock
from gateway.places import ANA, REF
from strongroom.errors import AuthRequired, Denied
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
