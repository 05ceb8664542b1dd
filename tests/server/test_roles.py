"""Who may do what over HTTP: every route, asked by every role, by people who were something, and by strangers."""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
import time

import pytest

from server.served import PEOPLE, REF, Served
from server.test_http import call
from server.test_openapi import conforms
from strongroom.client import Room
from strongroom.core.clock import unix
from strongroom.crypto.reading import make_pass
from strongroom.crypto.release import ReleaseKey
from strongroom.crypto.signatures import Signer
from strongroom.formats.authority import Authority
from strongroom.formats.entry import Private
from strongroom.formats.statement import Statement, Voice
from strongroom.formats.stream import fresh
from strongroom.formats.suspect import FoundFile, FoundFiles, suspect_digest
from strongroom.formats.upload import Upload, UploadFile
from strongroom.gateway.settings import Budgets
from strongroom.server.operations import CALL, NOBODY, OPERATIONS, PASS, STATEMENT
from strongroom.vault.sent import Sent
from strongroom.watch.relayed import digest_of
from vault.authenticator import Authenticator

pytestmark = pytest.mark.server

ROLES = {role: path for path, role in PEOPLE.items()}
ROLES |= {"operator": "user/oto", "partner": "user/pat", "gateway": "workload/gate"}
OTHERS = {"suspended": "user/sus", "removed": "user/rem", "unknown": "user/nobody", "nobody": ""}
EVERYBODY = {*ROLES, *OTHERS}
GUESTS = {"partner", "gateway"}
INSIDE = {*ROLES} - GUESTS
GATEWAYS = (
    *("gateway_version", "gateway_callers", "gateway_decisions", "gateway_models", "gateway_spellings"),
    *("gateway_draws", "gateway_settlements", "gateway_tallies", "inference"),
)
AUDIT = {"officer", "auditor"}
RULES = digest_of(Budgets().rules, Budgets().bits_per_parameter, Budgets().compression)

# For each route, who is not refused. Everybody else gets 401 (if the room does not know them) or 403.
MAY = {
    "challenge": EVERYBODY,
    "release": {"researcher"},
    "requests": set(ROLES),
    "request": {"researcher", "operator", "partner"},
    "show_request": INSIDE,
    "approve": {"officer", "executive"},
    "deny": {"officer", "executive", "researcher"},  # who asked takes it back
    "leases": set(ROLES),
    "renew": {"officer", "executive"},
    "revoke": {"officer", "executive", "researcher"},  # and gives back what it was given
    "principals": set(ROLES),
    "principal": {"officer", "executive"},
    "show_principal": INSIDE,
    "login": set(),  # with what is no token: nobody gets in
    "authorities": INSIDE,
    "authority": {"officer", "executive"},
    "passkey": set(ROLES),
    "apikey": set(ROLES),
    "apikeys": set(ROLES),  # one's own, but for those who may audit or grant
    "policy": INSIDE,
    "propose": {"officer"},
    "enact": {"officer"},
    "budgets": AUDIT,
    "ceilings": INSIDE,
    "act": {"officer"},
    "weights": set(ROLES),
    "put": {"operator"},
    "show": set(ROLES),
    "check_put": {"operator"},
    "trace": {"operator", "officer"},
    "check_trace": {"operator", "officer"},
    "show_trace": {"officer"},  # who began it
    "stop_trace": {"officer"},
    "reach": set(ROLES),
    "review": AUDIT,
    "status": INSIDE,
    "object": EVERYBODY,  # who has a pass: it was given to a holder
    "checkpoint": set(ROLES),
    "consistency": set(ROLES),
    "tile": AUDIT,
    **{each: {"gateway"} for each in GATEWAYS},
    "openapi": EVERYBODY,
    "metrics": AUDIT,
    "alive": EVERYBODY,
    "ready": EVERYBODY,
}
# What concerns others is answered to a guest as if it were not there.
HIDDEN = {
    (each, role) for each in ("show_request", "show_principal", "approve", "deny", "renew", "revoke") for role in GUESTS
}
HIDDEN |= {(each, role) for each in ("show_trace", "stop_trace") for role in {*ROLES} - {"officer"}}


def test_the_table_has_every_route():
    assert set(MAY) == {each.name for each in OPERATIONS}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    made = Served(tmp_path_factory.mktemp("served"), operators=("user/oto",))
    with Room(made.folder, "user/olga") as room:
        others = (
            ("user/pat", "partner"),
            ("workload/gate", "gateway"),
            ("user/sus", "auditor"),
            ("user/rem", "auditor"),
        )
        for path, role in others:
            room.principal_add(path, roles=[role], public_key=made.identities.create(path).public_key.hex())
        room.principal_change("user/sus", state="suspended")
        room.principal_change("user/rem", state="removed")
    yield made
    made.stop()


class Asker:
    """Requests that are well formed, for every route, as anybody."""

    def __init__(self, served):
        self.served = served
        self.strangers = Signer(b"e" * 32)

    def signer(self, who):
        return self.served.identities.signer(who) if who in self.served.identities.ls() else self.strangers

    def said(self, kind, body, who):
        now, room = int(time.time()), self.served.card.room.hex()
        return Statement.sign(kind, body, room=room, by=who, at=now, signer=self.signer(who)).envelope

    def lease(self, who="user/ana", by=("user/ben", "user/eva")):
        """A request of ana's, and, with `by`, its lease."""
        found = self.send("request", who)
        assert found[0] == 200, found
        request = json.loads(found[2])
        for each in by:
            self.request = request
            assert self.send("approve", each)[0] == 200
        self.request = request
        return request

    def send(self, name, who):
        """Status, headers and body of the answer to a request of this kind by `who`."""
        operation = next(each for each in OPERATIONS if each.name == name)
        path, body = getattr(self, f"_{name}", lambda _: (operation.path, b""))(who)
        headers = {}
        if operation.speaks == CALL and who:
            signed = body
            if name in ("put", "trace"):
                signed = body[4 : 4 + int.from_bytes(body[:4], "big")]
            headers = call(self.served, operation.method, path, who, signer=self.signer(who), body=signed)
        return self.served.raw(operation.method, path, body, headers)

    def _statement(self, kind, body, who, reason=None, **more):
        value = {"statement": self.said(kind, body, who or "user/ana") if who else "", **more}
        if reason is not None:
            value["reason"] = {"value": reason.value, "salt": base64.b64encode(reason.salt).decode()}
        return json.dumps(value).encode()

    def _release(self, who):
        challenge = json.loads(self.served.raw("POST", "/v1/challenges")[2])["nonce"]
        body = {"action": "load", "ref": REF, "holder": who, "public_key": ReleaseKey().public_key.hex()}
        body |= {"challenge": challenge, "break_glass": False, "reason": ""}
        return "/v1/releases", self._statement("release", body, who)

    def _request(self, who):
        reason = Private.fresh("reason", "to test")
        body = {"action": "load", "ref": REF, "for": who, "duration": 60, "uses": None, "reason": reason.commitment}
        return "/v1/requests", self._statement("request", body, who, reason)

    def _show_request(self, _):
        return f"/v1/requests/{self.request['id']}", b""

    def _approve(self, who):
        body = {"request": self.request["digest"], "duration": 0, "uses": None}
        return f"/v1/requests/{self.request['id']}/approve", self._statement("approve", body, who)

    def _deny(self, who):
        reason = Private.fresh("reason", "no")
        body = {"request": self.request["digest"], "reason": reason.commitment}
        return f"/v1/requests/{self.request['id']}/deny", self._statement("deny", body, who, reason)

    def _renew(self, who):
        body = {"lease": self.request["id"], "duration": 0}
        return f"/v1/leases/{self.request['id']}/renew", self._statement("renew", body, who)

    def _revoke(self, who):
        reason = Private.fresh("reason", "no")
        body = {"target": self.request["id"], "reason": reason.commitment}
        return "/v1/revocations", self._statement("revoke", body, who, reason)

    def _principal(self, who):
        body = {
            "principal": f"user/new-{who[5:]}",
            "key": hashlib.sha256(who.encode()).hexdigest(),
            "person": f"user/new-{who[5:]}",
        }
        body |= {"roles": ["researcher"], "teams": [], "state": "active", "before": None}
        return "/v1/principals", self._statement("principal", body, who)

    def _login(self, who):
        body = {"method": "oidc", "authority": "https://id.example", "public_key": "5" * 64, "duration": 60}
        return "/v1/logins", self._statement("login", body, who, proof={"token": "a.b.c"})

    def _passkey(self, who):
        key = Authenticator()
        body = {"key": key.key.hex(), "credential": key.credential, "state": "active"}
        return "/v1/passkeys", self._statement("passkey", body, who)

    def _apikey(self, who):
        body = {"key": secrets.token_hex(32), "principal": who, "name": "ci", "expires_at": int(time.time()) + 60}
        return "/v1/apikeys", self._statement("apikey", {**body, "state": "active"}, who)

    def _authority(self, who):
        name = f"https://{who[5:]}.example"
        said = Authority("oidc", name, audience="room", binding="nonce", algorithms=("ES256",)).encode()
        return "/v1/authorities", self._statement("authority", {"authority": name, "text": said}, who)

    def _show_principal(self, _):
        return "/v1/principals/user/ana", b""

    def _propose(self, who):
        with Room(self.served.folder, "user/olga") as room:
            text = room.policy()["text"] + f"\n// as {who or 'nobody'} would have it\n"
        reason = Private.fresh("reason", "better")
        body = {"digest": hashlib.sha256(text.encode()).hexdigest(), "reason": reason.commitment}
        return "/v1/policies", self._statement("propose", body, who, reason, text=text)

    def _enact(self, who):
        body = {"proposal": self.proposal["id"], "reason": ""}
        return f"/v1/policies/{self.proposal['id']}/enact", self._statement("enact", body, who)

    def _budgets(self, _):
        return f"/v1/budgets?ref={REF}", b""

    def _ceilings(self, _):
        return f"/v1/ceilings?ref={REF}", b""

    def _act(self, who):
        body = {"ref": REF, "holders": 100, "copies": 5, "copiers": 3}
        return "/v1/acts", self._statement("ceiling", body, who)

    def _upload(self, who):
        data = b"{}"
        file = UploadFile("config.json", 2, hashlib.sha256(data).hexdigest(), 2)
        voice = Voice(self.served.card.room.hex(), who or "user/ana", self.signer(who), unix)
        said = Sent.of(voice, "acme/sent", [(file.path, file.sha256)])
        signed = (said.statement.envelope, said.files.salt.hex())
        return Upload("acme/sent", "1/8", 64, "blake3", (file,), *signed).encode()

    def _put(self, who):
        head = self._upload(who)
        return "/v1/weights", len(head).to_bytes(4, "big") + head + b"{}"

    def _check_put(self, who):
        return "/v1/uploads", self._upload(who)

    def _found(self, who):
        voice = Voice(self.served.card.room.hex(), who or "user/ana", self.signer(who), unix)
        files = (FoundFile("config.json", 2, hashlib.sha256(b"{}").hexdigest()),)
        said = voice.say("trace", {"suspect": suspect_digest(files), "ref": None, "lease": None})
        return FoundFiles("found", files, said.envelope).encode()

    def _trace(self, who):
        head = self._found(who)
        return "/v1/traces", len(head).to_bytes(4, "big") + head + b"{}"

    def _check_trace(self, who):
        return "/v1/suspects", self._found(who)

    def _show_trace(self, _):
        return f"/v1/traces/{self.search}", b""

    def _stop_trace(self, _):
        return f"/v1/traces/{self.search}", b""

    def _show(self, _):
        return f"/v1/weights/{REF}", b""

    def _reach(self, _):
        return f"/v1/reach?ref={REF}", b""

    def _gateway_callers(self, _):
        return "/v1/gateway/callers", json.dumps({"key": "0" * 64}).encode()

    def _gateway_decisions(self, _):
        asked = {"principal": "user/ana", "method": "apikey", "action": "infer", "ref": REF}
        return "/v1/gateway/decisions", json.dumps({"asked": [asked, {**asked, "principal": "user/nobody"}]}).encode()

    def _gateway_models(self, _):
        return "/v1/gateway/models", json.dumps({"principal": "user/ana", "method": "apikey"}).encode()

    def _gateway_spellings(self, _):
        return "/v1/gateway/spellings", json.dumps({"ref": REF}).encode()

    def _gateway_draws(self, _):
        taken = {"scope": "model", "window": "lifetime", "start": 0, "who": "", "missing": 100}
        value = {"id": secrets.token_hex(16), "rules": RULES, "ref": REF, "bits": 100, "take": [taken]}
        return "/v1/gateway/draws", json.dumps(value).encode()

    def _gateway_settlements(self, _):
        value = {"id": secrets.token_hex(16), "rules": RULES, "pay": [], "back": []}
        return "/v1/gateway/settlements", json.dumps(value).encode()

    def _gateway_tallies(self, _):
        return "/v1/gateway/tallies", json.dumps({"id": secrets.token_hex(16), "term": 0, "add": None}).encode()

    def _inference(self, who):
        counts = dict.fromkeys(("records", "requests", "refused", "tokens", "bits"), 0)
        body = {"account": 0, "ref": "", "gateway": fresh(self.served.card.room, who), "head": "0" * 64}
        return "/v1/gateway/accounts", self._statement("inference", body | counts | {"settings": "0" * 64}, who)

    def _object(self, _):
        with Room(self.served.folder, "user/olga") as room:
            good = make_pass(room._vault.keys.reading_key, self.served.card.room, int(time.time()) + 60)
        name = next(each for each in (self.served.folder / "store").rglob("*") if each.is_file())
        return f"/v1/objects/{good}/{name.relative_to(self.served.folder / 'store')}", b""

    def _consistency(self, _):
        return "/v1/log/consistency?old=1&new=2", b""

    def _tile(self, _):
        return "/v1/log/tile/entries/000.p/1", b""


@pytest.fixture(scope="module")
def asker(served):
    made = Asker(served)
    made.lease()
    made.proposal = json.loads(made.send("propose", "user/ben")[2])
    made.search = json.loads(made.send("trace", "user/ben")[2])["id"]
    return made


@pytest.mark.parametrize("role", sorted(EVERYBODY))
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda each: each.name)
def test_who_may(asker, operation, role):
    who = {**ROLES, **OTHERS}[role]
    name = operation.name
    if name in ("approve", "deny"):
        asker.lease(by=())  # a fresh one, that waits
    if name in ("renew", "revoke", "release"):
        asker.lease()
    status, headers, body = asker.send(name, who)
    conforms(operation, status, headers, body)
    if role in MAY[name]:
        # Enacting takes a day and a second person, and the model has no tokenizer: somebody who may is told so.
        assert status in (200, 202, 206) or (name, status) in (("enact", 409), ("gateway_spellings", 400)), body
        if operation.speaks in (NOBODY, PASS):
            assert status == 200
    elif (name, role) in HIDDEN:
        assert status == 404, body
    elif operation.speaks == STATEMENT and not who:
        assert status == 422, body  # there is no statement in it
    else:
        assert status == (401 if role in OTHERS or name == "login" else 403), body
        # A gateway that is suspended is told so, with whose key it asks; nobody else is.
        told = "principal.suspended" if role == "suspended" and name.startswith("gateway_") else "auth.refused"
        assert json.loads(body)["code"] == told or role in ROLES
