"""What a client does when a connection ends before the answer has come, or the answer does not end."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import threading
import time

import pytest

from server.served import REF, Served
from strongroom.client import Room
from strongroom.crypto.authority import Authority
from strongroom.errors import BackendError, Denied, UsageError
from strongroom.formats.card import Card
from strongroom.formats.statement import Statement
from strongroom.storage import session
from strongroom.storage.session import Session, trust

pytestmark = pytest.mark.server


class Hanging:
    """A server with the room's certificate that hangs up without an answer when `hangs_up` says so of a request."""

    def __init__(self, folder, hangs_up, answer=b"{}", more=0, drops=0.0):
        self.drops = drops  # seconds between two bytes of a head that does not end
        self.more = more  # bytes that are announced and don't come
        self.authority, self.hangs_up, self.answer, self.heard = Authority(folder, "test"), hangs_up, answer, []
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        with self.authority.issued(["127.0.0.1"]) as certificate:
            context.load_cert_chain(certificate)
        self.listener = context.wrap_socket(socket.create_server(("127.0.0.1", 0)), server_side=True)
        self.card = Card(
            f"https://127.0.0.1:{self.listener.getsockname()[1]}", b"r" * 16, b"l" * 32, b"s" * 32, self.authority.pem
        )
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        while True:
            try:
                wire, _ = self.listener.accept()
            except OSError:
                return
            with wire, contextlib.suppress(OSError):
                while request := self._read(wire):
                    self.heard.append(request)
                    if self.hangs_up(len(self.heard)):
                        break
                    if self.drops:
                        wire.sendall(b"HTTP/1.1 200 OK\r\nX: ")
                        while True:  # until nobody is there any more
                            wire.sendall(b"x")
                            time.sleep(self.drops)
                    head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(self.answer) + self.more}\r\n\r\n"
                    wire.sendall(head.encode() + self.answer)
                    if self.more:
                        break

    def _read(self, wire):
        data = b""
        while b"\r\n\r\n" not in data:
            if not (piece := wire.recv(65536)):
                return b""
            data += piece
        head, _, body = data.partition(b"\r\n\r\n")
        size = next((int(line.split()[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-l")), 0)
        while len(body) < size:
            body += wire.recv(65536)
        return head + b"\r\n\r\n" + body


@pytest.fixture
def hanging(tmp_path):
    made = []

    def start(hangs_up, **more):
        made.append(Hanging(tmp_path / "tls", hangs_up, **more))
        return made[-1]

    yield start
    for each in made:
        each.listener.close()


def test_the_very_same_bytes_are_sent_again(hanging):
    server = hanging(lambda count: count == 2)
    client = Session(server.card)
    client.request("POST", "/first", b"1")
    assert client.request("POST", "/second", b'{"statement": 1}', {"Authorization": "Strongroom x"}) == b"{}"
    client.close()
    assert len(server.heard) == 3
    assert server.heard[1] == server.heard[2]


def test_but_once_and_only_if_the_connection_was_kept(hanging):
    server = hanging(lambda count: True)
    client = Session(server.card)
    with pytest.raises(BackendError) as caught:
        client.request("POST", "/first", b"1")
    assert caught.value.code == "server.unreachable"
    assert len(server.heard) == 1
    server.hangs_up = lambda count: count > 2
    client.request("POST", "/kept", b"1")
    with pytest.raises(BackendError) as caught:
        client.request("POST", "/second", b"1")
    assert caught.value.code == "server.unreachable"
    assert len(server.heard) == 4
    client.close()


def test_what_must_not_be_sent_again_is_not(hanging):
    server = hanging(lambda count: count > 1)
    client = Session(server.card)
    client.request("POST", "/first", b"1")
    with pytest.raises(BackendError) as caught:
        client.request("POST", "/second", b"1", again=False)
    assert caught.value.code == "server.interrupted"
    assert len(server.heard) == 2
    client.close()


def test_an_answer_that_comes_in_drops_is_not_waited_for(hanging):
    now = [0.0]

    def clock():
        now[0] += 40.0  # between one look and the next
        return now[0]

    server = hanging(lambda count: False, answer=b"x" * 3 * session._PIECE)
    client = Session(server.card, clock=clock)
    with pytest.raises(BackendError) as caught:
        client.request("GET", "/slow")
    assert caught.value.code == "server.too_slow"
    client.close()


def test_nor_is_one_whose_head_comes_in_drops(hanging):
    """Each drop comes in time; and whoever waits for it may hold a lock that all others need."""
    client = Session(hanging(lambda count: False, drops=0.05).card, patience=1.0)
    with pytest.raises(BackendError) as caught:
        client.request("POST", "/slow", b"1")
    assert caught.value.code == "server.unreachable"
    client.close()


def test_an_answer_that_ends_early_is_none(hanging):
    server = hanging(lambda count: False, more=5)
    client = Session(server.card)
    with pytest.raises(BackendError) as caught:
        client.request("GET", "/short")
    assert caught.value.code == "server.unreachable"
    client.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    made = Served(tmp_path_factory.mktemp("served"))
    yield made
    made.stop()


@pytest.fixture
def room(served, monkeypatch):
    monkeypatch.setenv("STRONGROOM_STATE", str(served.home / "state"))
    monkeypatch.setenv("STRONGROOM_IDENTITIES", str(served.home / "identities"))
    with Room(served.card, "user/ana") as made:
        yield made


def test_a_release_is_asked_for_again_with_another_challenge(room, monkeypatch):
    said, real = [], Session.request

    def request(self, method, path, body=b"", headers=None, *, again=True):
        if path == "/v1/releases":
            assert not again
            said.append(Statement.decode(json.loads(body)["statement"]))
            if len(said) == 1:
                raise BackendError("server.interrupted", "the connection ended")
        return real(self, method, path, body, headers, again=again)

    monkeypatch.setattr(Session, "request", request)
    with pytest.raises(Denied):  # nobody has approved anything: that is an answer
        room.grant(REF)
    assert len(said) == 2
    assert said[0].body["challenge"] != said[1].body["challenge"]
    assert said[0].nonce != said[1].nonce


HERE_ONLY = {
    "verify": lambda room: room.verify(REF),
    "rotate": lambda room: room.rotate(REF),
    "shred": lambda room: room.shred(REF, confirm=REF),
    "log cosign": lambda room: room.log.cosign("http://127.0.0.1:1", "x"),
    "doctor": lambda room: room.doctor(),
    "fsck": lambda room: room.fsck(),
    "keystore show": lambda room: room.keystore_show(),
    "keystore rotate": lambda room: room.keystore_rotate(),
    "recovery drill": lambda room: room.recovery_drill([]),
    "recovery recover": lambda room: room.recover([], "file:x"),
}


@pytest.mark.parametrize("command", HERE_ONLY)
def test_what_is_done_where_the_room_is_says_so_by_its_command(room, command):
    with pytest.raises(UsageError) as caught:
        HERE_ONLY[command](room)
    assert caught.value.code == "room.not_here"
    assert caught.value.message.startswith(f"strongroom {command} works on the room's own host")
    assert caught.value.hint == f"there: strongroom --room FOLDER {command}"


def test_what_is_read_from_afar(room, served):
    shown = room.show("acme/tiny")
    with Room(served.folder, "user/olga") as here:
        assert shown == here.show(REF)
        status = here.status()
    found = room.status()
    assert found["url"] == served.url
    assert {name: status[name] for name in ("room", "versions", "bytes", "sealed")}.items() <= found.items()
    assert not {"folder", "keystore", "store"} & found.keys()


def test_an_auditor_reviews_from_afar(served, room):
    with Room(served.card, "user/ada") as auditor, Room(served.folder, "user/olga") as here:
        found, there = auditor.review(), here.review()
        assert found["findings"] == there["findings"]
        assert [each["principal"] for each in found["activity"]] == [each["principal"] for each in there["activity"]]
    with pytest.raises(Denied):
        room.review()


def test_the_command_line_from_afar(served):
    served.cli("trust", str(served.folder / "card.json"))
    assert served.cli("show", "acme/tiny")["ref"] == REF
    assert served.cli("status")["url"] == served.url
    assert served.cli("review", as_="user/ada", check=None)["activity"]


def test_what_is_rotated_while_it_is_read_from_afar_is_released_again(served, room, monkeypatch):
    with Room(served.card, "user/ben") as ben, Room(served.card, "user/eva") as eva:
        asked = room.request(REF, reason="evaluation")
        for each in (ben, eva):
            each.approve(asked["id"])
    trust(served.card)
    with contextlib.ExitStack() as stack:
        blobs_at = room._vault.blobs_at
        monkeypatch.setattr(room._vault, "blobs_at", lambda url: stack.enter_context(contextlib.closing(blobs_at(url))))
        right = bytes(room.reader(REF).read_all())
        reader = room.reader(REF)
        assert bytes(reader.read(0, 64)) == right[:64]
        with Room(served.folder, "user/olga") as here:
            here.rotate(REF)
            assert bytes(reader.read_all()) == right
            entries = here.log.tail(100)
    assert [each["body"]["revision"] for each in entries if each["type"] == "release"] == [1, 1, 2]
