"""API keys of a served room: made on the client's machine, whose server never sees one."""

from __future__ import annotations

import json
import time

import pytest

from server.served import Served
from server.test_http import call
from strongroom.client import Room
from strongroom.formats.apikey import digest_of, is_one, make
from strongroom.formats.statement import Statement
from strongroom.vault.callers import Callers

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    made = Served(tmp_path_factory.mktemp("served"))
    with Room(made.folder, "user/olga") as room:
        key = made.identities.create("user/pat").public_key.hex()
        room.principal_add("user/pat", roles=["partner"], public_key=key)
    made.cli("trust", str(made.folder / "card.json"))
    yield made
    made.stop()


def say(served, who, signer=None, **changes):
    body = {"key": digest_of(make()), "principal": who, "name": "ci", "expires_at": int(time.time()) + 60}
    body |= {"state": "active", **changes}
    signer = signer or served.identities.signer(who)
    room = served.card.room.hex()
    said = Statement.sign("apikey", body, room=room, by=who, at=int(time.time()), signer=signer)
    return json.dumps({"statement": said.envelope}).encode()


def test_a_partner_makes_lists_and_ends_one(served):
    made = served.cli("apikey", "new", "--name", "ci", as_="user/pat")
    assert is_one(made["key"])
    assert [each["id"] for each in served.cli("apikey", "ls", as_="user/pat")["apikeys"]] == [made["id"]]
    with Room(served.folder, "user/olga") as room:
        callers = Callers(room._vault)
        assert callers.by_key(digest_of(made["key"]))[0].principal == "user/pat"
        assert [each["id"] for each in served.cli("apikey", "ls", "user/pat", as_="user/ben")["apikeys"]] == [
            made["id"]
        ]
        assert served.cli("principal", "show", "user/pat", as_="user/ben")["apikeys"][0]["id"] == made["id"]
        assert served.cli("apikey", "end", made["id"], as_="user/ben")["state"] == "ended"
        assert callers.by_key(digest_of(made["key"])) is None
    assert made["key"].encode() not in (served.folder.parent / "serve.log").read_bytes()
    assert served.cli("log", "verify", as_="user/ada")["ok"]


def test_a_guest_is_not_told_who_has_keys_and_who_there_is(served):
    for path in ("user/ana", "user/nobody"):
        headers = call(served, "GET", f"/v1/apikeys?principal={path}", "user/pat")
        status, _, body = served.raw("GET", f"/v1/apikeys?principal={path}", b"", headers)
        assert (status, json.loads(body)["code"]) == (403, "denied.default")
        assert path not in body.decode()


def test_what_is_refused(served):
    for who, changes, status, code in (
        ("user/ben", {"principal": "user/pat"}, 403, "apikey.other"),
        ("user/pat", {"signer": served.identities.signer("user/ben")}, 401, "auth.refused"),
        ("user/pat", {"expires_at": 0}, 400, "apikey.time"),
        ("user/pat", {"state": "ended"}, 403, "denied.default"),
        ("user/ben", {"state": "ended"}, 404, "apikey.missing"),
    ):
        answer = served.raw("POST", "/v1/apikeys", say(served, who, **changes), {})
        assert (answer[0], json.loads(answer[2])["code"]) == (status, code)
    other = Statement.sign(
        "thaw",
        {"ref": "acme/tiny@1", "reason": "0" * 64},
        room=served.card.room.hex(),
        by="user/pat",
        at=int(time.time()),
        signer=served.identities.signer("user/pat"),
    )
    answer = served.raw("POST", "/v1/apikeys", json.dumps({"statement": other.envelope}).encode(), {})
    assert (answer[0], json.loads(answer[2])["code"]) == (400, "statement.kind")


def test_an_answer_that_was_lost_is_given_again(served):
    body = say(served, "user/ana")
    first, second = (json.loads(served.raw("POST", "/v1/apikeys", body, {})[2]) for _ in range(2))
    assert first == second
