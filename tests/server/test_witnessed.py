"""Witnesses that a client wants at every release: without enough of them no key is opened."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain, repeat
from types import SimpleNamespace

import pytest

from ledger.logs import KEY, NOW, Desk
from loopback import free_port
from server.served import REF, Served
from strongroom.client.witnessed import require
from strongroom.core import canonical
from strongroom.crypto.signatures import Signer
from strongroom.errors import CannotVerify, StrongroomError
from strongroom.formats.card import Card, Witnesses
from strongroom.formats.note import ED25519, VerifierKey
from strongroom.ledger.key import LogKey
from strongroom.ledger.witness import Witness, cosign
from strongroom.server.witness import WitnessServer

pytestmark = pytest.mark.server


@pytest.fixture
def stack():
    with ExitStack() as found:
        yield found


def witness(stack, folder, name, key=KEY, clock=lambda: NOW):
    """A witness that answers: its key and address."""
    made = Witness(name, Signer(name.encode().ljust(32, b".")), folder / name, {key.origin: key.verifier}, clock)
    server = stack.enter_context(WitnessServer(made, ("127.0.0.1", 0)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    stack.callback(server.shutdown)
    return made.key, server.url


def silent(stack):
    """Somebody who takes connections and says nothing, and where nobody listens."""
    listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    nowhere = free_port()
    keys = [VerifierKey(name, 4, bytes([number]) * 32) for number, name in enumerate(("mute", "gone"))]
    return [
        (key, f"http://127.0.0.1:{port}") for key, port in zip(keys, (listener.getsockname()[1], nowhere), strict=True)
    ]


@pytest.fixture
def desk(tmp_path):
    made = Desk(tmp_path)
    made.begin()
    made.login(5)
    yield made
    made.db.close()


class TestAQuorum:
    def test_of_those_that_answer_is_enough(self, desk, stack, tmp_path):
        named = [witness(stack, tmp_path, "w1"), witness(stack, tmp_path, "w2"), *silent(stack)]
        for count in (1, 5, 300):
            desk.login(count)
            require(desk.log.checkpoint()[1], Witnesses(tuple(named), 2), KEY, desk.log)

    def test_that_is_not_reached_says_who_and_why(self, desk, stack, tmp_path, monkeypatch):
        mute, gone = silent(stack)
        key, url = witness(stack, tmp_path, "w1")
        wanted = Witnesses(((key, url), mute, gone), 2)
        note = cosign(url, key, desk.log.checkpoint()[1], desk.log.consistency)
        # The time is over once the other two have answered, and not before, however long that takes.
        clock = chain([0.0, 0.0, 0.0], repeat(60.0))
        monkeypatch.setattr("strongroom.client.witnessed.time", SimpleNamespace(monotonic=lambda: next(clock)))
        with pytest.raises(CannotVerify) as caught:
            require(note, wanted, KEY, desk.log, wait=60)
        assert caught.value.code == "release.unwitnessed"
        assert caught.value.evidence["missing"] == ["gone", "mute"]
        assert "mute: no answer within 60 seconds" in caught.value.message
        assert "gone: the witness at" in caught.value.message
        assert "w1" not in caught.value.message

    def test_another_key_under_that_name_is_none(self, desk, stack, tmp_path):
        key, url = witness(stack, tmp_path, "w1")
        with pytest.raises(CannotVerify):
            require(desk.log.checkpoint()[1], Witnesses(((replace(key, public_key=b"x" * 32), url),), 1), KEY, desk.log)

    def test_that_has_seen_a_newer_log_is_asked_for_that(self, desk, stack, tmp_path):
        """Two releases at one time: the one that was recorded first may be the second to come to a witness."""
        key, url = witness(stack, tmp_path, "w1")
        _, released = desk.log.checkpoint()
        desk.login(9)
        cosign(url, key, desk.log.checkpoint()[1], desk.log.consistency)
        require(released, Witnesses(((key, url),), 1), KEY, desk.log)

    def test_that_is_ahead_each_time_it_is_asked(self, desk, stack, tmp_path, monkeypatch):
        """A busy room: whenever the newest checkpoint is fetched, somebody else has a newer one cosigned before."""
        key, url = witness(stack, tmp_path, "w1")
        _, released = desk.log.checkpoint()
        checkpoint, overtaken = desk.log.checkpoint, []

        def overtake():
            desk.login()
            cosign(url, key, checkpoint()[1], desk.log.consistency)

        def overtaken_by_others():
            found = checkpoint()
            if len(overtaken) < 7:
                overtaken.append(found[0].size)
                overtake()
            return found

        overtake()
        monkeypatch.setattr(desk.log, "checkpoint", overtaken_by_others)
        require(released, Witnesses(((key, url),), 1), KEY, desk.log)
        assert len(overtaken) == 7

    def test_a_checkpoint_that_comes_cosigned_needs_nobody_asked(self, desk, stack, tmp_path):
        key, url = witness(stack, tmp_path, "w1")
        note = cosign(url, key, desk.log.checkpoint()[1], desk.log.consistency)
        require(note, Witnesses(((key, "http://127.0.0.1:9"),), 1), KEY, desk.log)

    @pytest.mark.parametrize("longer", [False, True])
    def test_is_not_to_be_had_for_a_log_that_is_shown_to_one_client_only(self, desk, stack, tmp_path, longer):
        key, url = witness(stack, tmp_path, "w1")
        desk.login(20)
        require(desk.log.checkpoint()[1], Witnesses(((key, url),), 1), KEY, desk.log)
        (tmp_path / "other").mkdir()
        other = Desk(tmp_path / "other")
        other.begin()
        other.login(40 if longer else 3)
        with pytest.raises(CannotVerify) as caught:
            require(other.log.checkpoint()[1], Witnesses(((key, url),), 1), KEY, other.log)
        assert caught.value.evidence["missing"] == ["w1"]
        other.db.close()

    def test_nor_by_a_newer_log_that_does_not_have_the_release(self, desk, stack, tmp_path):
        """The custodian shows the client a fork, and then, cosigned, the log that everybody else is shown."""
        key, url = witness(stack, tmp_path, "w1")
        desk.login(20)
        cosign(url, key, desk.log.checkpoint()[1], desk.log.consistency)
        (tmp_path / "other").mkdir()
        other = Desk(tmp_path / "other")
        other.begin()
        other.login(3)
        with pytest.raises(CannotVerify):
            require(other.log.checkpoint()[1], Witnesses(((key, url),), 1), KEY, desk.log)
        other.db.close()


class TestTheCard:
    KEYS = tuple((VerifierKey(name, 4, b"k" * 32), "https://w.example/x") for name in ("w1", "w2"))

    @pytest.mark.parametrize(
        ("named", "quorum"),
        [
            (KEYS, 0),
            (KEYS, 3),
            ((), 0),
            ((KEYS[0], KEYS[0]), 1),
            (((KEYS[0][0], "ftp://w.example"),), 1),
            (((KEYS[0][0], "https://w.example/ x"),), 1),
            (((VerifierKey("w1", ED25519, b"k" * 32), "https://w.example"),), 1),
        ],
    )
    def test_names_some_that_could_be_a_quorum(self, named, quorum):
        with pytest.raises(StrongroomError) as caught:
            Witnesses(named, quorum)
        assert caught.value.code == "card.malformed"

    def test_has_them_or_not_and_nothing_else(self, served):
        plain = served.card
        with_them = replace(plain, witnesses=Witnesses(self.KEYS, 2))
        assert Card.decode(with_them.encode()) == with_them
        value = canonical.decode(with_them.encode(), what="a card")
        for wrong in (None, [], {}, {"named": []}, {"named": [["x"]], "quorum": 1}, {"named": [], "quorum": True}):
            with pytest.raises(StrongroomError):
                Card.decode(canonical.encode({**value, "witnesses": wrong}))
        with pytest.raises(StrongroomError):
            Card.decode(canonical.encode({**value, "more": 1}))


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    made = Served(tmp_path_factory.mktemp("served"))
    yield made
    made.stop()


def test_a_client_that_wants_witnesses_opens_no_key_without_them(served, stack, tmp_path):
    log = LogKey(served.card.room, served.card.log_key)
    now = [witness(stack, tmp_path, name, log, lambda: int(time.time())) for name in ("w1", "w2")]
    (mute, _) = silent(stack)
    card = str(served.folder / "card.json")

    def trust(*named, quorum):
        options = [text for key, url in named for text in ("--witness", key.encode(), url)]
        return served.cli("trust", card, *options, "--quorum", str(quorum))

    told = trust(*now, mute, quorum=2)["witnesses"]
    assert (told["quorum"], [url for _, url in told["named"]]) == (2, [url for _, url in (*now, mute)])
    asked = served.cli("request", REF, "--reason", "evaluation")
    for who in ("user/ben", "user/eva"):
        served.cli("approve", asked["id"], as_=who)
    assert served.cli("run", REF, "--", "true") == ""
    trust(now[0], silent(stack)[1], quorum=2)
    error = served.cli("run", REF, "--", "true", check=6)["error"]
    assert (error["code"], error["evidence"]["missing"]) == ("release.unwitnessed", ["gone"])
    # A card that is trusted anew takes nothing of that back.
    assert served.cli("trust", card)["witnesses"]["quorum"] == 2
    assert served.cli("run", REF, "--", "true", check=6)["error"]["code"] == "release.unwitnessed"
    assert served.cli("trust", card, "--quorum", "1", check=2)["error"]["code"] == "trust.quorum"
    trust(now[0], quorum=1)
    assert served.cli("run", REF, "--", "true") == ""
