"""What whoever holds the key of one gateway, or of none, can try on the routes that gateways ask (spec/http.md, section
10): it gets what one gateway may, and says nothing in the name of another."""

from __future__ import annotations

import contextlib
import json
import secrets
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from server.served import REF, Served
from server.test_http import call
from strongroom.client import Room
from strongroom.errors import AuthRequired, LimitExceeded
from strongroom.formats.statement import Statement
from strongroom.formats.stream import fresh
from strongroom.gateway.settings import Budgets
from strongroom.server.calls import Calls
from strongroom.server.relays import Relays
from strongroom.vault.vault import Vault
from strongroom.watch.relayed import digest_of

pytestmark = pytest.mark.server

GATE, OTHER, ANA = "workload/gate", "workload/other", "user/ana"
HEAD = "5" * 64


class Gates(Served):
    """A served room with two gateways; what is asked is asked past our own client."""

    def __init__(self, folder):
        super().__init__(folder)
        with Room(self.folder, "user/olga") as room:
            for path in (GATE, OTHER):
                key = self.identities.create(path).public_key.hex()
                room.principal_add(path, roles=["gateway"], public_key=key)
        self.cli("trust", str(self.folder / "card.json"))
        self.streams = {path: fresh(self.card.room, path) for path in (GATE, OTHER)}

    def ask(self, name, value, who=GATE):
        path, body = f"/v1/gateway/{name}", value if isinstance(value, bytes) else json.dumps(value).encode()
        status, _, found = self.raw("POST", path, body, call(self, "POST", path, who, body=body))
        return status, json.loads(found)

    def said(self, account, who=GATE, *, signer=None, at=None, kind="inference", **changes):
        """The body of a request with a signed account."""
        body = {"account": account, "ref": REF, "gateway": self.streams.get(who, "0" * 32), "records": 1, "head": HEAD}
        body |= {**dict.fromkeys(("requests", "refused", "tokens", "bits"), 1), "settings": HEAD, **changes}
        if kind == "call":
            body = {"method": "POST", "path": "/v1/gateway/accounts", "body": HEAD}
        signed = (signer or self.identities.signer(who), at or int(time.time()))
        said = Statement.sign(kind, body, room=self.card.room.hex(), by=who, at=signed[1], signer=signed[0])
        return json.dumps({"statement": said.envelope}).encode()

    def account(self, body, path="/v1/gateway/accounts"):
        status, _, found = self.raw("POST", path, body)
        return status, json.loads(found)


@pytest.fixture(scope="module")
def gates(tmp_path_factory):
    made = Gates(tmp_path_factory.mktemp("gates"))
    yield made
    assert made.host("log", "verify")["ok"]  # whatever they have tried
    made.stop()


def test_an_account_is_told_once(gates):
    first = gates.said(0)
    status, found = gates.account(first)
    assert (status, found["type"], found["body"]["bits"]) == (200, "inference", 1)
    assert gates.account(first) == (200, found)  # the very same bytes: whoever lost the answer sends them again
    status, again = gates.account(gates.said(0, bits=7))
    assert (status, again["code"], again["evidence"]) == (409, "inference.told", {"accounts": 1})
    assert gates.account(gates.said(2))[1]["code"] == "inference.behind"
    assert gates.account(gates.said(1, records=0))[1]["code"] == "inference.behind"
    assert gates.account(gates.said(1, head="6" * 64))[1]["code"] == "inference.behind"
    assert gates.account(gates.said(1, "user/eve", signer=gates.identities.signer(GATE)))[0] == 401
    assert gates.account(gates.said(1, ref=""))[0] == 200
    with Room(gates.folder, "user/olga") as room:
        found = [each for each in room.log.tail(100) if each["type"] == "inference"]
    assert [(each["by"], each["ref"], each["body"]["bits"]) for each in found] == [(GATE, REF, 1), (GATE, "", 1)]


def test_a_gateway_says_nothing_of_another_ones_stream(gates):
    for stream in (gates.streams[OTHER], "0" * 32, secrets.token_hex(16)):
        status, found = gates.account(gates.said(0, gateway=stream))
        assert (status, found["code"]) == (403, "inference.stream")
    assert gates.account(gates.said(0, OTHER, signer=gates.identities.signer(GATE)))[1]["code"] == "auth.refused"
    assert gates.account(gates.said(0, ANA, gateway=fresh(gates.card.room, ANA)))[0] == 403


@pytest.mark.parametrize("off", [-400, 400])
def test_an_account_is_of_now(gates, off):
    status, found = gates.account(gates.said(0, OTHER, at=int(time.time()) + off))
    assert (status, found["code"]) == (401, "statement.stale")


def test_what_is_no_account(gates):
    for body in (gates.said(0, OTHER, kind="call"), b"{}", b"[]", b'{"statement": 5}', b"\xff", b"{" * 100_000):
        assert gates.account(body)[0] in (400, 422)
    assert gates.account(gates.said(0, OTHER), "/v1/acts")[1]["code"] == "statement.elsewhere"
    assert gates.account(gates.said(0, OTHER, ref="acme/none@1"))[1]["code"] == "inference.malformed"
    assert gates.account(b"x" * (2 * 1024 * 1024 + 1))[1]["code"] == "server.too_large"


def test_who_may_not_relay_is_told_nothing_and_it_is_recorded(gates):
    for name, value in (
        ("callers", {"key": "0" * 64}),
        ("decisions", {"asked": [{"principal": ANA, "method": "apikey", "action": "infer", "ref": REF}]}),
        ("models", {"name": "acme/tiny"}),
        ("tallies", {"id": "0" * 32, "term": 0, "add": None}),
    ):
        status, found = gates.ask(name, value, "user/ben")
        assert (status, found["code"], found["evidence"]["roles"]) == (403, "denied.default", ["gateway"])
    with Room(gates.folder, "user/olga") as room:
        last = room.log.tail(1)[0]
    assert (last["type"], last["by"], last["body"]["action"]) == ("refused", "user/ben", "relay")


def test_that_it_is_suspended_is_told_to_whoever_has_its_key_and_to_nobody_else(gates):
    path, asked = "workload/away", {"name": "acme/tiny"}
    key = gates.identities.create(path).public_key.hex()
    with Room(gates.folder, "user/olga") as room:
        room.principal_add(path, roles=["gateway"], public_key=key)
        assert gates.ask("models", asked, path)[0] == 200
        room.principal_change(path, state="suspended")
        status, found = gates.ask("models", asked, path)
        assert (status, found["code"]) == (401, "principal.suspended")
        assert found["hint"].endswith(f"strongroom principal restore {path}")
        target, body = "/v1/gateway/models", json.dumps(asked).encode()
        for headers in (
            call(gates, "POST", target, path, body=body, signer=gates.identities.signer(GATE)),  # somebody else's key
            call(gates, "POST", target, path, body=body, at=int(time.time()) - 400),
        ):
            status, _, found = gates.raw("POST", target, body, headers)
            assert (status, json.loads(found)["code"]) == (401, "auth.refused")
        assert gates.raw("GET", "/v1/requests", headers=call(gates, "GET", "/v1/requests", path))[0] == 401
        room.principal_change(path, state="removed")
        assert gates.ask("models", asked, path)[1]["code"] == "auth.refused"


def test_callers_are_known_or_nobody_and_nothing_says_why(gates):
    key = gates.cli("apikey", "new", as_=ANA)
    digest = key["id"]
    found = gates.ask("callers", {"key": next(each["key"] for each in gates.cli("apikey", "ls", as_=ANA)["apikeys"])})
    assert (found[0], found[1]["caller"]["principal"], found[1]["caller"]["key"]) == (200, ANA, digest)
    nobody = (200, {"caller": None, "until": 0})
    for shown in ({"key": "0" * 64}, {"token": "a.b.c"}, {"token": ""}, {"chain": "x", "at": 1}, {"token": "\ud800"}):
        assert gates.ask("callers", shown) == nobody
    for wrong in (
        {},
        {"key": "0"},
        {"key": "0" * 64, "token": "a.b.c"},
        {"chain": "x"},
        {"chain": "x", "at": -1},
        {"at": 1},
        {"token": "x" * 65_537},
        {"who": "x"},
    ):
        assert gates.ask("callers", wrong)[0] == 400


def test_a_gateway_is_asked_about_inference_only_and_never_says_that_a_key_has_signed(gates):
    good = {"principal": ANA, "method": "apikey", "action": "infer", "ref": REF}
    assert gates.ask("decisions", {"asked": [good]}) == (200, {"decisions": [None]})
    status, found = gates.ask("decisions", {"asked": [good, {**good, "action": "infer_many"}] * 32})
    assert status == 200
    assert [each and each["code"] for each in found["decisions"]] == [None, "denied.default"] * 32
    for wrong in ({"method": "key"}, {"method": "passkey"}, {"action": "load"}, {"action": "relay"}, {"more": 1}):
        assert gates.ask("decisions", {"asked": [{**good, **wrong}]})[0] == 400
    for wrong in ([], [good] * 65, [None], "x"):
        assert gates.ask("decisions", {"asked": wrong})[0] == 400
    told = [{**good, "principal": each} for each in ("user/nobody", "custodian", "team/x", "x" * 9000)]
    told += [{**good, "ref": each} for each in ("acme/none@1", "", "room", "x" * 9000)]
    status, found = gates.ask("decisions", {"asked": told})
    assert status == 200
    assert None not in found["decisions"]


def test_the_log_takes_so_many_accounts_of_a_gateway_whoever_else_names_it(gates, monkeypatch):
    """Else whoever has its key fills a log that is kept for ever; and strangers must not use up what it may say."""
    vault = Vault(gates.folder)
    with contextlib.closing(vault):
        asked = Relays(vault, Calls(vault.custodian), Budgets())
        monkeypatch.setattr("strongroom.server.relays.time", SimpleNamespace(monotonic=lambda: 1000.0))
        asked._accounts = {OTHER: (2.0, 1000.0)}
        monkeypatch.setattr("strongroom.server.relays._ACCOUNTS", 3.0)
        for _ in range(5):
            with pytest.raises(AuthRequired):
                asked.account(None, gates.said(0, OTHER, signer=gates.identities.signer(GATE)))
        assert asked.account(None, gates.said(0, OTHER))["type"] == "inference"
        assert asked.account(None, gates.said(1, OTHER))["type"] == "inference"
        with pytest.raises(LimitExceeded) as caught:
            asked.account(None, gates.said(2, OTHER))
        assert caught.value.code == "server.busy"


def test_accounts_that_come_at_once_are_counted_each(gates, monkeypatch):
    vault = Vault(gates.folder)
    with contextlib.closing(vault):
        asked = Relays(vault, Calls(vault.custodian), Budgets())
        together = threading.Barrier(8)
        # Else there are more again for each moment that one of them is late.
        monkeypatch.setattr("strongroom.server.relays.time", SimpleNamespace(monotonic=lambda: 1000.0))

        def acted(_):
            together.wait(60)
            return {}

        monkeypatch.setattr(vault.custodian, "acted", acted)
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(lambda number: asked.account(None, gates.said(number, OTHER)), range(8))) == [{}] * 8
        left, _ = asked._accounts[OTHER]
        assert left == 1200 - 8


def test_a_version_is_held_back_and_given_at_once_when_it_changes(gates):
    def look(after):
        path = f"/v1/gateway/version?after={after}"
        began = time.monotonic()
        status, _, body = gates.raw("GET", path, headers=call(gates, "GET", path, GATE))
        return status, json.loads(body), time.monotonic() - began

    now = look("")[1]["version"]
    assert any(look("0")[2] < 0.9 for _ in range(50))  # some of them may take as long on a busy machine
    assert look(now)[2] >= 0.9
    for wrong in ("%00", "x" * 201, "%2e%2e%2f"):
        assert look(wrong)[0] == 400


def test_tallies_are_counted_once(gates):
    runs = {"ref": REF, "arithmetic": "float32", "good": 5, "suspicious": 1, "dangerous": 0, "others": 0, "open": 7}
    value = {"id": secrets.token_hex(16), "term": 3, "add": runs}
    for _ in range(2):
        assert gates.ask("tallies", value) == (200, {"kept": [runs]})
    status, found = gates.ask("tallies", {**value, "id": secrets.token_hex(16)}, OTHER)
    assert (status, found["kept"][0]["good"]) == (200, 10)
    assert gates.ask("tallies", {"id": "0" * 32, "term": 3, "add": None})[1] == found
    assert gates.ask("tallies", {"id": "0" * 32, "term": 4, "add": None})[1] == {"kept": []}
    for wrong in ({"good": -1}, {"good": 1 << 40}, {"arithmetic": "float8"}, {"good": 1.5}, {"more": 1}):
        assert gates.ask("tallies", {**value, "add": {**runs, **wrong}})[0] == 400
    assert gates.ask("tallies", {**value, "add": {**runs, "ref": "acme/none@1"}})[0] == 404


def test_half_a_character_is_refused_and_no_fault_of_ours(gates):
    budgets = Budgets()
    rules = digest_of(budgets.rules, budgets.bits_per_parameter, budgets.compression)
    counter = {"scope": "\ud800", "window": "day", "start": 0, "who": ANA}
    draw = {"id": secrets.token_hex(16), "rules": rules, "ref": REF, "bits": 1, "take": [{**counter, "missing": 1}]}
    settle = {"id": draw["id"], "rules": rules, "pay": [{**counter, "ref": REF, "bits": 1}], "back": []}
    for name, value in (("draws", draw), ("settlements", settle)):
        status, found = gates.ask(name, value)
        assert (status, found["code"]) == (400, "budget.counter")
