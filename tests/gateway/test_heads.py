"""Heads that are known: whatever comes has the reading that it has without them."""

import asyncio

import httptools
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.test_connection import answers, post, said, served
from strongroom.errors import BackendError
from strongroom.gateway import connection, upstream
from strongroom.gateway.heads import KnownHead
from strongroom.gateway.upstream import Timeouts, Upstream

HEAD = b"POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nX-Y: z\r\n\r\n"


class Read:
    """What httptools makes of one message, or of its beginning."""

    def __init__(self, data):
        self.headers, self.body, self.whole, self.heads = [], b"", 0, 0
        self.parser = httptools.HttpRequestParser(self)
        try:
            self.parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self.heads = 0

    def on_url(self, url):
        self.url = url

    def on_header(self, name, value):
        self.headers.append((name.lower(), value))

    def on_headers_complete(self):
        self.heads += 1

    def on_body(self, body):
        self.body += body

    def on_message_complete(self):
        self.whole += 1


def known(data=HEAD + b"hello", body=5, digits=b"5"):
    return KnownHead.of(data, body, digits, "said")


def test_the_same_head_is_known_whatever_the_length_of_its_body():
    head = known()
    assert head.matches(HEAD + b"hello") == len(HEAD)
    assert head.size == 5
    other = HEAD.replace(b": 5", b": 1234567")
    assert head.matches(other + b"h") == len(other)
    assert (head.size, head.digits, head.said) == (1_234_567, b"1234567", "said")
    assert head.matches(other) == len(other)
    assert head.matches(HEAD) == len(HEAD)
    assert head.size == 5


@pytest.mark.parametrize(
    ("data", "body", "digits"),
    [
        (HEAD, 0, b"6"),  # what the parser read is another length
        (HEAD + b"hello\r\n", 5, b"5"),  # something is behind it
        (b"\r\n\r\n" + HEAD, 0, b"5"),
        (HEAD.replace(b"X-Y: z\r\n", b"X-Y: z\n"), 0, b"5"),
        (HEAD.replace(b"X-Y: z", b"content-length: 5"), 0, b"5"),
        (HEAD.replace(b": 5", b":  5"), 0, b"5"),
        (HEAD.replace(b": 5", b": 5 "), 0, b"5"),
        (HEAD.replace(b": 5", b": +5"), 0, b"+5"),
        (HEAD.replace(b": 5", b": 123456789"), 0, b"123456789"),
        (HEAD.replace(b"z", b"z" * 5000), 0, b"5"),
        (HEAD.replace(b"Content-Length", b"X-Length"), 0, b""),
    ],
)
def test_only_a_plain_head_is_known(data, body, digits):
    assert known(data, body, digits) is None


@pytest.mark.parametrize(
    "other",
    [
        HEAD.replace(b": 5", b": "),
        HEAD.replace(b": 5", b": -5"),
        HEAD.replace(b": 5", b": 5 "),
        HEAD.replace(b": 5", b": 5\r"),
        HEAD.replace(b": 5", b": 0x5"),
        HEAD.replace(b": 5", b": 123456789"),
        HEAD.replace(b": 5", b"\xd9\xa5"),
        HEAD.replace(b"X-Y: z", b"X-Y: y"),
        HEAD.replace(b"X-Y: z\r\n", b"X-Y: z\r\nTransfer-Encoding: chunked\r\n"),
        HEAD[:-2],
        HEAD[:40],
        b"",
    ],
)
def test_another_head_is_not(other):
    assert known().matches(other) == 0


@given(
    st.lists(st.tuples(st.integers(0, len(HEAD) - 1), st.integers(0, 2), st.sampled_from(b"0159 \t\r\n:aA-+\x00\xff")))
)
@settings(max_examples=500, deadline=None)
def test_what_is_known_is_what_the_parser_reads(changes):
    data = bytearray(HEAD)
    for at, removed, added in changes[:3]:
        data[at : at + removed] = bytes([added])
    data, head = bytes(data), known()
    begin = head.matches(data + b"hello")
    if begin:
        # What is behind its body is for the parser in any case.
        read, plain = Read((data + b"hello")[: begin + head.size]), Read(HEAD)
        assert (read.heads, read.url) == (1, plain.url)
        assert read.headers == [
            (name, head.digits if name == b"content-length" else value) for name, value in plain.headers
        ]
        assert read.body == (data + b"hello")[begin:][: head.size]


_LAST = b"GET /last HTTP/1.1\r\nconnection: close\r\n\r\n"
_MESSAGES = st.sampled_from(
    [
        post(b"hello"),
        post(b"hello"),
        post(b"hello, and more of it"),
        post(b""),
        post(b"\r\n\r\nPOST / HTTP/1.1\r\n\r\n"),
        post(b"hello", path="/b"),
        post(b"hello", "x: y"),
        b"\r\n" + post(b"hello"),
        b"POST /a HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        b"GET /a HTTP/1.1\r\nhost: x\r\n\r\n",
        post(b"hello", "expect: 100-continue"),
        b"POST /a HTTP/1.1\r\nhost: x\r\ncontent-length: 5, 5\r\n\r\nhello",
        b"POST /a HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ncontent-length: 5\r\n\r\nhello",
        b"POST /a HTTP/1.0\r\nhost: x\r\ncontent-length: 5\r\n\r\nhello",
    ]
)


@given(st.lists(_MESSAGES, min_size=2, max_size=8), st.data())
@settings(max_examples=150, deadline=None)
def test_requests_have_the_answers_that_they_have_without(messages, data):
    pieces = []
    for message in [*messages, _LAST]:  # most often a piece is a message, as most clients send them
        cuts = data.draw(st.just([]) | st.lists(st.integers(0, len(message)), max_size=2).map(sorted))
        pieces += [message[a:b] for a, b in zip([0, *cuts], [*cuts, len(message)], strict=True) if a < b]
    if data.draw(st.booleans()):
        pieces = [b"".join(pieces[:2]), *pieces[2:]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connection.KnownHead, "of", lambda *_: None)
        without = served(pieces)
    found = served(pieces)
    assert (found.written, found.closed, found.aborted) == (without.written, without.closed, without.aborted)


def test_a_body_that_comes_behind_a_known_head_is_whole_before_it_is_answered():
    first, second = post(b"hello"), post(b"and more of it")
    at = second.index(b"\r\n\r\n") + 4
    wire = served([first, second[:at], second[at : at + 3], second[at + 3 :] + first])
    assert [said(each) for each in answers(wire.written, *["POST"] * 3)] == ["hello", "and more of it", "hello"]


def _whole(body, *lines):
    return b"".join([b"HTTP/1.1 200 OK\r\n", *lines, b"content-length: %d\r\n\r\n" % len(body), body])


_ANSWERS = st.sampled_from(
    [
        [_whole(b"hello")],
        [_whole(b"hello, and more")],
        [_whole(b"")],
        [_whole(b"hello", b"date: now\r\n")],
        [_whole(b"hello")[:-5], b"he", b"llo"],
        [_whole(b"hello" * 9)[:-2], b"lo"],
        [b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"],
        [b"HTTP/1.1 100 Continue\r\n\r\n" + _whole(b"hello")],
        [b"HTTP/1.1 404 Not Found\r\ncontent-length: 2\r\n\r\nno"],
        [_whole(b"hello") * 2],
        [_whole(b"hello")[:-1], b"oHTTP/1.1 200 OK\r\n"],
        [b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"],
        [b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ncontent-encoding: gzip\r\n\r\nhello"],
    ]
)


class _Wire(asyncio.Transport):
    """What an upstream is asked over: `pieces` come after what is written."""

    def __init__(self, made, answered):
        super().__init__()
        self.made, self.answered, self.aborted = made, answered, False

    def write(self, data):
        for piece in next(self.answered):
            asyncio.get_running_loop().call_soon(lambda piece=piece: self.aborted or self.made.data_received(piece))

    def abort(self):
        self.aborted = True

    def is_closing(self):
        return self.aborted


def _asked(script, patch):
    """What comes of asking once for each answer of the script, on as few connections as can be."""
    answered = iter(script)

    async def connect(_):
        made = upstream._Connection()
        made.connection_made(_Wire(made, answered))
        return made

    async def run():
        patch.setattr(Upstream, "_connect", connect)
        client, found = Upstream("http://127.0.0.1:9", timeouts=Timeouts(60, 60, 60, 60)), []
        for _ in script:
            try:
                reply = await client.post("/", b"")
                found.append((reply.status, reply.content_type, await reply.read()))
            except BackendError as error:
                found.append((error.code, error.message))
        return found

    return asyncio.run(run())


@given(st.lists(_ANSWERS, min_size=2, max_size=6))
@settings(max_examples=100, deadline=None)
def test_answers_are_read_as_they_are_without(script):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(upstream.KnownHead, "of", lambda *_: None)
        without = _asked(script, patch)
    with pytest.MonkeyPatch.context() as patch:
        assert _asked(script, patch) == without
