"""Two custodians over one PostgreSQL, killed at random under load: nothing that was acknowledged is lost, nothing
forks, and no key has left without an entry."""

from __future__ import annotations

import os
import random
import threading
import time
from dataclasses import replace

import pytest

from server.served import REF, Served
from strongroom.client import Room, reading
from strongroom.client.receive import receive
from strongroom.errors import BackendError, Sealed, StrongroomError

pytestmark = pytest.mark.server

# Servers under load. KILLS=40 is what a release is tried with.
KILLS = int(os.environ.get("KILLS", "5"))


@pytest.fixture
def served(tmp_path, postgresql_url):
    made = Served(tmp_path, db=postgresql_url)
    yield made
    made.stop()


# CPython leaves a socket unclosed where a server dies between accepting a connection and its handshake (ssl._create).
@pytest.mark.filterwarnings("ignore:unclosed <ssl.SSLSocket:ResourceWarning")
def test_killed_at_random_under_load(served, monkeypatch, tmp_path):
    monkeypatch.setenv("STRONGROOM_STATE", str(served.home / "state"))
    monkeypatch.setenv("STRONGROOM_IDENTITIES", str(served.home / "identities"))
    first = served.card
    second = served.start()
    lease(served, first.url, second, duration=86_400)
    urls = [first.url, second]
    released: list[tuple[int, bytes]] = []
    wrong: list[BaseException] = []
    done = threading.Event()

    def load(number):
        chance = random.Random(number)
        while not done.is_set():
            room = room_at(served, chance.choice(urls), "user/ana")
            try:
                found = receive(room._vault, room._say, room.principal, REF, "load")
                assert found.bundle.ref == REF
                released.append((found.index, found.bundle.common_key))
            except (BackendError, Sealed):
                time.sleep(0.1)  # it was killed, or is not up yet: what anybody would do
            except Exception as error:  # noqa: BLE001 - whatever else it is, it is wrong
                wrong.append(error)
            finally:
                room.close()

    threads = [threading.Thread(target=load, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    chance = random.Random(11)
    for _ in range(KILLS):
        time.sleep(1.5 + chance.random())
        victim = chance.randrange(2)
        process = served.processes.pop(victim)
        process.kill()
        process.wait(30)
        urls[victim] = served.start()
    while len(released) <= 20 and not wrong:
        time.sleep(0.1)
    done.set()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[:3]
    host = Room(served.folder, "user/olga")
    report = host.log.verify()
    assert report["ok"]
    entries = host.log._entries(0, report["size"])
    kinds = {item["index"]: item for item in entries}
    for index, _ in released:
        assert kinds[index]["type"] == "release"
        assert kinds[index]["by"] == "user/ana"
    assert len({index for index, _ in released}) == len(released)  # every acknowledged release has an entry of its own
    assert host.fsck().ok
    host.close()


def lease(served, first, second, **options):
    """Ana's lease: asked for at one custodian, approved at both."""
    with room_at(served, first, "user/ana") as ana:
        asked = ana.request("acme/tiny", reason="load", **options)
    for url, who in ((first, "user/ben"), (second, "user/eva")):
        with room_at(served, url, who) as approver:
            approver.approve(asked["id"])


def room_at(served, url, who):
    """A client that has the card of the custodian at `url`: same room, same keys, another address."""
    return Room(replace(served.card, url=url), who)


def test_two_that_use_one_lease_once(served, monkeypatch):
    """One use left, and both custodians asked for it at the same moment: the log's order gives it to one."""
    monkeypatch.setenv("STRONGROOM_STATE", str(served.home / "state"))
    monkeypatch.setenv("STRONGROOM_IDENTITIES", str(served.home / "identities"))
    urls = [served.url, served.start()]
    for _ in range(3):
        lease(served, *urls, uses=1)
        outcomes = []
        barrier = threading.Barrier(6)

        def take(number, outcomes=outcomes, barrier=barrier):
            room = room_at(served, urls[number % 2], "user/ana")
            barrier.wait()
            try:
                reading.keys(room._vault, room._say, room.principal, REF)
                outcomes.append("released")
            except StrongroomError as error:
                outcomes.append(type(error).__name__)
            finally:
                room.close()

        threads = [threading.Thread(target=take, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert outcomes.count("released") == 1
        assert outcomes.count("Denied") == 5
