"""Connections, without a gateway behind them: an application that says what it was asked."""

import asyncio
import json

import h11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from uvicorn.server import ServerState

from strongroom.gateway import connection as module
from strongroom.gateway.connection import Connection
from strongroom.gateway.deadline import Deadline
from strongroom.gateway.exchange import EXCHANGE
from strongroom.gateway.listen import configure


class Wire(asyncio.Transport):
    """The other end: what was written, and whether it is open."""

    host = "192.0.2.7"

    def __init__(self):
        super().__init__()
        self.written = b""
        self.closed = self.aborted = self.paused = False

    def write(self, data):
        if not self.closed:
            self.written += data

    def get_extra_info(self, name, default=None):
        return (self.host, 5000) if name == "peername" else default

    def is_closing(self):
        return self.closed

    def close(self):
        self.closed = True

    def abort(self):
        self.closed = self.aborted = True

    def pause_reading(self):
        self.paused = True

    def resume_reading(self):
        self.paused = False


async def echo(scope, receive, send):
    """Answers with what it was asked, as JSON with its length, or in pieces at /pieces."""
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        body, more = body + message["body"], message["more_body"]
    said = json.dumps({"method": scope["method"], "path": scope["path"], "body": body.decode("latin-1")}).encode()
    if scope["path"] == "/pieces":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for k in range(0, len(said), 7):
            await send({"type": "http.response.body", "body": said[k : k + 7], "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        return
    headers = [(b"content-length", b"%d" % len(said))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": said})


def served(pieces, app=echo, *, then=None):
    """What comes of the `pieces`, one after the other; `then(connection, wire)` is done last."""

    async def run():
        connection, wire = Connection(configure(app), ServerState(), {}), Wire()
        connection.connection_made(wire)
        for piece in pieces:
            if not wire.closed:
                connection.data_received(piece)
            for _ in range(8):
                await asyncio.sleep(0)
        if then is not None:
            then(connection, wire)
        for _ in range(8):
            await asyncio.sleep(0)
        connection.connection_lost(None)
        for _ in range(8):
            await asyncio.sleep(0)
        assert not connection.crowd
        return wire

    return asyncio.run(run())


def answers(written, *methods):
    """As h11, which is nobody of ours, reads them: status, headers, and body of each."""
    found = []
    rest = written
    for method in methods:
        reader = h11.Connection(h11.CLIENT)
        reader.send(h11.Request(method=method, target="/", headers=[("host", "x")]))
        reader.send(h11.EndOfMessage())
        reader.receive_data(rest)
        head, body = reader.next_event(), b""
        while head.status_code < 200:
            head = reader.next_event()
        while not isinstance(event := reader.next_event(), h11.EndOfMessage):
            body += event.data
        found.append((head.status_code, dict(head.headers), body))
        rest = reader.trailing_data[0]
    assert rest == b""
    return found


def post(body, *lines, path="/a"):
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
    return (head + "".join(line + "\r\n" for line in lines) + "\r\n").encode() + body


def said(answer):
    return json.loads(answer[2])["body"]


def test_one_answer_is_one_write():
    class Counting(Wire):
        writes = 0

        def write(self, data):
            self.writes += 1
            super().write(data)

    async def run():
        connection, wire = Connection(configure(echo), ServerState(), {}), Counting()
        connection.connection_made(wire)
        connection.data_received(post(b"hello"))
        for _ in range(5):
            await asyncio.sleep(0)
        connection.connection_lost(None)
        return wire

    wire = asyncio.run(run())
    assert wire.writes == 1
    assert said(answers(wire.written, "POST")[0]) == "hello"


_SEQUENCE = (
    post(b"one")
    + post(b"", path="/pieces")
    + b"GET /b?c=d HTTP/1.1\r\nhost: x\r\n\r\n"
    + b"POST /pieces HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\nx: y\r\n\r\n"
    + b"HEAD /a HTTP/1.1\r\nhost: x\r\n\r\n"
    + post(b"last", "connection: close")
)
_METHODS = ("POST", "POST", "GET", "POST", "HEAD", "POST")


@given(st.lists(st.integers(0, len(_SEQUENCE)), max_size=12).map(sorted))
@settings(max_examples=60, deadline=None)
def test_requests_are_answered_in_turn_however_they_come(cuts):
    wire = served([_SEQUENCE[a:b] for a, b in zip([0, *cuts], [*cuts, len(_SEQUENCE)], strict=True)])
    found = answers(wire.written, *_METHODS)
    assert [status for status, _, _ in found] == [200] * 6
    assert [said(each) for each in found if each[2]] == ["one", "", "", "abcde", "last"]
    assert found[4][2] == b""
    assert found[5][1][b"connection"] == b"close"
    assert wire.closed


@given(st.binary(max_size=300), st.integers(0, 300))
@settings(max_examples=150, deadline=None)
def test_whatever_comes_is_answered_or_closed(data, cut):
    at = min(cut, len(_SEQUENCE))
    wire = served([_SEQUENCE[:at], data])
    assert wire.written == b"" or wire.written.startswith(b"HTTP/1.1 ")


@pytest.mark.parametrize(
    "smuggled",
    [
        b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n"
        b"0\r\n\r\nGET /b HTTP/1.1\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\ncontent-length: 4\r\n\r\nabcd",
        b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost : x\r\n\r\n",
        b"POST \xff HTTP/1.1\r\nhost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
)
def test_what_has_two_readings_is_not_read(smuggled):
    wire = served([smuggled])
    assert wire.closed
    assert wire.written.count(b"HTTP/1.1 ") == 1
    assert wire.written.startswith(b"HTTP/1.1 400 ")


def test_a_request_that_came_whole_is_answered_before_what_is_none_ends_the_connection():
    waits = asyncio.Event()

    async def app(scope, receive, send):
        await waits.wait()
        await echo(scope, receive, send)

    wire = served([post(b"good"), b"\x00\x01garbage", post(b"late")], app, then=lambda *_: waits.set())
    assert [said(each) for each in answers(wire.written, "POST")] == ["good"]
    assert wire.closed
    assert not wire.aborted


def test_nobody_is_read_ahead_without_end():
    never = asyncio.Event()

    async def app(scope, receive, send):
        await never.wait()

    assert served([post(b"") * 3], app, then=lambda _, wire: setattr(wire, "was", wire.paused)).was
    assert served([post(b"") * 30], app).aborted
    long = post(b"x" * 500_000)
    assert served([long[: 100 << 10]], app, then=lambda _, wire: setattr(wire, "was", wire.paused)).was
    assert said(answers(served([long[: 100 << 10], long[100 << 10 :]]).written, "POST")[0]) == "x" * 500_000


def test_a_body_that_nobody_takes_is_passed_over():
    async def app(_, __, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"no"})

    long = post(b"x" * 300_000)
    wire = served([long[:1000], long[1000:100_000], long[100_000:], post(b"")], app)
    assert [body for _, _, body in answers(wire.written, "POST", "POST")] == [b"no", b"no"]
    assert not wire.paused


async def _turns(until=lambda: False):
    for _ in range(20):
        if until():
            return
        await asyncio.sleep(0)


@pytest.fixture
def connected():
    """Makes connections that are open until the test ends."""
    made = []

    def make(app, host="192.0.2.7"):
        connection, wire = Connection(configure(app), ServerState(), {}), Wire()
        wire.host = host
        connection.connection_made(wire)
        made.append(connection)
        return connection, wire

    yield make
    for connection in made:
        connection.connection_lost(None)
    assert not Connection.crowd


async def _refuses(_, __, send):
    await send({"type": "http.response.start", "status": 401, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"no"})


def test_a_body_that_came_before_its_answer_and_that_nobody_took_leaves_the_connection_read(connected):
    go = asyncio.Event()

    async def app(scope, receive, send):
        await go.wait()
        await _refuses(scope, receive, send)

    long = post(b"x" * 300_000)

    async def run():
        connection, wire = connected(app)
        connection.data_received(long[:100_000])
        await _turns()
        assert wire.paused
        go.set()
        await _turns()
        assert not wire.paused
        connection.data_received(long[100_000:] + post(b""))
        await _turns()
        return wire

    found = answers(asyncio.run(run()).written, "POST", "POST")
    assert [body for _, _, body in found] == [b"no", b"no"]


def test_a_body_that_is_none_gets_no_second_answer():
    wire = served([b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n1\r\nx", b"\r\nzz"], _refuses)
    assert [status for status, _, _ in answers(wire.written, "POST")] == [401]
    assert wire.closed


def test_whoever_does_not_take_the_last_answer_does_not_keep_the_connection(monkeypatch, connected):
    monkeypatch.setattr(module, "_TAKE_TIME", 0.02)

    async def run():
        connection, wire = connected(echo)
        connection.data_received(post(b"", "connection: close"))
        await _turns(lambda: wire.closed)
        assert not wire.aborted  # what was written may still be taken
        async with asyncio.timeout(60):
            while not wire.aborted:  # noqa: ASYNC110 - a timer is waited for
                await asyncio.sleep(0.01)

    asyncio.run(run())


def test_what_was_asked_ahead_does_not_keep_a_connection_that_ends(monkeypatch, connected):
    """Whoever asks on behind a request that ends the connection, and takes no answer, would have it for ever."""
    monkeypatch.setattr(module, "_TAKE_TIME", 0.02)
    monkeypatch.setattr(module, "_BODY_TIME", 0.02)

    async def ends(scope, receive, send):
        await receive()
        headers = [(b"content-length", b"2"), (b"connection", b"close")]
        await send({"type": "http.response.start", "status": 400, "headers": headers})
        await send({"type": "http.response.body", "body": b"no"})

    async def run():
        connection, wire = connected(ends)
        connection.data_received(post(b"one") + post(b"two"))
        async with asyncio.timeout(60):
            while not wire.aborted:  # noqa: ASYNC110 - a timer is waited for
                await asyncio.sleep(0.01)

    asyncio.run(run())


def test_what_is_not_read_is_not_late(monkeypatch, connected):
    monkeypatch.setattr(module, "_HEAD_TIME", 0.03)
    go = asyncio.Event()

    async def app(scope, receive, send):
        await go.wait()
        await echo(scope, receive, send)

    async def run():
        connection, wire = connected(app)
        connection.data_received(post(b"one") + post(b"two") + post(b"three")[:30])
        await asyncio.sleep(0.1)
        assert wire.paused
        assert not wire.closed
        monkeypatch.setattr(module, "_HEAD_TIME", 30)  # for what is read from then on
        go.set()
        await _turns(lambda: not wire.paused)
        connection.data_received(post(b"three")[30:])
        await _turns()
        return wire

    found = answers(asyncio.run(run()).written, "POST", "POST", "POST")
    assert [said(each) for each in found] == ["one", "two", "three"]


@pytest.mark.parametrize(
    ("hosts", "most"),
    [
        (("2001:db8::1", "2001:db8::2:3", "2001:db8:0:0:ffff::"), 2),
        (("2001:db8::1", "2001:db8:0:1::1", "2001:db8:1::1"), 3),
        (("::ffff:192.0.2.1", "::ffff:192.0.2.2", "192.0.2.3"), 3),
    ],
)
def test_connections_of_one_network_are_counted_together(monkeypatch, hosts, most, connected):
    monkeypatch.setattr(Connection, "most", 2)

    async def run():
        return sum(not wire.closed for wire in [connected(echo, host)[1] for host in hosts])

    assert asyncio.run(run()) == most


@pytest.mark.parametrize("cut", [60, 120, 130, 140, 1000])
def test_who_offers_another_protocol_is_answered_in_this_one(cut):
    """Java's client does so with its first request on a connection without TLS, whatever that is."""
    offer = ("connection: Upgrade, HTTP2-Settings", "upgrade: h2c", "http2-settings: AAEAAEAA")
    sent = post(b"hello", *offer) + b"GET /b HTTP/1.1\r\nhost: x\r\n\r\n"
    wire = served([sent[:cut], sent[cut:]])
    found = answers(wire.written, "POST")
    assert [said(each) for each in found] == ["hello"]
    assert found[0][1][b"connection"] == b"close"
    assert wire.closed
    assert said(answers(served([post(b"", *offer)]).written, "POST")[0]) == ""
    chunked = (
        b"POST /a HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: h2c\r\ntransfer-encoding: chunked\r\n\r\n"
    )
    assert said(answers(served([chunked, b"0\r\n\r\n"]).written, "POST")[0]) == ""


def test_who_expects_to_be_told_to_go_on_is():
    wire = served([b"POST /a HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 2\r\n\r\n", b"hi"])
    assert wire.written.startswith(b"HTTP/1.1 100 Continue\r\n\r\n")
    assert said(answers(wire.written, "POST")[0]) == "hi"


def test_clients_of_1_0_are_not_told_to_go_on():
    wire = served([b"POST /a HTTP/1.0\r\nexpect: 100-continue\r\ncontent-length: 2\r\n\r\n", b"hi"])
    assert wire.written.startswith(b"HTTP/1.1 200 ")
    assert said(answers(wire.written, "POST")[0]) == "hi"


def test_clients_of_1_0_get_a_body_until_the_end():
    wire = served([b"GET /pieces HTTP/1.0\r\n\r\n"])
    assert b"chunked" not in wire.written
    assert wire.written.endswith(b'"body": ""}')
    assert wire.closed


@pytest.mark.parametrize("value", [b"a\r\nset-cookie: b", b"a\nb", b"a\rb", b"a\r\n\r\nHTTP/1.1 200 OK"])
def test_no_header_begins_another_line(value, caplog):
    async def app(_, __, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x-request-id", value)]})

    wire = served([post(b"")], app)
    assert wire.written.startswith(b"HTTP/1.1 500 ")
    assert value not in wire.written
    assert "line break" in caplog.text


@pytest.mark.parametrize("begun", [False, True])
def test_an_application_that_fails_ends_its_connection(begun, caplog):
    async def app(_, __, send):
        if begun:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"x", "more_body": True})
        raise RuntimeError("a fault")

    wire = served([post(b"")], app)
    assert wire.closed
    assert wire.written.startswith(b"HTTP/1.1 200" if begun else b"HTTP/1.1 500")
    assert not wire.written.endswith(b"0\r\n\r\n")
    assert "a fault" in caplog.text


def test_an_end_that_is_asked_for_lets_what_is_under_way_end():
    go = asyncio.Event()

    async def app(scope, receive, send):
        await go.wait()
        await echo(scope, receive, send)

    def end(connection, _):
        connection.shutdown()
        go.set()

    wire = served([post(b"one"), post(b"two")], app, then=end)
    assert [said(each) for each in answers(wire.written, "POST")] == ["one"]
    assert wire.closed
    assert served([], then=lambda connection, _: connection.shutdown()).closed


def test_the_application_hears_when_its_client_goes():
    told = []

    async def app(scope, receive, _):
        scope[EXCHANGE].when_gone(lambda: told.append("gone"))
        told.append((await receive())["type"])
        told.append((await receive())["type"])

    served([post(b"")], app)
    assert told == ["http.request", "gone", "http.disconnect"]


def test_a_deadline_is_moved_and_passes_once():
    async def run():
        loop, late, passed = asyncio.get_running_loop(), [], asyncio.Event()

        def tell():
            late.append(loop.time())
            passed.set()

        async def next_one():
            await asyncio.wait_for(passed.wait(), 60)
            passed.clear()

        deadline = Deadline(loop, tell)
        begun = loop.time()
        deadline.within(0.02)
        deadline.within(0.15)
        assert deadline.pending
        await next_one()
        assert late[0] - begun >= 0.149  # once, and not at the first of the two
        assert len(late) == 1
        assert not deadline.pending
        deadline.within(30)
        deadline.within(0.01)  # a nearer one is not kept waiting for the timer of one that is far
        await next_one()
        deadline.within(0.01)
        deadline.met()
        await asyncio.sleep(0.05)
        deadline.within(0.01)
        deadline.close()
        await asyncio.sleep(0.05)
        assert len(late) == 2

    asyncio.run(run())


def test_who_takes_no_answers_is_given_no_more():
    """Else whoever asks on and reads nothing would fill the gateway's memory with answers."""
    asked = []

    async def app(scope, *_):
        asked.append(scope["path"])
        scope[EXCHANGE].answer(200, b"", [], b"ok")

    async def run():
        connection, wire = Connection(configure(app), ServerState(), {}), Wire()
        connection.connection_made(wire)
        connection.data_received(post(b"", path="/1"))
        await turns()
        connection.pause_writing()
        connection.data_received(post(b"", path="/2") + post(b"", path="/3"))
        await turns()
        before = list(asked)
        connection.resume_writing()
        await turns()
        connection.connection_lost(None)
        return before, wire

    async def turns():
        for _ in range(8):
            await asyncio.sleep(0)

    before, wire = asyncio.run(run())
    assert (before, asked) == (["/1"], ["/1", "/2", "/3"])
    assert [status for status, _, _ in answers(wire.written, "POST", "POST", "POST")] == [200] * 3
