"""Clients that ask several things at once and go before they are answered: over real sockets, with TLS and without."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
import threading
import time

import pytest

from gateway.places import ANA, chat, eventually, whole
from gateway.test_handshakes import Door
from strongroom.crypto.authority import Authority
from strongroom.gateway.connection import Connection
from strongroom.gateway.exchange import EXCHANGE
from strongroom.gateway.handshakes import Server
from strongroom.gateway.listen import configure

REQUEST = b"POST /slow HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}"
AT_ONCE = 15  # seconds: less than anything else takes that could end a connection, or an answer


class Slow:
    """An application whose answers take as long as their client is there, or until `go`."""

    def __init__(self) -> None:
        self.begun, self.left, self.go = 0, 0, threading.Event()

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan":
            for word in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{word}.complete"})
            return
        exchange, gone = scope[EXCHANGE], asyncio.Event()
        self.begun += 1
        exchange.when_gone(gone.set)
        while not gone.is_set() and not self.go.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(gone.wait(), 0.05)
        exchange.when_gone(None)
        self.left += gone.is_set()
        exchange.answer(200, b"", [], b"done")


@pytest.fixture(params=["plain", "tls"])
def door(request, tmp_path):
    slow, authority = Slow(), Authority(tmp_path / "tls", "test")
    with authority.issued(["127.0.0.1"]) as certificate:
        config = configure(slow, (certificate, certificate) if request.param == "tls" else None)
    made = Door(config, Connection, ssl.create_default_context(cadata=authority.pem))
    made.slow = slow
    made.secure = request.param == "tls"
    assert isinstance(made.server, Server)
    yield made
    slow.go.set()
    made.stop()


def connected(door):
    wire = socket.create_connection(("127.0.0.1", door.port), 60)
    return door.tls.wrap_socket(wire, server_hostname="127.0.0.1") if door.secure else wire


@pytest.mark.parametrize("requests", [2, 40])  # that wait, and more than anybody is read ahead
def test_whoever_asks_several_things_and_goes_is_noticed_at_once(door, requests):
    with connected(door) as wire:
        wire.sendall(REQUEST * min(requests, 15))
        eventually(lambda: door.slow.begun == 1)
        with contextlib.suppress(OSError):  # nobody takes more
            wire.settimeout(0.2)
            wire.sendall(REQUEST * max(0, requests - 15))
    eventually(lambda: door.slow.left == 1, AT_ONCE)
    eventually(lambda: not Connection.crowd)
    assert door.slow.begun == 1


@pytest.mark.parametrize("requests", [1, 2])
def test_whoever_sends_no_more_has_gone(door, requests):
    with connected(door) as wire:
        wire.sendall(REQUEST * requests)
        eventually(lambda: door.slow.begun == 1)
        wire.shutdown(socket.SHUT_WR)
        eventually(lambda: door.slow.left == 1, AT_ONCE)
        eventually(lambda: not Connection.crowd)
    assert door.slow.begun == 1


def test_whoever_stays_is_answered_all_of_it(door):
    with connected(door) as wire:
        wire.sendall(REQUEST * 3)
        eventually(lambda: door.slow.begun == 1)
        time.sleep(1.2)  # longer than it takes to look after who has gone
        door.slow.go.set()
        found = b""
        while found.count(b"done") < 3:
            piece = wire.recv(4096)
            assert piece
            found += piece
    assert (door.slow.begun, door.slow.left) == (3, 0)


def test_no_inference_is_begun_for_whoever_has_gone(place):
    """The one that is under way is ended, and charged like any that its client has left; the others never begin."""
    gateway = place.gateway()
    answer = whole("word " * 40, 60)
    pieces = [piece for at in range(len(answer)) for piece in (answer[at : at + 1], 0.05)]
    place.inference.script = lambda _: pieces
    before = len(place.records())
    body = json.dumps(chat()).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {place.keys[ANA]}\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    ).encode()
    with socket.create_connection(("127.0.0.1", gateway.port), 60) as wire:
        wire.sendall((head + body) * 4)
        eventually(lambda: place.inference.asked)
    eventually(lambda: place.inference.gone == 1, AT_ONCE)  # upstream stops generating
    (record,) = eventually(lambda: place.records()[before:])
    assert (record["status"], record["code"]) == (499, "disconnected")
    place.inference.script = lambda _: [whole()]
    assert gateway.post(chat())[0] == 200
    assert len(place.inference.asked) == 2
    place.stop_gateways()
    assert [each["code"] for each in place.records()[before:]] == ["disconnected", ""]
