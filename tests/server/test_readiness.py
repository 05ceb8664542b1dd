"""Whether a custodian is ready: the key store is asked for it, and not more often than it should be."""

from __future__ import annotations

import threading

import pytest

from server.served import Served
from strongroom.client import Room
from strongroom.errors import BackendError
from strongroom.server.readiness import Readiness


@pytest.fixture
def room(tmp_path):
    made, _ = Room.init(tmp_path / "room", owner="user/olga")
    with made:
        yield made


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_a_key_store_that_is_lost_later_is_seen_and_one_that_is_back_too(room, tmp_path):
    clock = Clock()
    readiness = Readiness(room._vault, clock=clock)
    readiness.check()
    (tmp_path / "room" / "keys").rename(tmp_path / "away")
    readiness.check()  # for a few seconds the last answer is good
    clock.now += 6
    with pytest.raises(BackendError) as caught:
        readiness.check()
    assert caught.value.code == "server.not_ready"
    (tmp_path / "away").rename(tmp_path / "room" / "keys")
    clock.now += 6
    readiness.check()


@pytest.fixture
def counted(room, monkeypatch):
    """The room's key store, real, with the questions to it counted."""
    asked = []
    kind = type(room._vault.keys.keystore)
    real = kind.check
    monkeypatch.setattr(kind, "check", lambda self: asked.append(1) or real(self))
    return asked


def test_nobody_makes_it_hammer_the_key_store(room, counted):
    clock = Clock()
    readiness = Readiness(room._vault, clock=clock)
    for _ in range(50):
        readiness.check()
    assert len(counted) == 1
    clock.now += 6
    threads = [threading.Thread(target=readiness.check) for _ in range(20)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert len(counted) == 2


def test_a_key_store_that_hangs_is_waited_for_once(room, monkeypatch):
    clock, freed, asked = Clock(), threading.Event(), []
    kind = type(room._vault.keys.keystore)
    real = kind.check
    monkeypatch.setattr(kind, "check", lambda self: asked.append(1) or (freed.wait(60) and real(self)))
    readiness = Readiness(room._vault, patience=0.01, clock=clock)
    for _ in range(5):
        with pytest.raises(BackendError):
            readiness.check()
        clock.now += 6
    assert len(asked) == 1
    freed.set()
    readiness._asking.join()
    clock.now += 6
    Readiness(room._vault, clock=clock).check()


@pytest.mark.server
def test_of_a_served_room(tmp_path):
    served = Served(tmp_path)
    try:
        assert served.raw("GET", "/readyz")[0] == 200
        (served.folder / "keys").rename(served.folder / "away")
        while served.raw("GET", "/readyz")[0] == 200:  # until what it knows is old; the test ends by its timeout
            threading.Event().wait(0.2)
        status, headers, body = served.raw("GET", "/readyz")
        assert (status, headers["Content-Type"]) == (503, "application/problem+json")
        assert b"keys" not in body
        assert b"server.not_ready" in body
        assert served.raw("GET", "/healthz")[0] == 200
    finally:
        served.stop()
