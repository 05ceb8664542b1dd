"""`strongroom serve` attacked by strangers, by people who had rights, and by guests."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import socket
import sqlite3
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from server.served import REF, Served
from server.test_http import call
from strongroom.client import Room
from strongroom.crypto.reading import make_pass
from strongroom.crypto.signatures import Signer
from strongroom.errors import AuthRequired, Denied, NotFound
from strongroom.formats.entry import Private
from strongroom.formats.statement import Statement
from strongroom.policy.engine import Policies
from vault.rooms import write_model

pytestmark = pytest.mark.server

SECRETS = ("room.db", "room.key", "sqlite", "/tmp", "keys/")  # of the custodian's host


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    made = Served(tmp_path_factory.mktemp("served"))
    with Room(made.folder, "user/olga") as room:
        for path in ("user/pat", "user/quin"):
            room.principal_add(path, roles=["partner"], public_key=made.identities.create(path).public_key.hex())
    yield made
    made.stop()


def connect(served):
    context = ssl.create_default_context(cadata=served.card.authority)
    host, port = served.url.removeprefix("https://").split(":")
    return context.wrap_socket(socket.create_connection((host, int(port)), timeout=60), server_hostname=host)


def send(served, data):
    """The status of the answer to these bytes; 0 if there is none."""
    with connect(served) as wire:
        answer = b""
        with contextlib.suppress(OSError):
            wire.sendall(data)
        with contextlib.suppress(OSError):
            answer = wire.recv(65536)
    return int(answer.split()[1]) if answer else 0


def said(served, kind, body, who="user/ana", *, signer=None, at=None):
    signer = signer or served.identities.signer(who)
    now = int(time.time()) if at is None else at
    return Statement.sign(kind, body, room=served.card.room.hex(), by=who, at=now, signer=signer).envelope


def post(served, path, **value):
    status, _, body = served.raw("POST", path, json.dumps(value).encode())
    return status, json.loads(body)


def get(served, path, who):
    status, _, body = served.raw("GET", path, headers=call(served, "GET", path, who))
    return status, json.loads(body)


def release(served, who="user/ana", **more):
    body = {
        "action": "load",
        "ref": REF,
        "holder": who,
        "public_key": "09" + "0" * 62,
        "challenge": "0" * 64,
        "break_glass": False,
        "reason": "",
    }
    return said(served, "release", body, who, **more)


class TestCalls:
    """A call is good for the request that was signed, byte for byte."""

    @pytest.mark.parametrize(
        ("signed", "sent"),
        [
            ("/v1/weights", "/v1/%77eights"),
            ("/v1/weights", "/v1/weights?name=acme/tiny"),
            ("/v1/weights", "/v1//weights"),
            ("/v1/weights?name=acme/tiny", "/v1/weights?name=acme%2Ftiny"),
            ("/v1/log/consistency?old=1&new=2", "/v1/log/consistency?new=2&old=1"),
            ("/v1/requests", "/v1/principals"),
            ("/v1/principals/user/ana", "/v1/principals/user/%61na"),
        ],
    )
    def test_another_spelling(self, served, signed, sent):
        headers = call(served, "GET", signed)
        assert served.raw("GET", signed, headers=headers)[0] == 200
        assert served.raw("GET", sent, headers=headers)[0] in (401, 404)

    @pytest.mark.parametrize("host", ["x/v1/weights?", "x/v1/weights#", "x@y/v1/weights?a=", "", "[", "x:99999999"])
    def test_the_host_is_no_part_of_what_is_compared(self, served, host):
        signed = call(served, "GET", "/v1/weights")["Authorization"]
        head = f"Host: {host}\r\nAuthorization: {signed}\r\nConnection: close\r\n\r\n"
        assert send(served, f"GET /v1/weights HTTP/1.1\r\n{head}".encode()) == 200
        assert send(served, f"GET /v1/requests HTTP/1.1\r\n{head}".encode()) == 401

    def test_two_of_a_header(self, served):
        signed = call(served, "GET", "/v1/weights")["Authorization"]
        good, bad = f"Authorization: {signed}\r\n", "Authorization: Strongroom x\r\n"
        for two in (good + bad, bad + good, good + good):
            assert send(served, f"GET /v1/requests HTTP/1.1\r\nHost: x\r\n{two}\r\n".encode()) == 401
        assert send(served, b"GET /healthz HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n") == 400

    def test_a_call_is_no_decision_and_a_decision_no_call(self, served):
        path = "/v1/requests"
        envelope = base64.urlsafe_b64decode(call(served, "GET", path)["Authorization"].split()[1] + "===").decode()
        assert post(served, path, statement=envelope)[1]["code"] in ("statement.kind", "server.body")
        text = base64.urlsafe_b64encode(release(served).encode()).rstrip(b"=").decode()
        assert served.raw("GET", path, headers={"Authorization": f"Strongroom {text}"})[0] == 401


@pytest.mark.parametrize("state", ["suspended", "removed"])
def test_people_who_had_rights(served, state):
    who = f"user/{state}"
    with Room(served.folder, "user/olga") as room:
        key = served.identities.create(who).public_key.hex()
        room.principal_add(who, roles=["auditor"], public_key=key)
        before = call(served, "GET", "/v1/requests", who)
        assert served.raw("GET", "/v1/requests", headers=before)[0] == 200
        room.principal_change(who, state=state)
    for path in ("/v1/requests", "/v1/log/checkpoint", "/v1/log/tile/entries/000.p/1"):
        for headers in (before, call(served, "GET", path, who)):
            status, _, body = served.raw("GET", path, headers=headers)
            assert (status, json.loads(body)["code"]) == (401, "auth.refused")
    note = Private.fresh("reason", "mine again")
    again = {
        "principal": who,
        "key": key,
        "person": who,
        "roles": ["officer"],
        "teams": [],
        "state": "active",
        "before": None,
    }
    statements = (
        ("/v1/principals", said(served, "principal", again, who), None),
        ("/v1/releases", release(served, who), None),
        ("/v1/revocations", said(served, "revoke", {"target": "user/ben", "reason": note.commitment}, who), note),
    )
    for path, statement, reason in statements:
        told = reason and {"value": reason.value, "salt": base64.b64encode(reason.salt).decode()}
        assert post(served, path, statement=statement, reason=told)[1]["code"] == "auth.refused"


def test_nobody_makes_the_custodian_parse_a_policy(tmp_path, monkeypatch):
    """Which takes seconds: the text is not looked at before the speaker is known, and may administer."""
    room, _ = Room.init(tmp_path / "room", owner="user/olga")
    with room:
        room.principal_add("user/ana", roles=["researcher"])
        ana = Room(tmp_path / "room", "user/ana")
        custodian, text = room._vault.custodian, room.policy()["text"] + "\n// more\n"
        parsed, parse = [], Policies.parse
        monkeypatch.setattr(Policies, "parse", lambda text: parsed.append(text) or parse(text))
        note = Private.fresh("reason", "x")
        body = {"digest": parse(text).digest, "reason": note.commitment}
        room_id, now = room._vault.id.hex(), room._vault.clock()
        for who, refused in (("user/eve", AuthRequired), ("user/olga", AuthRequired)):
            said = Statement.sign("propose", body, room=room_id, by=who, at=now, signer=Signer(b"e" * 32))
            with pytest.raises(refused):
                custodian.propose(said.envelope, text, note)
        with ana, pytest.raises(Denied):
            custodian.propose(ana._say("propose", body), text, note)
        assert parsed == []
        custodian.propose(room._say("propose", body), text, note)
        assert parsed == [text]


class TestStrangers:
    def test_are_told_the_same_of_what_is_there_and_what_is_not(self, served):
        answers = set()
        for ref in (REF, "acme/none@1", "no ref at all"):
            body = {"action": "load", "ref": ref, "holder": "user/eve", "public_key": "0" * 64, "challenge": "0" * 64}
            statement = said(
                served, "release", {**body, "break_glass": False, "reason": ""}, "user/eve", signer=Signer(b"e" * 32)
            )
            status, answer = post(served, "/v1/releases", statement=statement)
            answers.add((status, json.dumps(answer)))
        assert len(answers) == 1


def test_nothing_is_looked_up_for_strangers(tmp_path, monkeypatch):
    """How long that takes would tell them what there is."""
    room, _ = Room.init(tmp_path / "room", owner="user/olga")
    with room:
        custodian, looked = room._vault.custodian, []
        monkeypatch.setattr(custodian, "_looked_up", lambda ref: looked.append(ref) or NotFound("version.missing", ""))
        body = {"action": "load", "ref": REF, "holder": "user/olga", "public_key": "09" + "0" * 62}
        body |= {"challenge": "0" * 64, "break_glass": False, "reason": ""}
        room_id, now = room._vault.id.hex(), room._vault.clock()
        stranger = Statement.sign("release", body, room=room_id, by="user/olga", at=now, signer=Signer(b"e" * 32))
        for envelope, code in ((stranger.envelope, "auth.refused"), (room._say("release", body), "challenge.foreign")):
            with pytest.raises(AuthRequired) as caught:
                custodian.release(envelope)
            assert caught.value.code == code
            assert bool(looked) == (code == "challenge.foreign")


def test_strangers_grow_the_log_by_so_much_a_minute_and_the_rest_is_counted(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("strongroom.vault.refusals.time.monotonic", lambda: now[0])
    room, _ = Room.init(tmp_path / "room", owner="user/olga")
    with room:
        custodian = room._vault.custodian
        room.put(write_model(tmp_path / "model"), "acme/tiny")
        body = {"request": "0" * 64, "duration": 0, "uses": None}
        before = custodian.ledger.checkpoint()[0].size
        for _ in range(75):
            with contextlib.suppress(Exception):
                by, signer = "user/eve", Signer(b"e" * 32)
                when = room._vault.clock()
                statement = Statement.sign("approve", body, room=room._vault.id.hex(), by=by, at=when, signer=signer)
                custodian.approve(statement.envelope)
        newest = room.log.tail(1)[0]
        assert (newest["type"], newest["by"]) == ("refused", "unknown")
        assert newest["index"] == before + 60 - 1
        assert "not recorded" not in room.log.show(newest["index"])["private"]["detail"]
        now[0] += 61
        with contextlib.suppress(Exception):
            custodian.approve(statement.envelope)
        shown = room.log.show(room.log.tail(1)[0]["index"])
        assert shown["index"] == newest["index"] + 1
        assert "15 refusals" in shown["private"]["detail"]
        # People whom the room knows are recorded all the same.
        for _ in range(65):
            with contextlib.suppress(Exception):
                custodian.approve(statement.envelope)
        full = custodian.ledger.checkpoint()[0].size
        with pytest.raises(Denied):
            room.grant("acme/tiny")
        assert custodian.ledger.checkpoint()[0].size == full + 1
        assert room.log.tail(1)[0]["by"] == "user/olga"


class TestConnections:
    def test_bodies_without_end(self, served):
        chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
        head = b"POST /v1/releases HTTP/1.1\r\nHost: x\r\n"
        assert send(served, head + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 33) in (429, 0)
        assert send(served, head + b"Content-Length: 99\r\nContent-Length: 98\r\n\r\n") == 400
        assert send(served, b"GET /healthz HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 300_000 + b"\r\n\r\n") in (400, 0)
        assert served.raw("GET", "/healthz")[0] == 200

    def test_bodies_that_do_not_come_hold_nobody_up(self, served):
        waiting, before = [], sockets(served)
        for _ in range(50):  # more than there are threads, and all of them within the 30 seconds that a body has
            waiting.append(connect(served))
            waiting[-1].sendall(b"POST /v1/releases HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
        assert served.raw("POST", "/v1/challenges")[0] == 200
        assert get(served, "/v1/weights", "user/ana")[0] == 200
        # Those were answered while these were waited for still.
        for each in waiting:
            each.settimeout(0.0)
            with pytest.raises((BlockingIOError, ssl.SSLWantReadError)):
                each.recv(1)
            each.close()
        deadline = time.monotonic() + 120
        while sockets(served) > before:  # until it has seen that
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert "Traceback" not in Path(served.log.name).read_text()  # hanging up is no fault

    def test_readers_that_are_slow_cost_no_memory(self, served):
        from strongroom.vault.vault import Vault

        vault = Vault(served.folder)
        key = vault.keys.reading_key
        vault.close()
        big = served.folder / "store" / "big"
        with big.open("wb") as file:
            file.truncate(60 << 20)
        good = make_pass(key, served.card.room, int(time.time()) + 60)
        before = memory(served)
        waiting = []
        for _ in range(20):
            waiting.append(connect(served))
            waiting[-1].sendall(f"GET /v1/objects/{good}/big HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        time.sleep(2)
        assert memory(served) - before < 200 << 20
        for each in waiting:
            each.close()
        assert len(served.raw("GET", f"/v1/objects/{good}/big")[2]) == 60 << 20
        big.unlink()

    def test_a_pass_of_a_wrong_clock(self, served):
        from strongroom.vault.vault import Vault

        vault = Vault(served.folder)
        key = vault.keys.reading_key
        vault.close()
        for ahead, status in ((80_000, 404), (90_000, 401), (10**9, 401)):
            text = make_pass(key, served.card.room, int(time.time()) + ahead)
            assert served.raw("GET", f"/v1/objects/{text}/none")[0] == status
        other = make_pass(key, b"o" * 16, int(time.time()) + 60)
        assert served.raw("GET", f"/v1/objects/{other}/none")[0] == 401


def sockets(served):
    """How many the server has open."""
    found = 0
    for each in Path(f"/proc/{served.processes[0].pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            found += str(each.readlink()).startswith("socket:")
    return found


def memory(served):
    return int(Path(f"/proc/{served.processes[0].pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


@pytest.fixture(scope="module")
def asked(served):
    found = {}
    for who in ("user/ana", "user/pat", "user/quin"):
        note = Private.fresh("reason", f"the reason of {who}")
        body = {"action": "load", "ref": REF, "for": who, "duration": 60, "uses": 1, "reason": note.commitment}
        reason = {"value": note.value, "salt": base64.b64encode(note.salt).decode()}
        status, answer = post(served, "/v1/requests", statement=said(served, "request", body, who), reason=reason)
        assert status == 200, answer
        found[who] = answer["id"]
    return found


class TestGuests:
    """A partner sees what concerns itself, and not who else asks for what."""

    def test_requests(self, served, asked):
        everything = get(served, "/v1/requests", "user/ana")[1]["requests"]
        assert {each["id"] for each in everything} >= set(asked.values())
        assert [each["id"] for each in get(served, "/v1/requests", "user/pat")[1]["requests"]] == [asked["user/pat"]]
        assert get(served, f"/v1/requests/{asked['user/pat']}", "user/pat")[0] == 200
        none = get(served, f"/v1/requests/{'0' * 16}", "user/pat")
        other = get(served, f"/v1/requests/{asked['user/quin']}", "user/pat")
        assert other[0] == none[0] == 404
        assert {**other[1], "detail": ""} == {**none[1], "detail": ""}

    def test_people(self, served):
        assert [each["path"] for each in get(served, "/v1/principals", "user/pat")[1]["principals"]] == ["user/pat"]
        assert get(served, "/v1/principals/user/pat", "user/pat")[0] == 200
        none, other = (get(served, f"/v1/principals/user/{name}", "user/pat") for name in ("nobody", "ben"))
        assert other[0] == none[0] == 404

    def test_policy_reach_and_log(self, served, asked):
        assert get(served, "/v1/policies", "user/pat")[1]["code"] == "read.guest"
        for query in (f"ref={REF}", "ref=acme/none@1", "principal=user/pat"):
            status, answer = get(served, f"/v1/reach?{query}", "user/pat")
            assert status == 200
            assert {each["principal"] for each in answer["access"]} <= {"user/pat"}
        # Of others it learns nothing, and not whether there are such people either.
        other, none = (get(served, f"/v1/reach?principal=user/{name}", "user/pat") for name in ("ben", "nobody"))
        assert other == none
        assert (other[0], other[1]["code"], other[1]["hint"]) == (403, "read.guest", "strongroom reach user/pat")

    def test_leases(self, served, asked):
        """Who has the identifier of another's lease, from a screen or a chat, learns nothing by acting on it."""
        served.cli("trust", str(served.folder / "card.json"))
        for act in (("renew",), ("approve",), ("deny", "--reason", "x"), ("revoke", "--reason", "x"), ("requests",)):
            answers = []
            for identifier in (asked["user/quin"], "0" * 16):
                error = served.cli(act[0], identifier, *act[1:], as_="user/pat", check=8)["error"]
                assert error["code"] == "request.unknown"
                answers.append(json.dumps(error).replace(identifier, "ID"))
            assert answers[0] == answers[1]

    def test_a_version_that_is_out_of_reach(self, served):
        with Room(served.folder, "user/olga") as room:
            room.put(write_model(served.home / "other", seed=3), "acme/other", share="0")
            room.revoke("acme/other@1", reason="not for partners")
            status, answer = get(served, "/v1/reach?principal=user/pat", "user/pat")
            room.shred("acme/other@1", confirm="acme/other@1")
        assert status == 200
        assert "acme/other@1" not in {each["ref"] for each in answer["access"]}
        versions = get(served, "/v1/weights", "user/pat")[1]["versions"]
        assert [(each["ref"], each["created_by"]) for each in versions] == [(REF, "")]
        assert get(served, "/v1/log/tile/entries/000.p/1", "user/pat")[0] == 403


class TestFaults:
    """Of the custodian's own: not ready is 503, and its files and hosts are nobody's business."""

    @pytest.fixture
    def own(self, tmp_path):
        made = Served(tmp_path)
        yield made
        made.stop()

    def quiet(self, served, status=503):
        for method, path in (("GET", "/readyz"), ("POST", "/v1/challenges"), ("GET", "/v1/weights")):
            headers = call(served, method, path) if path == "/v1/weights" else {}
            found, _, body = served.raw(method, path, headers=headers)
            assert found == status or path != "/readyz", (path, found, body)
            assert not any(secret in body.decode() for secret in SECRETS), body
        assert served.raw("GET", "/healthz")[0] == 200

    def test_a_damaged_log(self, own):
        with sqlite3.connect(own.folder / "room.db") as db:
            db.execute("UPDATE log_state SET checkpoint = X'00'")
        self.quiet(own)
        with sqlite3.connect(own.folder / "room.db") as db:
            db.execute("DROP TABLE log_state")
        self.quiet(own)
        (own.folder / "room.db").rename(own.folder / "other.db")
        self.quiet(own)

    def test_a_store_that_is_gone(self, own):
        with Room(own.folder, "user/olga") as room:
            good = make_pass(room._vault.keys.reading_key, own.card.room, int(time.time()) + 60)
        (own.folder / "store").rename(own.folder / "elsewhere")
        status, _, body = own.raw("GET", f"/v1/objects/{good}/abc")
        assert status in (404, 503)
        assert not any(secret in body.decode() for secret in SECRETS), body

    def test_a_sealed_room_does_not_begin(self, own, tmp_path):
        (own.folder / "keys").rename(own.folder / "away")
        before = (own.folder / "card.json").read_bytes()
        ended = self.serve(own, "127.0.0.1:0")
        assert ended["exit_code"] == 7
        assert ended["code"].startswith("keystore.")
        assert (own.folder / "card.json").read_bytes() == before

    def test_a_port_that_is_taken(self, own):
        """The card and the certificate of the server that has it stay."""
        before = {path: path.read_bytes() for path in (own.folder / "card.json", own.folder / "tls" / "ca.pem")}
        ended = self.serve(own, own.url.removeprefix("https://"))
        assert (ended["code"], ended["exit_code"]) == ("serve.listen", 7)
        assert {path: path.read_bytes() for path in before} == before
        for where in ("127.0.0.1:99999", "127.0.0.1:", ":5", "127.0.0.1:" + "9" * 5000):
            assert self.serve(own, where)["code"] == "serve.listen"

    def test_a_card_that_can_not_be_written(self, own):
        (own.folder / "card.json").unlink()
        (own.folder / "card.json").mkdir()
        assert self.serve(own, "127.0.0.1:0")["code"] == "card.unwritable"
        for path in (own.folder / "tls").iterdir():
            path.unlink()
        (own.folder / "tls").rmdir()
        (own.folder / "tls").write_text("")
        assert self.serve(own, "127.0.0.1:0")["code"] == "authority.write"

    def serve(self, served, where):
        command = [sys.executable, "-m", "strongroom.cli", "--room", str(served.folder), "--json", "serve"]
        ended = subprocess.run([*command, "--listen", where], capture_output=True, text=True, timeout=120)
        assert "Traceback" not in ended.stderr
        return json.loads(ended.stdout)["error"]

    def test_several_that_start_at_once_for_the_first_time(self, tmp_path):
        room, _ = Room.init(tmp_path / "room", owner="user/olga")
        room.close()
        command = [sys.executable, "-m", "strongroom.cli", "--room", str(tmp_path / "room"), "--json", "serve"]
        started = [
            subprocess.Popen([*command, "--listen", "127.0.0.1:0"], stdout=subprocess.PIPE, text=True) for _ in range(4)
        ]
        try:
            answers = [json.loads(each.stdout.readline()) for each in started]
            assert [each for each in answers if "error" in each] == []
            urls = [each["url"] for each in answers]
            from strongroom.formats.card import Card

            authority = Card.decode((tmp_path / "room" / "card.json").read_bytes()).authority
            for url in urls:
                context = ssl.create_default_context(cadata=authority)
                host, port = url.removeprefix("https://").split(":")
                with socket.create_connection((host, int(port)), timeout=60) as wire:
                    context.wrap_socket(wire, server_hostname=host).close()
        finally:
            for each in started:
                each.terminate()
                each.wait(30)
                each.stdout.close()


@pytest.mark.parametrize("length", ["9" * 5000, "9" * 9, "-1", "²", "", "1e3"])
def test_a_witness_and_lengths_that_are_none(tmp_path, capfd, length):
    from strongroom.crypto.identity import Identities
    from strongroom.ledger.witness import Witness
    from strongroom.server.witness import WitnessServer

    signer = Identities(tmp_path / "identity").create("workload/witness")
    with WitnessServer(Witness("w.example/1", signer, tmp_path / "seen", {}, lambda: 0), ("127.0.0.1", 0)) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        with socket.create_connection(server.server_address[:2], timeout=60) as wire:
            head = f"POST /add-checkpoint HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n"
            wire.sendall(head.encode("latin-1"))
            assert wire.recv(4096)[9:12] in (b"411", b"413")
        server.shutdown()
    assert "Traceback" not in capfd.readouterr().err
