"""A gateway on another machine than the room, from its callers' first word to the room's log."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from gateway.callers import Clock
from gateway.places import STREAM, Gateway, Inference, chat, eventually, listening, token, whole
from loopback import free_port
from server.provider import CLIENT
from server.served import REF, Served
from strongroom.client import Room
from strongroom.client.away import callings, line
from strongroom.client.away.room import AwayRoom
from strongroom.client.records import Wanted
from strongroom.crypto.capture import CaptureKey, key_id
from strongroom.errors import (
    AuthRequired,
    BackendError,
    Conflict,
    Denied,
    LimitExceeded,
    NotFound,
    Sealed,
    StrongroomError,
    Tampered,
    UsageError,
)
from strongroom.formats.authority import OIDC, X509, Authority
from strongroom.gateway import door, records
from strongroom.gateway.settings import Settings
from strongroom.gateway.worker import application
from strongroom.policy.engine import Policies
from strongroom.policy.explain import explain
from strongroom.policy.query import Query, Resource, Situation, Subject
from strongroom.storage.session import Session
from strongroom.vault.callers import Caller
from strongroom.watch.budget import Budgets
from strongroom.watch.counters import Key
from strongroom.watch.debts import Debts
from strongroom.watch.drawing import Want
from strongroom.watch.rules import Spender
from strongroom.watch.tallies import Tallies
from strongroom.watch.verdict import Tally
from vault.rooms import write_model
from vault.test_spelling import BYTES

pytestmark = pytest.mark.server

GATE, OTHER = "workload/gate", "workload/other"
ANA = "user/ana"
CI = "spiffe://example.org/ci/eval-7"


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
                found.app, found.room = app, room
                yield found
        finally:
            room.close()

    def refused(self, path):
        """Why nobody starts a gateway as this principal."""
        with contextlib.closing(AwayRoom(self.served.card, path)) as room, pytest.raises(Sealed) as caught:
            room.check(self.settings())
        assert caught.value.code == "gateway.refused"
        return caught.value

    def host(self):
        return Room(self.served.folder, "user/olga")

    def accounts(self):
        with self.host() as room:
            return [each for each in room.log.tail(1000) if each["type"] == "inference"]

    def stop(self):
        self.inference.stop()
        self.served.stop()


@pytest.fixture(scope="module")
def house(tmp_path_factory, provider, domain):
    made = Away(tmp_path_factory.mktemp("away"))
    with made.host() as room:
        for each in (
            Authority(OIDC, provider.issuer, audience=CLIENT, binding="nonce", algorithms=("RS256",), ca=provider.ca),
            Authority(X509, domain.name, bundle=domain.bundle),
        ):
            made.served.cli("approve", room.authority_add(each)["id"], as_="user/eva")
        room.principal_add("user/ida", roles=["researcher"], oidc=f"{provider.issuer}#ida@example.com")
        room.principal_add("workload/ci", roles=["partner"], spiffe=CI)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STRONGROOM_STATE", str(made.home / "state"))
        patch.setenv("STRONGROOM_IDENTITIES", str(made.home / "identities"))
        patch.setattr(line, "_PATIENCE", 60.0)  # no test is about a custodian that is slow
        yield made
    made.stop()


@pytest.fixture
def away(house):
    house.inference.script = lambda _: [whole()]
    return house


def saying(error, *_, **__):
    """In the place of `Session.request`."""
    raise error


def not_at_midnight():
    """Budgets of a day begin anew then (UTC), and what was used of them before is not shown any more."""
    eventually(lambda: time.time() % 86400 < 86400 - 60, 120)


def test_a_request_is_answered_charged_and_in_the_log(away):
    not_at_midnight()
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


def speaking_slowly(inference):
    """It streams 200 words, for 50 seconds; set once it has begun to."""
    begun = threading.Event()

    def script(_):
        yield STREAM
        for number in range(200):
            yield token(" word")
            if number == 1:
                begun.set()
            yield 0.25

    inference.script = script
    return begun


def test_what_the_log_changes_is_seen_at_once(away):
    with away.gateway() as gateway, away.host() as room:
        assert gateway.post(chat())[0] == 200
        begun = speaking_slowly(away.inference)

        def freeze():
            assert begun.wait(60)
            room.revoke(REF, reason="it leaked")

        freezing = threading.Thread(target=freeze)
        freezing.start()
        found = gateway.post(chat(stream=True, max_tokens=400))[2]
        freezing.join()
        assert '"frozen"' in found
        assert found.count('" word"') < 200
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


def test_a_gateway_that_may_not_relay_any_more_answers_nothing(away, monkeypatch):
    monkeypatch.setattr(door, "_BLIND", 300.0)  # it is not because it has not seen the log for a while
    with away.gateway(as_=OTHER) as gateway, away.host() as room:
        assert gateway.post(chat())[0] == 200
        room.principal_change(OTHER, state="suspended")
        status, _, found = eventually(lambda: (got := gateway.post(chat()))[0] != 200 and got)
        assert (status, found["error"]["code"]) == (503, "sealed")
        assert "workload/other" not in found["error"]["message"]  # who the gateway is, is nothing for callers
        why = away.refused(OTHER)
        assert why.message.endswith("does not let workload/other relay: workload/other is suspended in this room")
        assert why.hint == "somebody who may grant runs: strongroom principal restore workload/other"
        why = eventually(lambda: gateway.app.problems().get("log"))
        assert "can't be seen" in why
        assert "does not let workload/other relay" in why
        room.principal_change(OTHER, state="active")
        eventually(lambda: gateway.post(chat())[0] == 200)


def test_who_has_no_right_to_relay_is_no_gateway_and_is_told_what_is_missing(away, monkeypatch):
    keys = {path: away.served.identities.create(path).public_key.hex() for path in ("workload/bare", "workload/none")}
    with away.host() as room:
        room.principal_add("workload/bare", roles=[], public_key=keys["workload/bare"])
        room.principal_add("workload/moved", roles=["gateway"], public_key="5d" * 32)
    keys["workload/moved"] = away.served.identities.create("workload/moved").public_key.hex()
    # A role, where it has none; another principal, where it has one that a gateway's would take the sense of.
    assert away.refused("workload/bare").hint.endswith("strongroom principal role workload/bare gateway")
    for path in (ANA, "user/ben"):
        why = away.refused(path)
        assert f"does not let {path} relay" in why.message
        assert "strongroom principal add workload/NAME --role gateway" in why.hint
    # Nobody of that name, and another key, can't be told apart by who may be anybody: both are said, with the key here.
    for path in ("workload/none", "workload/moved"):
        hint = away.refused(path).hint
        assert f"strongroom principal show {path}" in hint
        assert f"strongroom principal add {path} --role gateway --public-key {keys[path]}" in hint
        assert f"strongroom principal key {path} --public-key {keys[path]}" in hint
    # A policy from before the role: no rule permits it to anybody.
    text = Policies.shipped("team").text
    begin = text.index('@id("gateways-relay")')
    older = Policies.parse(text[:begin] + text[text.index(";", begin) + 1 :])
    told = explain(
        older, Query(Subject(GATE, ("gateway",), (), GATE, suspended=False), "relay", Resource.room(), Situation())
    )

    def request(*_, **__):
        raise told.denied()

    monkeypatch.setattr(Session, "request", request)
    assert "gateways-relay" in away.refused(GATE).hint
    assert "strongroom policy propose FILE" in away.refused(GATE).hint


def test_a_gateway_whose_key_is_gone_is_not_taken_for_a_caller_who_is_nobody(away):
    away.served.identities.create("workload/brief")
    with away.host() as room:
        key = away.served.identities.signer("workload/brief").public_key.hex()
        room.principal_add("workload/brief", roles=["gateway"], public_key=key)
    with contextlib.closing(AwayRoom(away.served.card, "workload/brief")) as elsewhere:
        elsewhere.callers.version()
        (away.home / "identities" / "workload" / "brief.key").unlink()
        for ask in (lambda: elsewhere.callers.by_key("0" * 64), lambda: elsewhere.callers.by_token("a.b.c")):
            with pytest.raises(Sealed) as caught:
                ask()
            assert caught.value.code == "gateway.refused"


def test_what_can_not_be_done_is_said_at_the_start(away):
    room = AwayRoom(away.served.card, GATE)
    other = away.settings('[[budgets.rule]]\nscope = "identity"\nwindow = "day"\nshare = 0.5\nhard = true\n')
    with pytest.raises(Conflict) as caught:
        room.check(other)
    assert caught.value.code == "budget.other_settings"
    assert "--gateway-settings" in caught.value.hint
    room.counters(other.budgets)  # what began under other budgets than the custodian's now
    with pytest.raises(Sealed) as caught:
        room.counters(other.budgets).draw(0, REF, 1, [])
    assert caught.value.code == "gateway.budgets"
    with pytest.raises(UsageError) as caught:
        room.revocations([Path("example.org.crl")])
    assert caught.value.code == "gateway.crl_away"
    assert "strongroom serve --crl" in caught.value.hint
    missing = Settings.parse('[[upstream]]\nurl = "http://127.0.0.1:1"\nmodels = { "acme/none@1" = "x" }\n')
    with pytest.raises(NotFound, match="acme/none@1"):
        application(room, missing, away.records)
    room.close()


def test_a_caller_in_many_teams_is_charged_in_each(away):
    spender = Spender(ANA, "127.0.0.0/24", tuple(f"team/t{number}" for number in range(40)))
    said = away.settings().budgets
    with contextlib.closing(AwayRoom(away.served.card, GATE)) as room:
        budgets = Budgets(room.counters(said), said.rules, lambda _: 1 << 40, time.time)
        budgets.reserve(spender, REF, 1000).settle(0)
        budgets.close()


def test_tokens_and_certificates_are_taken_as_beside_the_room(away, provider, domain):
    nonce = f"gateway-{away.served.card.room.hex()}"
    with away.gateway() as gateway:
        good = provider.token(sub="ida@example.com", nonce=nonce)
        assert gateway.post(chat(), key=good)[0] == 200
        for wrong in (
            provider.token(sub="ida@example.com", nonce="gateway-" + "0" * 32),
            provider.token(sub="eve@example.com", nonce=nonce),
            good[:-4] + "AAAA",
        ):
            assert gateway.post(chat(), key=wrong)[2]["error"]["code"] == "invalid_api_key"
        callers, now = gateway.room.callers, int(time.time())
        eventually(lambda: domain.bundle in callers.bundles())
        chain, _ = domain.svid(CI)
        caller, until = callers.by_certificate(chain, now)
        assert (caller.principal, caller.roles, caller.method) == ("workload/ci", ("partner",), "x509")
        assert now < until <= now + 3600
        for shown in (domain.svid("spiffe://example.org/ci/other")[0], "no chain", ""):
            with pytest.raises(AuthRequired):
                callers.by_certificate(shown, now)
        assert [each.ref for each in callers.models(caller)] == [REF]
        with away.host() as room:
            room.authority_rm(provider.issuer)
        eventually(lambda: gateway.post(chat(), key=good)[0] == 401)


def test_what_is_captured_is_in_the_log_first_and_the_gateway_says_so_itself(away):
    key = CaptureKey().public_key
    with away.gateway(f'[capture]\nkey = "{key.hex()}"\nwho = ["{ANA}"]\n') as gateway:
        stream = gateway.app._records.stream
        (told,) = [each for each in away.accounts() if each["body"]["gateway"] == stream]
        assert (told["by"], told["ref"], told["body"]["capture"]) == (GATE, "", key_id(key))
        assert gateway.post(chat())[0] == 200
    found = [each["body"] for each in away.accounts() if each["body"]["gateway"] == stream]
    assert {each["capture"] for each in found} == {key_id(key)}
    assert sum(each["requests"] for each in found) == 1
    assert len((away.records / f"{stream}.sealed").read_bytes().splitlines()) == 1


def test_what_tokens_spell_and_the_tally_are_the_rooms(away, tmp_path):
    model = write_model(tmp_path / "model", 7)
    (model / "tokenizer.json").write_text(BYTES.to_str(), encoding="utf-8")
    with away.host() as room, contextlib.closing(AwayRoom(away.served.card, GATE)) as elsewhere:
        ref = room.put(model, "acme/words").ref
        spelling = elsewhere.callers.spelling(ref)
        tokens = [*range(40, 60), 257, 258]
        text = BYTES.decode(tokens)
        assert spelling.spells(tokens, text[:9])
        assert not spelling.spells(tokens, text + "x")
        with pytest.raises(UsageError, match=r"no tokenizer\.json"):
            elsewhere.callers.spelling(REF)
        tallies = elsewhere.tallies(5)
        for _ in range(2):
            kept = tallies.add(ref, "float32", Tally(good=7, dangerous=1, open_bits=0.25))
        assert kept.tally == Tally(good=14, dangerous=2, open_bits=0.5)
        assert tallies.now() == [kept] == Tallies(room._embedded.db, 5).now()
        assert elsewhere.tallies(6).now() == []
        room.shred(ref, confirm=ref)
        with pytest.raises(NotFound):  # though it was asked for before
            elsewhere.callers.spelling(ref)


# -- the network, and the custodian, may fail --------------------------------------------------------------------------


class Losing:
    """The network between gateway and custodian: of these paths each `every`th answer is lost, after what was asked is
    done; and while `down` nothing is."""

    def __init__(self, session, paths=(), every=2):
        self.request_, self.paths, self.every = session.request, paths, every
        self.asked, self.down = dict.fromkeys(paths, 0), False

    def __call__(self, method, path, body=b"", headers=None, *, again=True):
        if self.down:
            raise BackendError("server.unreachable", "the cable is cut")
        found = self.request_(method, path, body, headers, again=again)
        name = path.rpartition("/")[2]
        if name in self.paths:
            self.asked[name] += 1
            if self.asked[name] % self.every == 1 % self.every:
                raise BackendError("server.unreachable", "the answer was lost")
        return found


def test_of_lost_answers_none_is_charged_or_counted_twice_or_not_at_all(away, monkeypatch):
    monkeypatch.setattr(records, "_ENTRY_EVERY", 0.1)
    not_at_midnight()
    with away.host() as room:
        before = room.budget(REF)
    with away.gateway() as gateway:
        session = gateway.room._line._session
        lost = Losing(session, ("accounts", "draws", "settlements"))
        monkeypatch.setattr(session, "request", lost)
        statuses = []
        for number in range(24):
            away.inference.script = lambda _, number=number: [whole("x" * (number % 3) * 60, 3)]
            statuses.append(gateway.post(chat(max_tokens=20 + number))[0])
            time.sleep(0.05)
        assert statuses == [200] * 24
        stream = gateway.app._records.stream
    assert min(lost.asked.values()) >= 2, lost.asked  # or nothing was lost
    accounts = [each["body"] for each in away.accounts() if each["body"]["gateway"] == stream]
    assert sum(each["requests"] for each in accounts) == 24
    with away.host() as room:
        assert room.log.verify()["ok"]
        after = room.budget(REF)
        (kept,) = [each for each in room.log.records([away.records], Wanted())["streams"] if each["stream"] == stream]
    assert (kept["records"], kept["accounted"], kept["code"]) == (24, 24, "")
    spent = sum(each["bits"] for each in accounts)
    assert after["logged"]["bits"] - before["logged"]["bits"] == spent
    for scope, who in (("identity", ANA), ("model", "")):
        used = [
            next((each["used"] for each in found["budgets"] if (each["scope"], each["who"]) == (scope, who)), 0)
            for found in (before, after)
        ]
        assert used[1] - used[0] == spent


def test_what_was_drawn_for_nobody_is_given_back(away, monkeypatch):
    """Each answer to a draw is lost, also when it is asked again: its caller is told to come again, and is charged
    nothing."""
    with away.host() as room:
        before = room.budget(REF)["gone_bits"]
    with away.gateway() as gateway:
        session = gateway.room._line._session
        lost = Losing(session, ("draws",), every=1)
        monkeypatch.setattr(session, "request", lost)
        assert {gateway.post(chat(), key=away.keys[ANA])[2]["error"]["code"] for _ in range(3)} == {"sealed"}
        assert lost.asked["draws"] == 6
        with away.host() as room:
            assert room.budget(REF)["gone_bits"] > before
        lost.paths = ()
    with away.host() as room:
        assert room.budget(REF)["gone_bits"] == before


class Busy(Losing):
    """A custodian that tells a gateway to come again, as it tells any address that asks too often."""

    def __call__(self, method, path, body=b"", headers=None, *, again=True):
        if self.down and path.rpartition("/")[2] in self.paths:
            raise LimitExceeded("server.busy", "this address asks too often", hint="wait a second")
        return self.request_(method, path, body, headers, again=again)


def test_what_a_busy_custodian_did_not_take_is_charged_and_given_back_later(away, monkeypatch):
    with contextlib.closing(AwayRoom(away.served.card, GATE)) as room:
        counters = room.counters(away.settings().budgets)
        key = Key("model", "lifetime", 0, "", REF)

        def used():
            with away.host() as host:
                return host.budget(REF)["gone_bits"]

        before = used()
        session = room._line._session
        busy = Busy(session, ("settlements", "draws"))
        monkeypatch.setattr(session, "request", busy)
        busy.down = True
        debts = Debts()
        debts.add({key: 300 + (5 << 32)})
        with pytest.raises(BackendError):
            debts.settle(partial(counters.pay, 0))
        with pytest.raises(BackendError) as caught:
            counters.draw(0, REF, 50, [Want(key, 1000, False, 50)])
        assert caught.value.code == "server.busy"
        assert used() == before
        busy.down = False
        debts.settle(partial(counters.pay, 0))
        assert used() == before + 300 + (5 << 32)
        counters.give_back(0, {key: 5 << 32}, forget=False)
        assert used() == before + 300


def test_what_was_spent_under_other_budgets_is_charged_all_the_same(away, monkeypatch):
    """The custodian's settings, or the gateway's, have changed since: what has left has left."""
    more = '[[budgets.rule]]\nscope = "identity"\nwindow = "hour"\nshare = 0.5\n'  # which the custodian does not have
    with contextlib.closing(AwayRoom(away.served.card, GATE)) as room, away.host() as host:
        old = room.counters(away.settings(more).budgets)
        key = Key("model", "lifetime", 0, "", REF)
        hour = Key("identity", "hour", int(time.time()) // 3600 * 3600, ANA, REF)
        before = host.budget(REF)["gone_bits"]
        old.pay(0, "1" * 32, {key: 300})
        assert host.budget(REF)["gone_bits"] == before + 300
        for _ in range(2):  # a budget that there is not any more takes nothing from the others; and once, in parts too
            old.pay(0, "2" * 32, {hour: 5, key: 7})
        assert host.budget(REF)["gone_bits"] == before + 307
        # While the custodian is away; then it is other settings' turn, and the old ones are never asked again.
        session = room._line._session
        cut = Losing(session)
        monkeypatch.setattr(session, "request", cut)
        cut.down = True
        debts = Debts()
        debts.add({key: 11})
        with pytest.raises(BackendError):
            debts.settle(partial(old.pay, 0))
        cut.down = False
        debts.settle(partial(room.counters(away.settings().budgets).pay, 0))
        assert host.budget(REF)["gone_bits"] == before + 318

        # Where settings are others with each answer, because somebody is changing them, what is owed waits.
        def changing(*_, **__):
            raise Conflict("budget.other_settings", "others", rules="0" * 64)

        debts.add({key: 13})
        with monkeypatch.context() as patch:
            patch.setattr(session, "request", changing)
            with pytest.raises(BackendError):
                debts.settle(partial(old.pay, 0))
        debts.settle(partial(old.pay, 0))
        assert host.budget(REF)["gone_bits"] == before + 331

        # Nor is it forgotten for anything else that a custodian, or what is before it, says for the moment.
        debts.add({key: 17})
        for said in (
            Tampered("budget.clock", "its clock is off"),
            NotFound("server.no_route", "it is being renewed"),
            UsageError("server.body", "somebody is between"),
        ):
            with monkeypatch.context() as patch:
                patch.setattr(session, "request", partial(saying, said))
                with pytest.raises(Sealed) as sealed:
                    debts.settle(partial(old.pay, 0))
            assert sealed.value.code == "gateway.budgets"
            assert said.message in sealed.value.message
        debts.settle(partial(old.pay, 0))
        assert host.budget(REF)["gone_bits"] == before + 348
        with pytest.raises(UsageError) as caught:  # more than an answer can be, as beside the room
            room.counters(away.settings().budgets).draw(0, REF, 1 << 33, [Want(key, 1 << 40, False, 1 << 33)])
        assert caught.value.code == "budget.bits"


def test_a_draw_whose_answer_is_lost_is_given_back_whatever_is_said_then(away, monkeypatch):
    """The first answer is lost, and the second is that the gateway may not, or is to wait."""
    with contextlib.closing(AwayRoom(away.served.card, GATE)) as room:
        counters = room.counters(away.settings().budgets)
        key = Key("model", "lifetime", 0, "", REF)
        said = [
            Denied("denied.default", "you may not"),
            LimitExceeded("server.busy", "you ask too often"),
            Conflict("budget.other_settings", "others"),
        ]
        session, codes = room._line._session, []
        request = session.request

        def lost(method, path, *more, **others):
            if path.endswith("/draws") and asked.pop(0):
                request(method, path, *more, **others)
                raise BackendError("server.unreachable", "the answer was lost")
            if path.endswith("/draws") and not asked and error is not None:
                raise error
            return request(method, path, *more, **others)

        with away.host() as host:
            before = host.budget(REF)["gone_bits"]
            for error in said:  # noqa: B007 - `lost` raises it
                asked = [True, False]
                monkeypatch.setattr(session, "request", lost)
                with pytest.raises(StrongroomError) as caught:
                    counters.draw(0, REF, 50, [Want(key, 1000, False, 50)])
                codes.append(caught.value.code)
                monkeypatch.setattr(session, "request", request)
                assert host.budget(REF)["gone_bits"] > before
                counters.give_back(0, {}, forget=False)
                assert host.budget(REF)["gone_bits"] == before
    assert codes == ["gateway.refused", "server.busy", "gateway.budgets"]


def test_who_can_not_ask_the_room_answers_nothing(away, monkeypatch):
    """Whoever cuts the line between them would keep a freeze from the gateway, too."""
    monkeypatch.setattr(door, "_LOOK_EVERY", 0.05)
    with away.gateway() as gateway:
        assert gateway.post(chat())[0] == 200
        session = gateway.room._line._session
        losing = Losing(session)
        monkeypatch.setattr(session, "request", losing)
        begun = speaking_slowly(away.inference)

        def cut():
            assert begun.wait(60)
            losing.down = True
            monkeypatch.setattr(door, "_BLIND", 2.0)

        cutting = threading.Thread(target=cut)
        cutting.start()
        assert '"sealed"' in gateway.post(chat(stream=True, max_tokens=400))[2]
        cutting.join(60)
        assert gateway.post(chat())[2]["error"]["code"] == "sealed"
        assert gateway.get("/readyz")[0] == 503
        monkeypatch.setattr(door, "_BLIND", 10.0)
        losing.down = False
        away.inference.script = lambda _: [whole()]
        eventually(lambda: gateway.post(chat())[0] == 200)
        assert gateway.get("/readyz")[0] == 200


def test_nobody_waits_for_a_budget_behind_a_network_that_has_gone_dark(away, monkeypatch):
    """Nothing comes back, not even that it can't be reached; and those who ask wait for one another's draws."""
    monkeypatch.setattr(door, "_LOOK_EVERY", 0.05)
    with away.gateway() as gateway:
        assert gateway.get("/v1/models")[0] == 200
        session = gateway.room._line._session
        request, light, waited = session.request, threading.Event(), []

        def dark(method, path, *more, **others):
            if path.endswith("/draws"):
                monkeypatch.setattr(door, "_BLIND", 2.0)
                drawing.set()
            # What the others ask who came a moment later may come through: they are to wait for a budget, too.
            if drawing.is_set() and not light.is_set() and ("/draws" in path or "/version" in path):
                waited.append(light.wait(120))
                raise BackendError("server.unreachable", "nothing came")
            return request(method, path, *more, **others)

        drawing = threading.Event()
        monkeypatch.setattr(session, "request", dark)
        try:
            with ThreadPoolExecutor(4) as threads:
                found = list(threads.map(lambda _: gateway.post(chat())[:1], range(4)))
                assert (found, waited) == ([(503,)] * 4, [])  # nothing has come back by then
        finally:
            light.set()
            monkeypatch.setattr(door, "_BLIND", 10.0)
            monkeypatch.setattr(session, "request", request)
        eventually(lambda: gateway.post(chat())[0] == 200)


def test_questions_that_come_together_are_asked_together(away, monkeypatch):
    asked, taken = [], []

    def counting(self, method, path, body=b"", headers=None, *, again=True):
        if path.endswith("/decisions"):
            asked.append(len(json.loads(body)["asked"]))
        return request(self, method, path, body, headers, again=again)

    request = Session.request
    monkeypatch.setattr(Session, "request", counting)
    caller = ("principal", "method", "action", "ref")
    with contextlib.closing(AwayRoom(away.served.card, GATE)) as room:
        told, together = [], room.callers._together
        send = together._send

        def late(questions):
            """As over a long line: the others have come by then."""
            taken.append(len(questions))
            eventually(lambda: sum(taken) + len(together._waiting) == 12)
            return send(questions)

        together._send = late

        def ask(number):
            question = dict(
                zip(caller, (ANA, "apikey", "infer", REF if number % 2 else f"acme/none@{number + 1}"), strict=True)
            )
            try:
                room.callers._together.ask(question)
                told.append((number % 2, "yes"))
            except NotFound as error:
                told.append((number % 2, error.code))

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
    assert sorted(told) == [(0, "version.missing")] * 6 + [(1, "yes")] * 6
    assert len(asked) <= 4
    assert 7 <= sum(asked) <= 6 + len(asked)  # what is the same is asked once


def test_strangers_leave_the_custodian_to_those_who_are_known(away, monkeypatch):
    """Whoever sends keys that there are not must not use up what the gateway may ask: it would not see the log."""
    monkeypatch.setattr(callings, "_RATE", 0.0)
    monkeypatch.setattr(callings, "_BURST", 5.0)
    with away.gateway() as gateway:
        assert gateway.post(chat())[0] == 200
        said = [gateway.post(chat(), key="sr-" + f"{number:043d}")[0] for number in range(9)]
        assert said == [401] * 4 + [429] * 5
        seen = gateway.app._door.epoch
        with away.host() as room:  # and when all of them are asked about again
            room.set_ceiling(REF, holders=99)
        eventually(lambda: gateway.app._door.epoch > seen)
        for _ in range(5):
            assert gateway.post(chat())[0] == 200
        assert gateway.post(chat(), key="sr-" + "x" * 43)[0] == 429


def test_a_certificate_that_is_known_is_no_stranger_on_its_next_connection():
    """Each connection has a handshake of its own, and is asked about by its time; whose key has been proved again is
    known all the same. Certificates of nobody are strangers', however many connections they make."""
    clock, asked = Clock(), []

    def ask(shown):
        asked.append(shown)
        return (Caller("workload/ci", (), (), "", ""), 9) if shown["chain"] == "good" else None

    found = callings.Callings(ask, clock)
    for at in range(300):
        assert found.of({"chain": "good", "at": at})[0].principal == "workload/ci"
    assert len(asked) == 300  # by its own time each: authorities bound how long one is good
    assert [found.of({"chain": "nobody's", "at": at}) for at in range(99)] == [None] * 99
    with pytest.raises(LimitExceeded):
        found.of({"chain": "nobody's", "at": 99})
    assert found.of({"chain": "good", "at": 301}) is not None


def test_what_many_ask_at_once_is_asked_once_and_anew_when_the_log_has_changed():
    asked, clock = [], Clock()

    def ask(shown):
        asked.append(shown["key"])
        if shown["key"] == "down":
            raise BackendError("server.unreachable", "no")
        time.sleep(0.05)
        return None if shown["key"] == "none" else (Caller(ANA, (), (), ANA, ""), 9)

    found = callings.Callings(ask, clock)
    with ThreadPoolExecutor(8) as threads:
        assert {each[0].principal for each in threads.map(found.of, [{"key": "good"}] * 8)} == {ANA}
        assert set(threads.map(found.of, [{"key": "none"}] * 8)) == {None}
    assert sorted(asked) == ["good", "none"]
    found.changed()
    found.of({"key": "good"})
    clock.now += 1.1
    found.of({"key": "good"})
    assert asked.count("good") == 3
    for _ in range(2):  # what has failed is nobody's answer
        with pytest.raises(BackendError):
            found.of({"key": "down"})
    assert asked.count("down") == 2


# -- as it is run ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def started(away, folder, *options):
    """`strongroom gateway` in a process of its own, with its records in `folder`."""
    port = free_port()
    command = [sys.executable, "-m", "strongroom.cli", "--room", away.served.url, "--as", GATE, "--json", "gateway"]
    command += ["--listen", f"127.0.0.1:{port}", "--upstream", f"http://127.0.0.1:{away.inference.port}", *options]
    with (folder / "stderr").open("ab") as stderr:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, cwd=folder)
    try:
        assert json.loads(line := process.stdout.readline()).get("url"), line
        yield process, Gateway(away, port)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_who_kills_a_gateway_while_its_custodian_is_away_has_nothing_for_nothing(away, tmp_path):
    """An answer with all the text that one may have is more than was reserved for it, and than its worker has drawn."""

    def used():
        with away.host() as room:
            found = {(each["scope"], each["who"]): each["used"] for each in room.budget(REF)["budgets"]}
        return found.get(("identity", ANA), 0)

    def recorded():
        lines = [line for path in kept.glob("*.jsonl") for line in path.read_bytes().splitlines()]
        return [json.loads(line)["bits"] for line in lines]

    before, kept = used(), tmp_path / "inference"
    custodian = away.served.processes[0]

    def cut(_):
        custodian.send_signal(signal.SIGSTOP)
        return [whole("x" * 60_000, 4096)]

    try:
        with started(away, tmp_path) as (process, gateway):
            assert {gateway.post(chat(max_tokens=4096))[0] for _ in range(2)} == {200}
            away.inference.script = cut
            assert gateway.post(chat(max_tokens=4096))[0] == 200
            (owed,) = kept.glob("*.owed")  # before it was given out
            assert json.loads(owed.read_bytes())["bits"]
            eventually(lambda: len(recorded()) == 3)
            process.kill()
            process.wait()
    finally:
        custodian.send_signal(signal.SIGCONT)
    spent = sum(recorded())
    away.inference.script = lambda _: [whole()]
    with started(away, tmp_path) as (process, gateway):
        # What the custodian finds in its connections when it goes on may have charged it already.
        eventually(lambda: used() - before == spent)
        assert gateway.post(chat())[0] == 200
        process.terminate()
        assert process.wait(120) in (0, -signal.SIGTERM)
    assert used() - before == sum(recorded()) > spent
    assert [*kept.glob("*.owed"), *kept.glob(".*")] == []


def test_the_command_with_several_workers_and_new_settings(away, tmp_path):
    file, said = tmp_path / "gateway.toml", tmp_path / "stderr"
    file.write_text("[answer]\nmax_tokens = 2000\n")
    with started(away, tmp_path, "--settings", str(file), "--workers", "2") as (process, gateway):
        assert {gateway.post(chat(max_tokens=2000))[0] for _ in range(12)} == {200}
        file.write_text('[[budgets.rule]]\nscope = "team"\nwindow = "hour"\nshare = 0.5\n')
        process.send_signal(signal.SIGHUP)
        eventually(lambda: "by other settings than the custodian" in said.read_text(), 120)
        assert gateway.post(chat(max_tokens=2001))[0] == 400  # the old ones stay
        file.write_text("[answer]\nmax_tokens = 3000\n")
        process.send_signal(signal.SIGHUP)
        eventually(lambda: "new settings are in force" in said.read_text(), 120)
        assert {gateway.post(chat(max_tokens=3000))[0] for _ in range(12)} == {200}
        process.terminate()
        assert process.wait(120) in (0, -signal.SIGTERM)
    found = away.served.cli("records", "--records", str(tmp_path / "inference"), as_="user/ada", check=None)
    mine = [each for each in found["streams"] if each["code"] != "records.elsewhere"]
    assert len(mine) == 2
    assert all(each["records"] == each["accounted"] and not each["code"] for each in mine)
    assert sum(each["records"] for each in mine) == 25
