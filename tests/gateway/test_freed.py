"""What a request or a connection had is free as soon as it ends: the collector of a gateway looks seldom."""

from __future__ import annotations

import gc
import json
import socket

import pytest

from gateway.places import ANA, STREAM, chat, chunk, eventually, framed, token, whole
from strongroom.gateway.connection import Connection
from strongroom.gateway.exchange import Exchange
from strongroom.gateway.flight import Flight
from strongroom.gateway.upstream import Reply, _Connection

KINDS = (Flight, Reply, Exchange, Connection, _Connection)


@pytest.fixture
def there():
    """What there is of these, and was not before; nothing is collected meanwhile."""
    gc.collect()
    before = {id(each) for each in gc.get_objects() if type(each) in KINDS}
    gc.disable()
    yield lambda: {type(each) for each in gc.get_objects() if type(each) in KINDS and id(each) not in before}
    gc.enable()


@pytest.mark.parametrize(
    "script",
    [
        [whole()],
        [framed(b"no", "503 Service Unavailable")],
        [framed(b"no")],
        [STREAM, token("a"), chunk(b"data: no\n\n")],
        [STREAM, token("a"), *[0.05] * 40],
    ],
    ids=["answered", "busy", "malformed", "broken", "left"],
)
def test_nothing_is_left_of_a_request(place, there, script):
    gateway = place.gateway()
    place.inference.script = lambda _: script
    body = json.dumps(chat(stream=script[0] is STREAM)).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nauthorization: Bearer {place.keys[ANA]}\r\ncontent-length: "
    with socket.create_connection(("127.0.0.1", gateway.port), 60) as wire:
        wire.sendall(f"{head}{len(body)}\r\n\r\n".encode() + body)
        assert wire.recv(1 << 16)
    eventually(lambda: not Connection.crowd)
    place.inference.script = lambda _: [whole()]
    eventually(lambda: not there() - {_Connection})  # of these one may be kept for the next request


def test_nothing_is_left_of_whoever_leaves_in_a_body(place, there):
    gateway = place.gateway()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nauthorization: Bearer {place.keys[ANA]}\r\ncontent-length: "
    with socket.create_connection(("127.0.0.1", gateway.port), 60) as wire:
        wire.sendall(f"{head}50000\r\n\r\n".encode() + b"{" * 40_000)
        eventually(lambda: Flight in there())
    eventually(lambda: not there() - {_Connection})
