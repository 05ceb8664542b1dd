"""A gateway on another machine than the room, from its callers' first word to the room's log."""

from __future__ import annotations

import contextlib
import threading
import time

import pytest

from gateway.places import STREAM, Gateway, Inference, chat, listening, token, whole
from server.served import REF, Served
from strongroom.client import Room
from strongroom.client.gateway import AwayRoom
from strongroom.client.records import Wanted
from strongroom.errors import Conflict, NotFound, Sealed
from strongroom.gateway.settings import Settings
from strongroom.gateway.worker import application

pytestmark = pytest.mark.server

GATE, OTHER = "workload/gate", "workload/other"
ANA = "user/ana"


class Away:
    """A served room, an inference server, and gateways between them that have nothing of the room's but a card."""

    def __init__(self, folder):
        self.served = Served(folder)
        self.inference = Inference()
        self.home = self.served.home
        self.keys = {}
        with Room(self.served.folder, "user/olga") as room:
            for path in (GATE, OTHER):
                key = self.served.identities.create(path).public_key.hex()
                room.principal_add(path, roles=["gateway"], public_key=key)
        self.served.cli("trust", str(self.served.folder / "card.json"))
        self.keys[ANA] = self.served.cli("apikey", "new", as_=ANA)["key"]
        self.records = folder / "records"

    def settings(self, text=""):
        return Settings.parse(f'{text}\n[[upstream]]\nurl = "http://127.0.0.1:{self.inference.port}"\n')

    @contextlib.contextmanager
    def gateway(self, settings="", as_=GATE):
        room = AwayRoom(self.served.card, as_)
        try:
            app = application(room, self.settings(settings), self.records)
            with listening(app) as port:
                found = Gateway(self, port)
                found.app = app
                yield found
        finally:
            room.close()

    def refused(self, path):
        """Why nobody starts a gateway as this principal."""
        with contextlib.closing(AwayRoom(self.served.card, path)) as room, pytest.raises(Sealed) as caught:
            room.check(self.settings())
        assert caught.value.code == "gateway.refused"
        return caught.value.message

    def host(self):
        return Room(self.served.folder, "user/olga")

    def accounts(self):
        with self.host() as room:
            return [each for each in room.log.tail(1000) if each["type"] == "inference"]

    def stop(self):
        self.inference.stop()
        self.served.stop()


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    made = Away(tmp_path_factory.mktemp("away"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STRONGROOM_STATE", str(made.home / "state"))
        patch.setenv("STRONGROOM_IDENTITIES", str(made.home / "identities"))
        yield made
    made.stop()


@pytest.fixture
def away(house):
    house.inference.script = lambda _: [whole()]
    return house


def eventually(what, seconds: float = 5):
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.05)
    return found


def test_a_request_is_answered_charged_and_in_the_log(away):
    with away.gateway() as gateway:
        status, _, found = gateway.post(chat())
        assert (status, found["choices"][0]["message"]["content"]) == (200, "Hello.")
        assert gateway.get("/v1/models")[1]["data"][0]["id"] == REF
        stream = gateway.app._records.stream
    (account,) = [each for each in away.accounts() if each["body"]["gateway"] == stream]
    assert (account["by"], account["ref"]) == (GATE, REF)
    assert account["body"] | {"requests": 1, "refused": 0, "tokens": 3} == account["body"]
    with away.host() as room:
        used = {(each["scope"], each["window"], each["who"]): each["used"] for each in room.budget(REF)["budgets"]}
        assert room.log.verify()["ok"]
        found = room.log.records([away.records], Wanted())
    # What was drawn and not spent was given back.
    assert used["identity", "day", ANA] == used["model", "lifetime", ""] == account["body"]["bits"] > 0
    assert [(each["stream"], each["code"], each["accounted"]) for each in found["streams"]] == [(stream, "", 1)]
    # Neither do the room's own files lie where it ran, nor has its key done anything but relay.
    assert sorted(each.suffix for each in away.records.iterdir()) == [".jsonl"]


def test_what_the_log_changes_is_seen_at_once(away):
    with away.gateway() as gateway, away.host() as room:
        assert gateway.post(chat())[0] == 200
        away.inference.script = lambda _: [STREAM, *([token(" word"), 0.1] * 200)]
        began = time.monotonic()

        def freeze():
            room.revoke(REF, reason="it leaked")

        timer = threading.Timer(0.5, freeze)
        timer.start()
        found = gateway.post(chat(stream=True, max_tokens=400))[2]
        ended = time.monotonic()
        timer.join()
        assert '"frozen"' in found
        assert ended - began < 4
        assert gateway.post(chat())[2]["error"]["code"] == "frozen"
        room.thaw(REF, reason="it was no leak")
        away.inference.script = lambda _: [whole()]
        eventually(lambda: gateway.post(chat())[0] == 200)
        room.principal_change(ANA, state="suspended")
        eventually(lambda: gateway.post(chat())[0] == 401)
        room.principal_change(ANA, state="active")
        # Her key ended with that.
        away.keys[ANA] = away.served.cli("apikey", "new", "--name", "again", as_=ANA)["key"]
        eventually(lambda: gateway.post(chat())[0] == 200)


def test_a_gateway_that_may_not_relay_any_more_answers_nothing(away):
    with away.gateway(as_=OTHER) as gateway, away.host() as room:
        assert gateway.post(chat())[0] == 200
        room.principal_change(OTHER, state="suspended")
        status, _, found = eventually(lambda: (got := gateway.post(chat()))[0] != 200 and got, 3)
        assert (status, found["error"]["code"]) == (503, "sealed")
        assert "does not let workload/other relay" in away.refused(OTHER)
        room.principal_change(OTHER, state="active")
        eventually(lambda: gateway.post(chat())[0] == 200, 10)


def test_who_has_no_right_to_relay_is_no_gateway(away):
    for path in (ANA, "user/ben"):
        assert f"does not let {path} relay" in away.refused(path)


def test_what_can_not_be_done_is_said_at_the_start(away):
    room = AwayRoom(away.served.card, GATE)
    other = away.settings('[[budgets.rule]]\nscope = "identity"\nwindow = "day"\nshare = 0.5\nhard = true\n')
    with pytest.raises(Conflict) as caught:
        room.check(other)
    assert caught.value.code == "budget.other_settings"
    assert "--gateway-settings" in caught.value.hint
    missing = Settings.parse('[[upstream]]\nurl = "http://127.0.0.1:1"\nmodels = { "acme/none@1" = "x" }\n')
    with pytest.raises(NotFound, match="acme/none@1"):
        application(room, missing, away.records)
    room.close()
