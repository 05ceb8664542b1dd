"""What the server waits for, and for how long: on a clock of the test's own, and over real connections."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import threading
import time
from http.client import HTTPResponse

import pytest
import uvicorn

from strongroom.crypto.authority import Authority
from strongroom.server import listen
from strongroom.server.guard import Guard

pytestmark = pytest.mark.server

REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


class Later:
    """A timer that was set."""

    def __init__(self, at, callback, arguments):
        self.at, self.callback, self.arguments, self.cancelled = at, callback, arguments, False

    def cancel(self):
        self.cancelled = True


class Loop:
    """The event loop, but for the time, which passes when `pass_by` says so."""

    def __init__(self):
        self.real, self.now, self.timers = asyncio.get_running_loop(), 0.0, []

    def call_later(self, delay, callback, *arguments):
        self.timers.append(Later(self.now + delay, callback, arguments))
        return self.timers[-1]

    def __getattr__(self, name):
        return getattr(self.real, name)

    async def pass_by(self, seconds):
        end = self.now + seconds
        while due := [each for each in self.timers if each.at <= end and not each.cancelled]:
            timer = min(due, key=lambda each: each.at)
            self.timers.remove(timer)
            self.now = timer.at
            timer.callback(*timer.arguments)
            await settled()
        self.now = end


class Wire:
    """The transport of a connection: what was written to it, and whether it is closed."""

    def __init__(self):
        self.written, self.closed = b"", False

    def get_extra_info(self, name):
        return ("192.0.2.1", 5) if name == "peername" else None

    def write(self, data):
        self.written += data

    def is_closing(self):
        return self.closed

    def close(self):
        self.closed = True

    abort = close

    def pause_reading(self):
        pass

    resume_reading = set_protocol = pause_reading


async def settled():
    for _ in range(20):
        await asyncio.sleep(0)


async def nothing(scope, receive, send):
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body", "body": b""})


async def much(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for _ in range(3):
        await send({"type": "http.response.body", "body": b"x" * 100_000, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


def connected(app=nothing):
    config = uvicorn.Config(app, http=listen.Connection, ws="none", lifespan="off", timeout_keep_alive=10_000)
    loop, wire = Loop(), Wire()
    made = listen.Connection(config, uvicorn.server.ServerState(), {}, loop)
    made.connection_made(wire)
    return made, loop, wire


def timed(story):
    """A test on the test's own clock."""
    return lambda self: asyncio.run(story(self))


class TestPatience:
    @pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\n", REQUEST + b"GET /"])
    def test_a_head_has_to_come(self, sent):
        async def story():
            connection, loop, wire = connected()
            if sent:
                connection.data_received(sent)
            await settled()
            await loop.pass_by(19)
            assert not wire.closed
            await loop.pass_by(21)
            assert wire.closed
            connection.connection_lost(None)

        asyncio.run(story())

    @timed
    async def test_a_head_that_comes_in_drops_is_not_waited_for(self):
        connection, loop, wire = connected()
        drops = 0
        while not wire.closed and drops < 100:
            connection.data_received(b"G")
            await loop.pass_by(1)
            drops += 1
        assert 20 <= drops <= 40
        connection.connection_lost(None)

    @timed
    async def test_a_connection_in_use_stays(self):
        connection, loop, wire = connected()
        for count in range(1, 50):
            connection.data_received(REQUEST)
            await settled()
            assert wire.written.count(b"HTTP/1.1 204") == count
            await loop.pass_by(19)
            assert not wire.closed
        connection.connection_lost(None)

    @timed
    async def test_a_request_that_is_being_answered_is_waited_for(self):
        done = asyncio.Event()

        async def slow(scope, receive, send):
            await done.wait()
            await nothing(scope, receive, send)

        connection, loop, wire = connected(slow)
        connection.data_received(REQUEST)
        await settled()
        await loop.pass_by(1000)
        assert not wire.closed
        done.set()
        await settled()
        assert wire.written.startswith(b"HTTP/1.1 204")
        connection.connection_lost(None)

    @timed
    async def test_what_is_sent_has_to_be_taken(self):
        connection, loop, wire = connected(much)
        connection.pause_writing()  # as the transport does, when its buffer is full
        connection.data_received(REQUEST)
        await settled()
        sent = len(wire.written)
        assert sent < 200_000  # nothing more is made while this waits
        await loop.pass_by(59)
        assert not wire.closed
        assert len(wire.written) == sent
        await loop.pass_by(2)
        assert wire.closed
        connection.connection_lost(None)
        await settled()

    @timed
    async def test_a_reader_that_takes_its_time_is_served(self):
        connection, loop, wire = connected(much)
        while wire.written.count(b"x") < 300_000 and not wire.closed:
            connection.pause_writing()
            if not wire.written:
                connection.data_received(REQUEST)
            await loop.pass_by(50)
            connection.resume_writing()
            await settled()
        assert not wire.closed
        assert wire.written.count(b"x") == 300_000
        connection.connection_lost(None)


@contextlib.contextmanager
def running(tmp_path, app):
    """The real server, here, so that its times can be made short."""
    authority = Authority(tmp_path / "tls", "test")
    with listen.listen("127.0.0.1", 0) as listener:
        with authority.issued(["127.0.0.1"]) as certificate:
            config = listen.configure(app, certificate)
        server = listen.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        context = ssl.create_default_context(cadata=authority.pem)
        port = listener.getsockname()[1]

        def connect():
            wire = socket.create_connection(("127.0.0.1", port), timeout=60)
            return context.wrap_socket(wire, server_hostname="127.0.0.1")

        try:
            yield connect
        finally:
            server.should_exit = True
            thread.join(60)


class TestConnections:
    def test_a_head_that_does_not_come(self, tmp_path, monkeypatch):
        monkeypatch.setattr(listen, "_HEAD_TIME", 0.3)
        closed = contextlib.suppress(ConnectionError)  # perhaps before this came
        with running(tmp_path, nothing) as connect, connect() as wire, closed:
            wire.sendall(b"GET / HTTP/1.1\r\n")
            assert wire.recv(4096) == b""  # closed, and not by us

    def test_an_answer_that_is_not_taken(self, tmp_path, monkeypatch):
        monkeypatch.setattr(listen, "_TAKE_TIME", 0.3)
        ended = threading.Event()

        async def endless(scope, receive, send):
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await receive()
            gone = asyncio.ensure_future(receive())
            while not gone.done():
                await send({"type": "http.response.body", "body": b"x" * 1_000_000, "more_body": True})
            ended.set()

        with running(tmp_path, endless) as connect, connect() as wire:
            wire.sendall(REQUEST)
            assert ended.wait(60)

    def test_one_address_has_so_many(self, tmp_path, monkeypatch):
        monkeypatch.setattr(listen.Connection, "most", 20)
        with running(tmp_path, nothing) as connect:
            for _ in range(2):  # those that are closed count no more
                opened, alive = [], 0
                with contextlib.suppress(OSError):
                    opened.extend(connect() for _ in range(30))
                for each in opened:
                    with contextlib.suppress(OSError):
                        each.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
                        alive += each.recv(4096).startswith(b"HTTP/1.1 204")
                    each.close()
                assert alive == 20
                while listen.Connection.crowd:  # the server has seen that they are closed
                    time.sleep(0.01)

    def test_nobody_names_another_address(self, tmp_path):
        with running(tmp_path, Guard(nothing, rate=0.001, burst=5)) as connect, connect() as wire:
            found = []
            for number in range(8):
                head = f"X-Forwarded-For: 192.0.2.{number}\r\nForwarded: for=192.0.2.{number}\r\nX-Real-IP: 1.1.1.1\r\n"
                wire.sendall(f"GET / HTTP/1.1\r\nHost: x\r\n{head}\r\n".encode())
                with HTTPResponse(wire, method="GET") as answer:
                    answer.begin()
                    answer.read()
                found.append(answer.status)
            assert found == [204] * 5 + [429] * 3

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_old_tls(self, tmp_path):
        with running(tmp_path, nothing) as connect:
            connect().close()
            with pytest.MonkeyPatch.context() as patch:
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
                context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
                context.set_ciphers("ALL:@SECLEVEL=0")
                context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
                patch.setattr(ssl, "create_default_context", lambda **_: context)
                port = connect.__closure__[1].cell_contents
                with socket.create_connection(("127.0.0.1", port)) as wire, pytest.raises(ssl.SSLError):
                    context.wrap_socket(wire)
