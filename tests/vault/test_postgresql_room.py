"""A room whose database is a real PostgreSQL, where those who write do not wait for one another as on SQLite."""

from __future__ import annotations

import threading
import time

import pytest
import sqlalchemy as sa

from strongroom.errors import StrongroomError
from strongroom.vault.roomkeys import RoomKeys
from vault.rooms import OWNER, REF, House

pytestmark = pytest.mark.server


@pytest.fixture
def house(postgresql_url, tmp_path, source):
    """A room in a database of its own."""
    made = House.build(tmp_path / "room", db=postgresql_url)
    made.put(source)
    yield made
    made.close()


def is_held_up(house):
    """Whether somebody in the database waits for somebody else."""
    with house.vault.db.reading() as tx:
        waiting = (
            "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        )
        return tx.execute(sa.text(waiting)).scalar() > 0


@pytest.mark.parametrize("at", ["the journal", "the version"])
@pytest.mark.parametrize("what", ["put", "rotate"])
def test_nothing_is_sealed_under_a_room_key_that_is_replaced_meanwhile(house, other_source, monkeypatch, what, at):
    """Right after it was told which key is in use, and before its transaction ends, another process rotates that."""
    other, watching = House(house.folder), House(house.folder)
    current, asked = RoomKeys.current, []
    replacing = threading.Thread(target=other.vault.keys.rotate)

    def late(keys, tx):
        key = current(keys, tx)
        asked.append(key)
        if len(asked) == (1 if at == "the journal" else 2):
            replacing.start()
            while replacing.is_alive() and not held_up():
                time.sleep(0.01)
        return key

    def held_up():
        found = []
        asking = threading.Thread(target=lambda: found.append(is_held_up(watching)))  # transactions don't nest
        asking.start()
        asking.join()
        return found[0]

    monkeypatch.setattr(RoomKeys, "current", late)
    ref = REF
    if what == "put":
        ref = house.put(other_source, "acme/other").ref
    else:
        house.vault.rotate(REF, by=OWNER)
    replacing.join()
    assert len(asked) == 2
    for each in (house, other, House(house.folder)):
        assert each.vault.verify(ref, deep=True).problems == []
        each.vault.keys.rotate()
        each.close()
    watching.close()


@pytest.mark.parametrize("what", ["put", "rotate"])
def test_nobody_who_begins_while_the_room_key_is_replaced_is_refused(house, other_source, monkeypatch, what):
    """A job that begins meanwhile waits for that, and goes on with the new key."""
    other, watching = House(house.folder), House(house.folder)
    resealed, begun = RoomKeys._reseal, threading.Event()

    def slow(keys, *given):
        begun.set()
        while job.is_alive() and not is_held_up(watching):
            time.sleep(0.01)
        return resealed(keys, *given)

    def begin():
        begun.wait()
        try:
            done.append(house.put(other_source, "acme/other").ref if what == "put" else begin_rotation())
        except StrongroomError as error:
            done.append(error)

    def begin_rotation():
        house.vault.rotate(REF, by=OWNER)
        return REF

    done = []
    job = threading.Thread(target=begin)
    monkeypatch.setattr(RoomKeys, "_reseal", slow)
    job.start()
    other.vault.keys.rotate()
    job.join()
    assert done == ["acme/other@1" if what == "put" else REF]
    assert house.vault.verify(done[0], deep=True).problems == []
    for each in (other, watching):
        each.close()
