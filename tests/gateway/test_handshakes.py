"""Connections whose handshake is not over: they count, and end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import ssl
import threading
import time
from collections import Counter

import pytest

from strongroom.crypto.authority import Authority
from strongroom.gateway import handshakes
from strongroom.gateway import listen as gateway
from strongroom.gateway.connection import Connection
from strongroom.server import listen as custodian

REQUEST = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"


async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        for word in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{word}.complete"})
        return
    await send({"type": "http.response.start", "status": 204, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})


@pytest.fixture(params=["gateway", "custodian"])
def door(request, tmp_path):
    """A server with TLS."""
    authority = Authority(tmp_path / "tls", "test")
    with authority.issued(["127.0.0.1"]) as certificate:
        if request.param == "gateway":
            config, kind = gateway.configure(app, (certificate, certificate)), Connection
        else:
            config, kind = custodian.configure(app, certificate), custodian.Connection
    made = Door(config, kind, ssl.create_default_context(cadata=authority.pem))
    yield made
    made.stop()


class Door:
    def __init__(self, config, kind, tls) -> None:
        self.kind, self.tls = kind, tls
        self.server, self.listener = handshakes.Server(config), custodian.listen("127.0.0.1", 0)
        self.thread = threading.Thread(target=self.server.run, args=([self.listener],))
        self.port = self.listener.getsockname()[1]
        self.thread.start()
        until(lambda: getattr(self.server, "servers", []))

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(60)
        assert not self.thread.is_alive()
        assert not self.kind.crowd
        self.listener.close()

    def silent(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)

    def answered(self) -> bool:
        """Whether somebody who speaks at once is."""
        with contextlib.suppress(OSError), self.tls.wrap_socket(self.silent(), server_hostname="127.0.0.1") as wire:
            wire.sendall(REQUEST)
            return wire.recv(4096).startswith(b"HTTP/1.1 204")
        return False


def until(done) -> None:
    end = time.monotonic() + 60
    while not done():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_who_says_nothing_is_counted(door, monkeypatch):
    monkeypatch.setattr(door.kind, "most", 3)
    monkeypatch.setattr(handshakes, "_TIME", 120.0)
    assert door.answered()
    until(lambda: not door.kind.crowd)
    silent = [door.silent() for _ in range(3)]
    assert not door.answered()
    for each in silent:
        each.close()
    until(door.answered)  # what has ended counts no more
    # Both kinds together.
    until(lambda: not door.kind.crowd)
    with door.tls.wrap_socket(door.silent(), server_hostname="127.0.0.1") as wire:
        wire.sendall(REQUEST)
        assert wire.recv(4096)
        silent = [door.silent() for _ in range(2)]
        assert not door.answered()
        for each in silent:
            each.close()


def test_a_handshake_has_a_time(door, monkeypatch):
    monkeypatch.setattr(handshakes, "_TIME", 0.2)
    begun = b"\x16\x03\x01\x02\x00"  # the head of a first message whose rest does not come
    for said in (b"", begun):
        with door.silent() as wire, contextlib.suppress(ConnectionError):
            wire.sendall(said)
            assert wire.recv(1) == b""
    monkeypatch.undo()  # a handshake that comes may take longer than that here
    assert door.answered()


def test_what_is_no_handshake_ends_alone(door, caplog):
    with door.silent() as wire:
        wire.sendall(REQUEST)
        with contextlib.suppress(ConnectionError):
            while wire.recv(4096):
                pass
    assert door.answered()
    assert caplog.records == []


def test_a_server_that_ends_waits_for_no_handshake(door, monkeypatch):
    monkeypatch.setattr(handshakes, "_TIME", 120.0)
    with door.silent() as wire:
        until(lambda: any(each._tasks for each in door.server.servers))
        door.stop()
        with contextlib.suppress(ConnectionError):
            assert wire.recv(1) == b""


def test_without_file_descriptors_it_waits_for_some(monkeypatch):
    """A listener that is ready and can't be taken from would keep the process busy."""
    monkeypatch.setattr(handshakes, "_AGAIN", 0.05)

    class Listener:
        def __init__(self, real) -> None:
            self.real, self.asked = real, 0

        def __getattr__(self, name):
            return getattr(self.real, name)

        def accept(self):
            self.asked += 1
            if self.asked < 3:
                raise OSError(errno.EMFILE, "Too many open files")
            return self.real.accept()

    class Kind:
        crowd, most, whose = Counter(), 9, str

    async def story() -> int:
        with custodian.listen("127.0.0.1", 0) as real:
            listener, came = Listener(real), asyncio.Event()
            loop = asyncio.get_running_loop()
            found = handshakes.Handshakes(loop, listener, ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), None, Kind)
            monkeypatch.setattr(found, "_shake", lambda accepted, _: _set(came, accepted))
            with socket.create_connection(real.getsockname()):
                await asyncio.wait_for(came.wait(), 60)
            found.close()
            return listener.asked

    async def _set(came, accepted):
        accepted.close()
        came.set()

    assert asyncio.run(story()) <= 4
