"""A client against a server that has the room's certificate and lies: nothing is opened, nothing leaks, and what comes
of it is an error of ours."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest

from server.liar import Liar
from server.served import REF, Served
from strongroom.client import Room, reading
from strongroom.crypto.identity import Identities
from strongroom.errors import BackendError, Conflict, NotFound, StrongroomError, Tampered, UsageError
from strongroom.formats.card import Card
from strongroom.storage import session
from vault.rooms import safetensors_file

pytestmark = pytest.mark.server

CALLS = {
    "ls": lambda room: room.ls(),
    "find": lambda room: room.request("acme/tiny", reason="x"),
    "requests": lambda room: room.requests(),
    "request": lambda room: room.request(REF, reason="x"),
    "approve": lambda room: room.approve("0" * 16),
    "deny": lambda room: room.deny("0" * 16, reason="x"),
    "revoke": lambda room: room.revoke("0" * 16, reason="x"),
    "renew": lambda room: room.renew("0" * 16),
    "principals": lambda room: room.principal_ls(),
    "principal": lambda room: room.principal_show("user/ana"),
    "change": lambda room: room.principal_change("user/ana", state="suspended"),
    "add": lambda room: room.principal_add("user/new", public_key="5" * 64),
    "who": lambda room: room.who(REF),
    "reach": lambda room: room.reach("user/ana"),
    "policy": lambda room: room.policy(),
    "show": lambda room: room.show(REF),
    "status": lambda room: room.status(),
    "review": lambda room: room.review(),
    "budget": lambda room: room.budget(REF),
    "enact": lambda room: room.enact("0" * 16),
    "ceiling": lambda room: room.set_ceiling(REF, holders=1),
    "thaw": lambda room: room.thaw(REF, reason="x"),
    "clock": lambda room: room.set_clock("x"),
    "redact": lambda room: room.log.redact(1),
    "apply": lambda room: room.review(apply=True),
    "release": lambda room: room.grant(REF),
    "trace": lambda room: room.trace("leak.safetensors", weights=REF),
    "tail": lambda room: room.log.tail(),
    "prove": lambda room: room.log.prove(0),
    "verify": lambda room: room.log.verify(),
}
DEEP = b"[" * 200_000
ANSWERS = [
    b"",
    b"null",
    b"[]",
    b"5",
    b"{",
    DEEP,
    b'{"a": 1e999, "b": NaN}',
    b"1" * 10_000,
    b"\xff\xfe",
    b'"\\ud800"',
    *(
        json.dumps(
            dict.fromkeys(
                (
                    *("nonce", "entry", "index", "proof", "checkpoint", "sealed", "store", "versions", "requests"),
                    *("principals", "access", "id", "digest", "state", "action", "needs", "approved_by", "lease"),
                    *("expires_at", "text", "rules", "proposals", "policy", "proposal", "since", "target", "path"),
                    *("person", "roles", "teams", "principal", "key", "leases", "ref", "enact_after"),
                    *("files", "bytes", "done", "total", "report", "error"),
                ),
                value,
            )
        ).encode()
        for value in (
            None,
            5,
            -1,
            1e400,
            True,
            "x",
            "é\ud800",
            "0" * 64,
            [5],
            [None],
            ["x"],
            [{}],
            {},
            [[[]]],
            2**70,
        )
    ),
]
PROBLEMS = [
    b'{"title": "Denied"}',
    b'{"title": ["Denied"], "code": 1, "detail": 2, "hint": 3, "evidence": {}}',
    b'{"title": "StrongroomError", "code": "a", "detail": "b", "hint": "c", "evidence": {}}',
    b'{"title": "__builtins__", "code": "a", "detail": "b", "hint": "c", "evidence": {}}',
    b'{"title": "Denied", "code": {}, "detail": [], "hint": null, "evidence": {"self": 1, "code": 2, "x y": 3}}',
    b'{"title": "Denied", "code": "a", "detail": "b", "hint": "c", "evidence": [1]}',
    b'{"title": "Denied", "code": "a", "detail": "\\ud800\\u001b[2J", "hint": "\\u202e", "evidence": {"\\ud800": 1}}',
    DEEP,
    b"",
]


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A client's machine, with the keys of one person."""
    monkeypatch.setenv("STRONGROOM_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("STRONGROOM_IDENTITIES", str(tmp_path / "identities"))
    monkeypatch.chdir(tmp_path)
    Identities(tmp_path / "identities").create("user/ana")
    safetensors_file(tmp_path / "leak.safetensors", {"x": ("F32", (8, 8))}, 1)
    return tmp_path


@pytest.fixture
def liar(machine):
    made = Liar(machine / "tls", lambda *_: (200, {}, b""))
    yield made
    made.shutdown()
    made.server_close()


REPORT = {
    **dict.fromkeys(("positions", "positions_used", "elements", "candidates", "ways", "entry", "at"), 0),
    **dict.fromkeys(("false_accusation_bound", "marked_log10_p", "likeness", "threshold_log10_p"), 0.0),
    "verdict": "unrelated",
    "weights": "",
    "carries_marks": False,
    "marked": False,
    "withheld": False,
    **{name: [] for name in ("accused", "transformations", "versions", "scores", "tensors")},
    "text": None,
    "by": "user/ana",
    "leaf": "0" * 64,
    "request": None,
}
RELEASE = {"entry": 1, "action": "load", "at": 0, "lease": None, "leaf": "0" * 64, "proof": "x", "person": "user/ben"}
ACCUSED = {
    "holder": "user/ben",
    "person": "user/ben",
    "score_sigma": 9,
    "log10_p": -20,
    "false_accusation": 1e-12,
    "layer1": {"sigma": 1, "log10_p": -1, "decoder": ""},
    "layer2": {"z": 9, "log10_p": -20},
    "releases": [RELEASE],
}


@pytest.mark.parametrize(
    ("lie", "expected"),
    [
        ({}, ""),
        ({"accused": [{**ACCUSED, "releases": []}]}, ""),
        ({"suspect": {"name": "x", "tensors": 1, "bytes": 256, "files": []}}, "trace.other"),
        ({"by": "user/eva"}, "trace.other"),
        ({"room": "0" * 32}, "trace.other"),
        ({"accused": [ACCUSED]}, "proof.malformed"),
        ({"accused": [{**ACCUSED, "log10_p": "\u001b[2J"}]}, "server.answer"),
        ({"accused": [{"holder": "user/ben"}]}, "server.answer"),
        ({"likeness": float("nan")}, "server.answer"),
        ({"verdict": "guilty"}, "server.answer"),
        ({"text": {"tokens": "many"}}, "server.answer"),
        ({"scores": None}, "server.answer"),
    ],
)
def test_a_report_is_of_the_files_that_were_sent_and_has_proofs_of_this_rooms_log(liar, machine, lie, expected):
    data = (machine / "leak.safetensors").read_bytes()
    files = [{"path": "leak.safetensors", "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}]
    suspect = {"name": "leak", "tensors": 1, "bytes": 256, "files": files}
    report = {**REPORT, "room": liar.card().room.hex(), "suspect": suspect, **lie}
    done = {"state": "done", "done": 1, "total": 1, "report": report, "error": None}
    told = {"/v1/suspects": {"files": 1, "bytes": len(data)}, "/v1/traces": {"id": "0" * 32}}

    def answer(_, path, __, ___):
        return 202 if path == "/v1/traces" else 200, {}, json.dumps(told.get(path, done)).encode()

    liar.answer = answer
    with Room(liar.card(), "user/ana") as room:
        if not expected:
            assert room.trace("leak.safetensors")["verdict"] == "unrelated"
            return
        with pytest.raises(StrongroomError) as caught:
            room.trace("leak.safetensors")
        assert caught.value.code == expected


def test_whoever_interrupts_a_trace_has_it_stopped(liar, machine):
    size = (machine / "leak.safetensors").stat().st_size
    running = {"state": "running", "done": 1, "total": 7, "report": None, "error": None}
    told = {"/v1/suspects": {"files": 1, "bytes": size}, "/v1/traces": {"id": "0" * 32}}

    def answer(_, path, __, ___):
        return 202 if path == "/v1/traces" else 200, {}, json.dumps(told.get(path, running)).encode()

    def interrupted(_, total):
        if total == 7:  # it is compared by now
            raise KeyboardInterrupt

    liar.answer = answer
    with Room(liar.card(), "user/ana") as room, pytest.raises(KeyboardInterrupt):
        room.trace("leak.safetensors", progress=interrupted)
    assert [(method, path) for method, path, _ in liar.heard][-2:] == [
        ("GET", f"/v1/traces/{'0' * 32}"),
        ("DELETE", f"/v1/traces/{'0' * 32}"),
    ]


@pytest.mark.parametrize("name", CALLS)
def test_answers_that_are_none(liar, name):
    with Room(liar.card(), "user/ana") as room:
        for status, answers in ((200, ANSWERS), (403, PROBLEMS), (302, [b""]), (204, [b""]), (999, [b""])):
            for answer in answers:
                liar.answer = lambda *_, status=status, answer=answer: (status, {}, answer)
                try:
                    CALLS[name](room)
                except StrongroomError as error:
                    json.dumps(error.as_json())
                    assert len(error.message) < 5000
                else:
                    pytest.fail(f"{name} took {status} {answer[:80]!r}")


@pytest.mark.parametrize(
    "store",
    [
        "file:///etc",
        "/etc",
        "made-by-the-server",
        "http://127.0.0.1:1/x",
        "https://127.0.0.1:1/v1/objects/" + "A" * 32,
        "URL/v1/objects/../../v1/requests",
        "URL/v1/objects/" + "A" * 32 + "?x",
        "URL/v1/objects/" + "A" * 32 + "/é",
        "URL.evil.example/v1/objects/" + "A" * 32,
        "URL@evil.example/v1/objects/" + "A" * 32,
        "",
        "https://[",
        "s3:/x",
        "S3://x",
    ],
)
def test_stores_that_are_elsewhere(liar, machine, store):
    def answer(method, path, body, headers):
        if path == "/v1/challenges":
            return 200, {}, {"nonce": "0" * 64, "expires_at": 5}
        found = dict.fromkeys(("entry", "checkpoint", "sealed"), "")
        return 200, {}, {**found, "index": 0, "proof": [], "store": store.replace("URL", liar.url)}

    liar.answer = answer
    before = set(machine.rglob("*"))
    with Room(liar.card(), "user/ana") as room, pytest.raises(BackendError) as caught:
        room.grant(REF)
    assert caught.value.code == "server.answer"
    assert set(machine.rglob("*")) == before


def test_where_it_may_be(liar):
    from strongroom.client.answers import store

    for url in ("s3://bucket/prefix", "gs://bucket", "az://box/x", f"{liar.url}/v1/objects/{'A' * 32}"):
        assert store(url, liar.card()) == url


def test_nobody_else_is_asked(liar, tmp_path):
    """A redirect is not followed: what is signed for one room goes nowhere else."""
    other = Liar(tmp_path / "other", lambda *_: (200, {}, b"{}"))
    for status in (301, 302, 303, 307, 308):
        liar.answer = lambda *_, status=status: (status, {"Location": f"{other.url}/v1/requests"}, b"")
        with Room(liar.card(), "user/ana") as room:
            for each in (room.requests, room.ls):
                with pytest.raises(BackendError):
                    each()
    assert not other.heard
    other.shutdown()
    other.server_close()


@pytest.mark.parametrize("headers", [{}, {"Content-Length": "999999999999"}, {"Transfer-Encoding": "chunked"}])
def test_answers_without_end(liar, monkeypatch, headers):
    monkeypatch.setattr(session, "_MOST", 1 << 20)

    def endless():
        chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
        while True:
            yield chunk

    liar.answer = lambda *_: (200, headers, endless())
    with Room(liar.card(), "user/ana") as room, pytest.raises(BackendError):
        room.requests()


def test_headers_without_end(liar):
    liar.answer = lambda *_: (200, {f"X-{n}": "a" * 60_000 for n in range(300)}, b"{}")
    with Room(liar.card(), "user/ana") as room, pytest.raises(BackendError):
        room.requests()


class TestCertificates:
    def test_another_authority(self, liar, tmp_path):
        other = Liar(tmp_path / "other", lambda *_: (200, {}, b"{}"))
        card = replace(liar.card(), url=other.url)
        with Room(card, "user/ana") as room, pytest.raises(BackendError) as caught:
            room.requests()
        assert caught.value.code == "server.certificate"
        assert not other.heard
        other.shutdown()
        other.server_close()

    def test_another_name(self, liar):
        card = replace(liar.card(), url=liar.url.replace("127.0.0.1", "localhost"))
        with Room(card, "user/ana") as room, pytest.raises(BackendError) as caught:
            room.requests()
        assert caught.value.code == "server.certificate"
        assert not liar.heard

    def test_one_that_has_expired(self, machine, monkeypatch):
        from datetime import UTC, datetime, timedelta

        from strongroom.crypto import authority

        class Past(datetime):
            @classmethod
            def now(cls, tz=None):
                return datetime.now(tz) - timedelta(days=3700)

        monkeypatch.setattr(authority, "datetime", Past)
        liar = Liar(machine / "old", lambda *_: (200, {}, b"{}"))
        assert datetime.now(UTC) > liar.authority._certificate.not_valid_after_utc
        with Room(liar.card(), "user/ana") as room, pytest.raises(BackendError) as caught:
            room.requests()
        assert caught.value.code == "server.certificate"
        liar.shutdown()
        liar.server_close()


class TestCards:
    @pytest.mark.parametrize(
        "change",
        [
            {"ca": ""},
            {"ca": " "},
            {"ca": "é"},
            {"ca": "-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n"},
            {"url": "http://127.0.0.1:5"},
            {"url": "https://127.0.0.1:99999"},
            {"url": "https://127.0.0.1:0"},
            {"url": "https://[::::]:5"},
            {"url": "https://[fe80]:5"},
            {"url": "https://u:p@127.0.0.1:5"},
            {"url": "https://127.0.0.1:5/x"},
            {"url": "https://127.0.0.1:5\n"},
            {"url": 5},
            {"log": "x"},
            {"format": 2},
            {"more": 1},
        ],
    )
    def test_that_are_none(self, liar, change):
        from strongroom.core import canonical

        value = {**json.loads(liar.card().encode()), **change}
        with pytest.raises(StrongroomError):
            Card.decode(canonical.encode(value))

    def test_two_for_one_address(self, liar):
        """A second card is not taken for the first one's, whichever comes first by name."""
        session.trust(liar.card(room=b"m" * 16))
        for other in (b"a" * 16, b"z" * 16):
            with pytest.raises(Conflict) as caught:
                session.trust(liar.card(room=other))
            assert caught.value.code == "card.other_room"
        assert session.card_of(liar.url.upper().replace("HTTPS", "https")).room == b"m" * 16

    def test_a_room_keeps_its_keys(self, liar):
        session.trust(liar.card())
        for changed in (liar.card(log_key=b"x" * 32), liar.card(signer=b"x" * 32)):
            with pytest.raises(Conflict) as caught:
                session.trust(changed)
            assert caught.value.code == "card.other_keys"
        session.trust(replace(liar.card(), url="https://127.0.0.1:5"))  # it has moved
        assert session.card_of("https://127.0.0.1:5").log_key == b"l" * 32
        with pytest.raises(NotFound):
            session.card_of(liar.url)

    def test_addresses_that_are_none(self, machine):
        for url in ("https://[", "https://x:y", "https://x:99999"):
            with pytest.raises((UsageError, NotFound)):
                session.card_of(url)

    def test_a_kept_card_that_is_damaged_is_named(self, liar, machine):
        _, path = session.trust(liar.card())
        path.write_text("{}")
        with pytest.raises(Tampered, match=re.escape(str(path))):
            session.card_of(liar.url)


def test_what_a_terminal_would_obey(liar, machine):
    """An error, and names, of a server's making."""
    session.trust(liar.card())
    evil = "\x1b[2J\x1b]0;x\x07\u202e\x9b31m"
    problem = {"title": "Denied", "code": evil, "detail": evil, "hint": evil, "evidence": {evil: evil}}
    version = dict.fromkeys(("state", "digest", "created_at", "created_by"), evil) | {"ref": REF, "shredded_at": None}
    version |= dict.fromkeys(("revision", "bytes", "stored_bytes", "segments", "positions"), 2**53 - 1)
    for status, answer in ((403, problem), (200, {"versions": [version]})):
        liar.answer = lambda *_, status=status, answer=answer: (status, {}, answer)
        for flags in ([], ["--json"]):
            command = [sys.executable, "-m", "strongroom.cli", "--room", liar.url, "--as", "user/ana", *flags, "ls"]
            ended = subprocess.run(command, capture_output=True, text=True, timeout=60, env=dict(os.environ))
            shown = ended.stdout + ended.stderr
            assert ended.returncode == (3 if status == 403 else 0), shown
            assert not set(shown) & set("\x1b\x07\u202e\x9b")


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    made = Served(tmp_path_factory.mktemp("served"))
    yield made
    made.stop()


class TestReleases:
    """The true custodian's answer, changed on its way by somebody who has its certificate."""

    @pytest.fixture
    def room(self, served, tmp_path, monkeypatch):
        monkeypatch.setenv("STRONGROOM_STATE", str(tmp_path / "state"))
        monkeypatch.setenv("STRONGROOM_IDENTITIES", str(served.home / "identities"))
        with Room(served.card, "user/ana") as asking:
            identifier = asking.request(REF, reason="x")["id"]
        for who in ("user/ben", "user/eva"):
            with Room(served.card, who) as approving:
                approving.approve(identifier)
        self.change = lambda path, value: value

        def answer(method, path, body, headers):
            status, _, data = served.raw(method, path, body, dict(headers.items()))
            try:
                value = json.loads(data)
            except ValueError:
                return status, {}, data
            return status, {}, self.change(path, value)

        liar = Liar(tmp_path / "tls", answer)
        card = replace(served.card, url=liar.url, authority=liar.authority.pem)
        with Room(card, "user/ana") as room:
            yield room
        liar.shutdown()
        liar.server_close()

    @staticmethod
    def keys(room):
        return reading.keys(room._vault, room._say, room.principal, REF)

    def take(self, room, **change):
        def changed(path, value):
            if path == "/v1/releases":
                value["store"] = "s3://bucket/prefix"
                value |= {name: each(value[name]) if callable(each) else each for name, each in change.items()}
            return value

        self.change = changed
        return self.keys(room)

    def test_unchanged(self, room):
        assert self.take(room)[1].ref == REF

    @pytest.mark.parametrize(
        "change",
        [
            {"index": lambda index: index + 1},
            {"index": 0},
            {"index": 2**53 - 1},
            {"proof": []},
            {"proof": lambda proof: [*proof, proof[0]]},
            {"proof": lambda proof: proof[::-1]},
            {"proof": lambda proof: [each[:-8] + "AAAAAAA=" for each in proof]},
            {"sealed": lambda sealed: "AAAA" + sealed[4:]},
            {"sealed": ""},
            {"entry": lambda entry: base64.b64encode(base64.b64decode(entry).replace(b"load", b"copy")).decode()},
            {"checkpoint": lambda note: base64.b64encode(base64.b64decode(note) + b"x").decode()},
            {"checkpoint": ""},
        ],
    )
    def test_changed(self, room, tmp_path, change):
        with pytest.raises(Tampered):
            self.take(room, **change)

    def test_an_answer_to_another_request(self, room):
        kept = {}

        def keep(path, value):
            if path == "/v1/releases":
                return kept.setdefault("first", {**value, "store": "s3://bucket/prefix"})
            return value

        self.change = keep
        self.keys(room)
        with pytest.raises(Tampered, match=r"release\.other_entry"):
            self.keys(room)

    def test_a_proof_of_another_log(self, room, tmp_path):
        from strongroom.client.receive import Remembered
        from strongroom.errors import Forked

        self.take(room)
        room.requests()

        def forked(path, value):
            if "consistency" in path:
                value["proof"] = [base64.b64encode(b"x" * 32).decode() for _ in value["proof"]]
            return {**value, "store": "s3://bucket/prefix"} if path == "/v1/releases" else value

        self.change = forked
        seen = Remembered(tmp_path / "state", room._vault.log_key).newest()
        with pytest.raises(Forked):
            self.keys(room)
        assert Remembered(tmp_path / "state", room._vault.log_key).newest() == seen
