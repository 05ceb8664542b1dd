"""The same before a served room: gateway, inference server and verifier are none of them where the room is."""

from __future__ import annotations

import contextlib
import json
import secrets

import pytest

from gateway.places import Gateway, Inference, eventually, framed, listening
from infer.running import Running
from infer.small import REF
from server.served import Served
from strongroom.client import Room
from strongroom.client.away import line
from strongroom.client.away.room import AwayRoom
from strongroom.gateway import records
from strongroom.gateway.settings import Settings
from strongroom.gateway.worker import application

pytestmark = pytest.mark.server

ANA, GATE, OTHER, AUDITOR = "user/ana", "workload/gate", "workload/other", "user/ada"


class Away:
    """A custodian, an inference server with a lease of its own, and the key of whoever asks."""

    def __init__(self, folder, small, patch):
        self.folder = folder
        self.served = Served(folder, custody="solo")
        with Room(self.served.folder, "user/olga") as room:
            room.put(small, "acme/small")
            for path in (GATE, OTHER):
                room.principal_add(
                    path, roles=["gateway"], public_key=self.served.identities.create(path).public_key.hex()
                )
        self.served.cli("trust", str(self.served.folder / "card.json"))
        self.keys = {ANA: self.served.cli("apikey", "new", as_=ANA)["key"]}
        patch.setenv("STRONGROOM_STATE", str(self.served.home / "state"))
        patch.setenv("STRONGROOM_IDENTITIES", str(self.served.home / "identities"))
        patch.setattr(line, "_PATIENCE", 60.0)
        self.channel = folder / "channel"
        self.channel.write_text(secrets.token_hex(32))
        self.channel.chmod(0o600)
        self.honest = Running(folder, REF, "--channel", str(self.channel), served=self.served.url, as_=ANA)
        self.hostile = Inference()

    def settings(self, upstream):
        verify = f'[verify]\nurl = "{self.honest.url}"\nchannel = "{self.channel}"\nshare = 1.0\nstop = true\n'
        before = f'[[upstream]]\nurl = "{upstream}"\nchannel = "{self.channel}"\n'
        return Settings.parse(f'{verify}{before}models = {{"{REF}" = "acme/small"}}\n')

    def smuggling(self, body):
        """An answer of the same weights, but to a seed that the server has chosen: it could choose among millions."""
        asked = {**body, "strongroom": {"seed": body["strongroom"]["seed"] + 1, "record": True}}
        secret = {"strongroom-channel": self.channel.read_text()}
        return [framed(json.dumps(self.honest.raw("POST", "/v1/completions", asked, secret)[1]).encode())]

    @contextlib.contextmanager
    def gateway(self, as_, upstream):
        with contextlib.closing(AwayRoom(self.served.card, as_)) as room:
            app = application(room, self.settings(upstream), self.folder / "records")
            with listening(app) as port:
                found = Gateway(self, port)
                found.app = app
                yield found

    def budget(self):
        return self.served.cli("budget", REF, as_=AUDITOR)

    def stop(self):
        self.hostile.stop()
        self.honest.stop()
        self.served.stop()


@pytest.fixture
def away(small, tmp_path, monkeypatch):
    made = Away(tmp_path, small, monkeypatch)
    yield made
    made.stop()


def ask(gateway, **more):
    return gateway.post(
        {"model": REF, "prompt": "The room has a lock", "max_tokens": 40, **more}, path="/v1/completions"
    )


def tallied(found):
    """What the room has of four answers, once the gateway has told its log of all of them, and the verifier has run
    all of their tokens again: each takes a time of its own."""
    logged, verified = found["logged"], found["verified"]
    return logged["requests"] == 4 and verified is not None and verified["tokens"] >= logged["tokens"] and found


def test_an_honest_server_is_tallied_in_the_room_and_one_that_hides_bits_is_caught_there(away, monkeypatch):
    monkeypatch.setattr(records, "_ENTRY_EVERY", 0.1)
    with away.gateway(GATE, away.honest.url) as gateway:
        for more in ({}, {"temperature": 0.7, "top_p": 0.9}, {"stream": True}, {"temperature": 0}):
            assert ask(gateway, **more)[0] == 200
        # The gateway has none of the weights: a verifier with a lease of its own runs them again, and what that finds
        # is in the room, for whoever audits it.
        found = eventually(lambda: tallied(away.budget()))
        logged, honest = found["logged"], found["verified"]
        assert logged["bits"] == 9 * logged["tokens"] > 0  # E_c, of 512 words
        assert honest["good"] == honest["tokens"] == logged["tokens"]
        assert (honest["alarm"], honest["dangerous"], honest["term"]) == ("", 0, 0)
        assert 0 < honest["hidden_bits"] < logged["bits"] / 10  # E_v

    away.hostile.script = away.smuggling
    with away.gateway(OTHER, f"http://127.0.0.1:{away.hostile.port}") as gateway:
        eventually(lambda: ask(gateway)[0] == 503)
        assert ask(gateway)[2]["error"]["code"] == "sealed"
        assert gateway.get("/readyz") == (503, {"ready": False, "problems": ["verify"]})
        caught = away.budget()["verified"]
        assert "not what these weights and this seed give" in caught["alarm"]
        assert caught["dangerous"] > 0
        assert caught["good"] >= honest["good"]  # one tally of all gateways
        assert caught["hidden_bits"] > 4 * honest["hidden_bits"]

    # The alarm is the room's: whoever starts after it answers nothing, be its server honest.
    with away.gateway(GATE, away.honest.url) as gateway:
        assert ask(gateway)[0] == 503
        assert "not what these weights and this seed give" in gateway.app.problems()["verify"]
