"""What anybody on the network can try: nothing is answered to whoever has not signed for it, and nothing is a 5xx."""

from __future__ import annotations

import base64
import hashlib
import json
import time

import pytest

from server.served import PEOPLE, REF, Served
from strongroom.crypto.reading import make_pass
from strongroom.crypto.signatures import Signer
from strongroom.formats.statement import Statement

pytestmark = pytest.mark.server

CALLS = [
    ("GET", "/v1/requests"),
    ("GET", "/v1/requests/0123456789abcdef"),
    ("GET", "/v1/principals"),
    ("GET", "/v1/principals/user/ana"),
    ("GET", "/v1/principals/user/nobody"),
    ("GET", "/v1/policies"),
    ("GET", f"/v1/ceilings?ref={REF}"),
    ("GET", f"/v1/budgets?ref={REF}"),
    ("GET", "/v1/weights"),
    ("GET", f"/v1/traces/{'0' * 32}"),
    ("DELETE", f"/v1/traces/{'0' * 32}"),
    ("GET", f"/v1/reach?ref={REF}"),
    ("GET", "/v1/reach?principal=user/ana"),
    ("GET", "/v1/log/checkpoint"),
    ("GET", "/v1/log/consistency?old=0&new=1"),
    ("GET", "/v1/log/tile/0/000.p/1"),
    ("GET", "/v1/log/tile/entries/000.p/1"),
]
SAID = [
    "/v1/releases",
    "/v1/requests",
    "/v1/requests/0123456789abcdef/approve",
    "/v1/requests/0123456789abcdef/deny",
    "/v1/leases/0123456789abcdef/renew",
    "/v1/revocations",
    "/v1/principals",
    "/v1/policies",
    "/v1/policies/0123456789abcdef/enact",
    "/v1/acts",
]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    made = Served(tmp_path_factory.mktemp("served"))
    yield made
    made.stop()


def call(served, method, path, who="user/ana", *, signer=None, body=b"", at=None, room=None):
    signer = signer or served.identities.signer(who)
    said = {"method": method, "path": path, "body": hashlib.sha256(body).hexdigest()}
    now = int(time.time()) if at is None else at
    room = room or served.card.room.hex()
    envelope = Statement.sign("call", said, room=room, by=who, at=now, signer=signer).envelope
    return {"Authorization": f"Strongroom {base64.urlsafe_b64encode(envelope.encode()).rstrip(b'=').decode()}"}


@pytest.mark.parametrize(("method", "path"), CALLS)
def test_nobody_is_told_anything(served, method, path):
    """No signature, another's, one for another request, an old one, another room's, nobody's: one answer."""
    eve = Signer(b"e" * 32)
    answers = set()
    for headers in (
        {},
        {"Authorization": "Bearer x"},
        {"Authorization": "Strongroom !!!"},
        {"Authorization": "Strongroom " + "A" * 400},
        call(served, method, path, signer=eve),
        call(served, method, path, who="user/nobody", signer=eve),
        call(served, method, "/v1/other"),
        call(served, "PUT", path),
        call(served, method, path, body=b"other"),
        call(served, method, path, room="0" * 32),
    ):
        status, got, body = served.raw(method, path, headers=headers)
        value = json.loads(body)
        answers.add((status, value["code"], got["Content-Type"]))
        assert PEOPLE.keys().isdisjoint(str(value).split()) or "user/ana" in path
    assert answers == {(401, "auth.refused", "application/problem+json")}
    status, _, body = served.raw(method, path, headers=call(served, method, path, at=int(time.time()) - 301))
    assert (status, json.loads(body)["code"]) == (401, "statement.stale")


@pytest.mark.parametrize("who", PEOPLE)
def test_entries_are_for_those_who_audit_or_administer(served, who):
    path = "/v1/log/tile/entries/000.p/1"
    status, _, _ = served.raw("GET", path, headers=call(served, "GET", path, who))
    assert status == (200 if who in ("user/ada", "user/ben") else 403)


@pytest.mark.parametrize("path", SAID)
def test_bodies_that_are_no_statements(served, path):
    for body in (
        b"",
        b"{",
        b"[]",
        b"null",
        b"{}",
        b'{"statement": 5}',
        b'{"statement": "x"}',
        b'{"statement": "{}", "reason": {"value": "x"}}',
        b'{"other": 1}',
        b'{"statement": "' + b"A" * 70_000 + b'"}',
        b"\xff\xfe",
        b"[" * 100_000,
    ):
        status, headers, answer = served.raw("POST", path, body)
        assert 400 <= status < 500, (body[:40], status, answer)
        assert headers["Content-Type"] == "application/problem+json"
        assert {"type", "title", "status", "detail", "code", "hint", "evidence"} == json.loads(answer).keys()


def test_a_body_that_is_too_large(served):
    status, _, answer = served.raw("POST", "/v1/releases", b" " * (2 * 1024 * 1024 + 1))
    assert (status, json.loads(answer)["code"]) == (429, "server.too_large")


def test_addresses_that_are_not_there(served):
    for method, path in (
        ("GET", "/"),
        ("GET", "/v1/nothing"),
        ("DELETE", "/v1/requests"),
        ("GET", "/v1/%2e%2e/room.json"),
    ):
        status, _, answer = served.raw(method, path)
        assert (status, json.loads(answer)["code"]) == (404, "server.no_route")


def test_every_answer_is_for_nobody_else(served):
    for path in ("/healthz", "/readyz", "/v1/weights", "/nothing"):
        _, headers, _ = served.raw("GET", path)
        assert headers["Cache-Control"] == "no-store"
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Content-Security-Policy"].startswith("default-src 'none'")
        assert headers["Strict-Transport-Security"]
        assert "uvicorn" not in str(headers).lower()


class TestObjects:
    def test_need_a_pass_of_this_room_that_has_not_expired(self, served):
        name = next(path for path in (served.folder / "store").rglob("*") if path.is_file()).relative_to(
            served.folder / "store"
        )
        for text in ("x", "A" * 32, make_pass(b"k" * 32, served.card.room, int(time.time()) + 60)):
            status, _, answer = served.raw("GET", f"/v1/objects/{text}/{name}")
            assert (status, json.loads(answer)["code"]) == (401, "auth.refused")

    def test_are_read_in_ranges_that_they_have(self, served):
        from strongroom.vault.vault import Vault

        vault = Vault(served.folder)
        key = vault.keys.reading_key
        vault.close()
        good = make_pass(key, served.card.room, int(time.time()) + 60)
        store = served.folder / "store"
        path = max((path for path in store.rglob("*") if path.is_file()), key=lambda each: each.stat().st_size)
        data, name = path.read_bytes(), path.relative_to(store)
        for header, expected in (
            ("bytes=0-0", data[:1]),
            ("bytes=10-99", data[10:100]),
            (f"bytes={len(data) - 1}-{len(data) - 1}", data[-1:]),
        ):
            status, headers, body = served.raw("GET", f"/v1/objects/{good}/{name}", headers={"Range": header})
            assert (status, body) == (206, expected)
            assert headers["Content-Range"].endswith(f"/{len(data)}")
        assert served.raw("GET", f"/v1/objects/{good}/{name}")[2] == data
        for header, code in (
            (f"bytes=0-{len(data)}", "server.range"),
            ("bytes=5-1", "server.range"),
            ("bytes=-5", "server.number"),
            ("bytes=5-", "server.range"),
            ("lines=1-2", "server.range"),
            ("bytes=a-b", "server.number"),
            ("bytes=1-2,4-5", "server.number"),
        ):
            status, _, body = served.raw("GET", f"/v1/objects/{good}/{name}", headers={"Range": header})
            assert (status, json.loads(body)["code"]) == (400, code)
        for other in ("room.json", "../room.json", "..%2froom.json", "tmp/x", "keys/room.key", "A"):
            status, _, body = served.raw("GET", f"/v1/objects/{good}/{other}")
            assert status in (400, 401, 404), (other, status)
            assert b"SRBX" not in body
        assert (
            served.raw("GET", f"/v1/objects/{make_pass(key, served.card.room, int(time.time()) - 1)}/{name}")[0] == 401
        )

    def test_an_answer_has_at_most_64_mib_and_says_how_to_ask_for_the_rest(self, served):
        from strongroom.vault.vault import Vault

        vault = Vault(served.folder)
        good = make_pass(vault.keys.reading_key, served.card.room, int(time.time()) + 60)
        vault.close()
        store, most = served.folder / "store", 64 << 20
        other = next(path for path in store.rglob("*") if path.is_file())
        large = other.with_name(("f" if other.name[0] != "f" else "0") + other.name[1:])
        try:
            with large.open("wb") as file:
                file.truncate(most + 1)
            address = f"/v1/objects/{good}/{large.relative_to(store)}"
            for headers in ({}, {"Range": f"bytes=0-{most}"}):
                status, _, body = served.raw("GET", address, headers=headers)
                told = json.loads(body)
                assert (status, told["code"]) == (400, "server.range")
                assert f"{most + 1} bytes" in told["detail"]
            unit, _, spec = told["hint"].partition(": ")
            status, headers, body = served.raw("GET", address, headers={unit: spec})
            assert (status, len(body)) == (206, most)
            assert headers["Content-Range"] == f"bytes 0-{most - 1}/{most + 1}"
            assert served.raw("GET", address, headers={"Range": f"bytes={most}-{most}"})[2] == b"\0"
        finally:
            large.unlink(missing_ok=True)
