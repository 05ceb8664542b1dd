"""Models that are put over the network."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import socket
import ssl
from dataclasses import replace

import pytest
from starlette.requests import Request

from server.served import Served
from strongroom.client import Room
from strongroom.core.clock import unix
from strongroom.crypto.signatures import Signer
from strongroom.errors import AuthRequired, Denied, LimitExceeded, UsageError
from strongroom.formats.statement import Statement, Voice
from strongroom.formats.upload import Upload, UploadFile
from strongroom.policy.speaker import speaking
from strongroom.server.uploads import Uploads
from strongroom.vault.sent import Sent
from vault.rooms import write_model

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    made = Served(tmp_path_factory.mktemp("served"), operators=("user/oto",))
    made.cli("trust", str(made.folder / "card.json"))
    yield made
    made.stop()


def call(served, path, head, by="user/oto", method="POST"):
    said = {"method": method, "path": path, "body": hashlib.sha256(head).hexdigest()}
    signer = served.identities.signer(by)
    made = Statement.sign("call", said, room=served.card.room.hex(), by=by, at=unix(), signer=signer)
    return {"Authorization": "Strongroom " + base64.urlsafe_b64encode(made.envelope.encode()).rstrip(b"=").decode()}


def oto(served):
    return Voice(served.card.room.hex(), "user/oto", served.identities.signer("user/oto"), unix)


def announcement(voice, data=b"{}", *, path="config.json", name="acme/sent", digest=None, **more):
    digest = digest or hashlib.sha256(data).hexdigest()
    file = UploadFile(path, len(data), digest, len(data))
    said = Sent.of(voice, name, [(path, digest)])
    signed = {"statement": said.statement.envelope, "salt": said.files.salt.hex()}
    parts = {"name": name, "share": "1/8", "positions": 64, "suite": "blake3", "files": (file,), **signed}
    return Upload(**{**parts, **more}).encode()


def other(voice, name):
    return voice.say("put", {"name": name, "files": "0" * 64}).envelope


def send(served, head, data, **more):
    """The whole body at once: status and answer."""
    status, _, answer = served.raw(
        "POST", "/v1/weights", len(head).to_bytes(4, "big") + head + data, call(served, "/v1/weights", head, **more)
    )
    return status, json.loads(answer)


def refs(served):
    return [item["ref"] for item in served.cli("ls")["versions"]]


def test_an_operator_puts_from_another_machine_and_the_holder_reads_the_very_bytes(served, tmp_path):
    model = write_model(tmp_path / "model", seed=5)
    done = served.cli("put", str(model), "acme/far", as_="user/oto")
    assert done["ref"] == "acme/far@1"
    assert done["files"] == sorted(path.name for path in model.iterdir())
    assert done["bytes"] == sum(path.stat().st_size for path in model.iterdir())
    asked = served.cli("request", "acme/far@1", "--action", "copy", "--reason", "a look")
    for who in ("user/ben", "user/eva"):
        served.cli("approve", asked["id"], as_=who)
    served.cli("copy", "acme/far@1", "--to", "user/ana", "--out", "far")
    for name in ("config.json", "model.safetensors.index.json"):
        assert (served.home / "far" / name).read_bytes() == (model / name).read_bytes()
    # On the host: each version, decrypted, is what was sent.
    assert served.host("verify", "acme/far@1", "--deep")["ok"]


def test_who_may_not_put_is_told_so_before_anything_is_sent(served, tmp_path):
    model = write_model(tmp_path / "model", seed=6)
    error = served.cli("put", str(model), "acme/far", as_="user/ana", check=3)["error"]
    assert error["code"] == "denied.default"
    status, answer = send(
        served,
        announcement(oto(served)),
        b"{}",
        by="user/ana",
    )
    assert (status, answer["code"]) == (403, "denied.default")


def test_nobody_uploads_without_a_call_of_that_very_head(served):
    head = announcement(oto(served))
    body = len(head).to_bytes(4, "big") + head + b"{}"
    for headers in (
        {},
        call(served, "/v1/weights", announcement(oto(served), name="acme/other")),
        call(served, "/v1/uploads", head),
    ):
        status, _, answer = served.raw("POST", "/v1/weights", body, headers)
        assert (status, json.loads(answer)["code"]) == (401, "auth.refused")


@pytest.mark.parametrize(
    ("head", "data", "status", "code"),
    [
        (lambda voice: announcement(voice, digest="0" * 64), b"{}", 409, "source.changed"),
        (lambda voice: announcement(voice, b"{}  "), b"{}", 400, "upload.length"),
        (announcement, b"{}  ", 400, "upload.length"),
        (lambda voice: announcement(voice, name="acme/sent@3"), b"{}", 400, "put.numbered"),
        (lambda voice: announcement(voice, name="room"), b"{}", 400, "put.reserved"),
        (lambda voice: announcement(voice, suite="md5"), b"{}", 400, "put.suite"),
        (lambda voice: announcement(voice, share="9"), b"{}", 400, "put.share"),
        (lambda voice: announcement(voice, path="../../x"), b"{}", 400, "source.name"),
        (lambda voice: announcement(voice, path="x.pt"), b"{}", 400, "source.pickle"),
        (lambda voice: announcement(voice, statement=other(voice, "acme/x")), b"{}", 400, "upload.other"),
        (lambda voice: announcement(voice, salt="0" * 64), b"{}", 400, "upload.other"),
        (lambda voice: announcement(replace(voice, by="user/ben")), b"{}", 400, "upload.other"),
        (lambda voice: announcement(replace(voice, signer=Signer(bytes(32)))), b"{}", 401, "auth.refused"),
        (lambda voice: announcement(replace(voice, clock=lambda: unix() - 400)), b"{}", 401, "statement.stale"),
        (lambda _: b"{}", b"", 400, "upload.malformed"),
        (lambda _: b"", b"", 400, "upload.malformed"),
    ],
)
def test_what_is_refused_is_no_version(served, head, data, status, code):
    before = refs(served)
    newest = served.host("log", "tail", "-n", "1")["entries"][0]["index"]
    found, answer = send(served, head(oto(served)), data)
    assert (found, answer["code"]) == (status, code)
    assert refs(served) == before
    before, entry = served.host("log", "tail", "-n", "2")["entries"]
    assert (before["index"], entry["type"]) == (newest, "refused")
    assert entry["by"] == ("unknown" if status == 401 else "user/oto")
    assert entry["body"]["code"] == code


def test_an_upload_that_breaks_off_leaves_no_version_and_can_be_sent_again(served):
    data = os.urandom(100_000)
    head = announcement(oto(served), data, name="acme/broken")
    address = served.url.removeprefix("https://")
    host, _, port = address.partition(":")
    context = ssl.create_default_context(cadata=served.card.authority)
    lines = [
        "POST /v1/weights HTTP/1.1",
        f"Host: {address}",
        f"Content-Length: {4 + len(head) + len(data)}",
        *(f"{name}: {value}" for name, value in call(served, "/v1/weights", head).items()),
    ]
    begun = "\r\n".join([*lines, "", ""]).encode() + len(head).to_bytes(4, "big") + head + data[:50_000]
    with (
        socket.create_connection((host, int(port)), timeout=30) as plain,
        context.wrap_socket(plain, server_hostname=host) as connection,
    ):
        connection.sendall(begun)
    assert "acme/broken@1" not in refs(served)
    status, answer = send(served, head, data)
    assert (status, answer["ref"]) == (200, "acme/broken@1")


def recorded(served):
    """The newest entry, but for that of an upload which broke off: that comes when the server sees it."""
    entries = served.host("log", "tail", "-n", "9")["entries"]
    return [each["index"] for each in entries if each["body"].get("code") != "upload.interrupted"][-1]


def test_the_same_put_again_is_answered_as_it_was(served):
    """Whoever lost the answer with the connection says the same again, and has one version, not two, nor a 409."""
    data = os.urandom(5000)
    head = announcement(oto(served), data, name="acme/once")
    assert send(served, announcement(oto(served), data, name="acme/first"), data)[0] == 200
    first = send(served, head, data)
    assert first[0] == 200
    assert first[1]["same_as"] == ["acme/first@1"]
    assert send(served, announcement(oto(served), data, name="acme/last"), data)[0] == 200
    newest = recorded(served)
    assert send(served, head, data) == send(served, head, b"") == first
    status, _, answer = served.raw("POST", "/v1/uploads", head, call(served, "/v1/uploads", head))
    assert (status, json.loads(answer)) == (200, {"files": 1, "bytes": 5000})
    assert recorded(served) == newest
    assert [ref for ref in refs(served) if ref.startswith("acme/once")] == ["acme/once@1"]
    # To nobody else, and not for what is gone.
    assert send(served, head, data, by="user/ana")[0] == 403
    served.host("shred", "acme/once@1", "--confirm", "acme/once@1")
    status, answer = send(served, head, data)
    assert (status, answer["code"]) == (404, "weights.shredded")


@pytest.mark.parametrize("length", [None, b"", b"4", b"-1", b"1e9", b"\xb2", b"9" * 5000])
def test_another_length_than_is_announced_is_refused_before_the_files_are_read(tmp_path, length):
    room, _ = Room.init(tmp_path / "room", owner="user/olga")
    with room:
        head = announcement(room._vault.voice("user/olga"), name="acme/short")
        with room._vault.custodian.ledger.view() as state:
            caller = speaking(state, "user/olga")
        pieces = [len(head).to_bytes(4, "big") + head]

        async def receive():
            return {"type": "http.request", "body": pieces.pop(0), "more_body": True}  # of no more: IndexError

        headers = [] if length is None else [(b"content-length", length)]
        request = Request({"type": "http", "method": "POST", "path": "/v1/weights", "headers": headers}, receive)
        with pytest.raises(UsageError) as caught:
            asyncio.run(Uploads(room._vault, lambda _, __: caller).receive(request))
        assert caught.value.code == "upload.length"
        assert f"Content-Length: {4 + len(head) + 2}" in caught.value.hint


@pytest.mark.parametrize("last", [None, "suspended", "demoted"])
def test_who_is_suspended_while_an_upload_comes_publishes_no_version(tmp_path, last):
    """Else whoever sends slowly keeps for ever what was allowed at the beginning."""
    data = os.urandom(100_000)
    room, _ = Room.init(tmp_path / "room", owner="user/olga")
    with room:
        room.principal_add("user/oto", roles=["operator"])
        head = announcement(room._vault.voice("user/oto"), data, name="acme/late")
        custodian = room._vault.custodian
        with custodian.ledger.view() as state:
            caller = speaking(state, "user/oto")
        pieces = [len(head).to_bytes(4, "big") + head + data[:50_000], data[50_000:]]

        async def receive():
            if len(pieces) == 1 and last == "suspended":
                room.principal_change("user/oto", state="suspended")
            elif len(pieces) == 1 and last == "demoted":
                room.principal_change("user/oto", roles=["researcher"])
            return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

        headers = [(b"content-length", str(4 + len(head) + len(data)).encode())]
        request = Request({"type": "http", "method": "POST", "path": "/v1/weights", "headers": headers}, receive)
        uploads = Uploads(room._vault, lambda _, __: caller)
        if last is None:
            assert asyncio.run(uploads.receive(request)).ref == "acme/late@1"
            return
        with pytest.raises((AuthRequired, Denied)) as caught:
            asyncio.run(uploads.receive(request))
        assert not pieces
        assert isinstance(caught.value, Denied) == (last == "demoted")
        assert room.ls() == []
        assert room.log.tail(1)[0]["type"] == "refused"


def test_a_head_that_comes_in_drops_is_not_waited_for():
    """Nobody knows yet who sends it."""
    drops = []

    async def story():
        asyncio.get_running_loop().time = lambda: 50.0 * len(drops)  # a drop each 50 seconds

        async def receive():
            drops.append(1)
            for _ in range(3):
                await asyncio.sleep(0)
            return {"type": "http.request", "body": b"\0", "more_body": len(drops) < 4}

        request = Request({"type": "http", "method": "POST", "path": "/v1/weights", "headers": []}, receive)
        await Uploads(None, lambda *_: pytest.fail("a head that never came")).receive(request)

    with pytest.raises(LimitExceeded) as caught:
        asyncio.run(story())
    assert caught.value.code == "server.too_slow"
    assert len(drops) < 4
