"""An upstream that lies, hangs, floods, or goes away: the gateway's client against a real server on a socket."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable

import pytest

from strongroom.crypto.authority import Authority
from strongroom.errors import BackendError, UsageError
from strongroom.gateway.upstream import Timeouts, Upstream

FAST = Timeouts(connect=60, first=0.3, between=0.3, whole=1.0)
SLOW = Timeouts(connect=60, first=60, between=60, whole=60)


def asked(
    answer: bytes | list[bytes],
    *,
    take: Callable | None = None,
    close: bool = True,
    times: int = 1,
    timeouts: Timeouts = SLOW,
):
    """What a client gets of a server that answers each request with these bytes."""

    async def run():
        served = 0

        async def serve(reader, writer):
            nonlocal served
            try:
                while True:
                    await reader.readuntil(b"\r\n\r\n")
                    served += 1
                    for piece in [answer] if isinstance(answer, bytes) else answer:
                        writer.write(piece)
                        await writer.drain()
                        await asyncio.sleep(0.01)
                    if close:
                        break
            except (asyncio.IncompleteReadError, ConnectionError):
                pass
            finally:
                writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        upstream = Upstream(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", timeouts=timeouts)
        try:
            found = None
            for _ in range(times):
                reply = await upstream.get("/v1/models")
                found = await (take(reply) if take else reply.read())
            return found, served
        finally:
            upstream.close()
            server.close()

    return asyncio.run(run())


def code(answer, **more) -> str:
    with pytest.raises(BackendError) as caught:
        asked(answer, **more)
    return caught.value.code


def test_an_answer_of_a_known_length():
    assert asked(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello")[0] == b"hello"


def test_chunks_in_pieces():
    pieces = [
        b"HTTP/1.1 200 OK\r\ntransfer-enc",
        b"oding: chunked\r\n\r\n5\r\nhel",
        b"lo\r\n3\r\n wo\r\n",
        b"0\r\n\r\n",
    ]
    assert asked(pieces)[0] == b"hello wo"


def test_until_the_connection_closes():
    assert asked(b"HTTP/1.1 200 OK\r\n\r\nhello")[0] == b"hello"


def test_a_connection_is_used_again():
    body, served = asked(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok", close=False, times=3)
    assert (body, served) == (b"ok", 3)


def test_one_that_was_closed_meanwhile_is_opened_again():
    assert asked(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok", close=True, times=3)[0] == b"ok"


def test_100_continue_is_passed_over():
    assert asked(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")[0] == b"ok"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (b"SSH-2.0-OpenSSH\r\n", "upstream.malformed"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 50\r\n\r\nhello", "upstream.malformed"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n", "upstream.malformed"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: x\r\n\r\n", "upstream.malformed"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", "upstream.malformed"),
        (b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 2\r\n\r\nok", "upstream.malformed"),
        (b"HTTP/1.1 200", "upstream.malformed"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok" * 2, "upstream.malformed"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nokHTTP", "upstream.malformed"),
        (b"HTTP/1.1 200 OK\r\nx: " + b"a" * (1 << 21) + b"\r\n\r\n", "upstream.malformed"),
    ],
)
def test_what_is_no_answer_is_malformed(answer, expected):
    assert code(answer) == expected


def test_a_server_that_goes_on_in_another_protocol_is_malformed(caplog):
    answer = b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\nok"
    assert code(answer, close=False) == "upstream.malformed"
    assert "data_received() call failed" not in caplog.text  # nor a fault of ours


def test_a_server_that_hangs_up_at_once_is_unavailable():
    assert code(b"") == "upstream.unavailable"


def test_a_server_that_says_nothing_is_late():
    assert code([b"", b""] * 100, close=False, timeouts=FAST) == "upstream.timeout"
    half = b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhel"
    assert code(half, close=False, timeouts=FAST) == "upstream.timeout"


def test_a_head_that_never_ends_is_late():
    assert code([b"HTTP/1.1 200 OK\r\nx: ", *[b"a"] * 200], timeouts=FAST) == "upstream.timeout"


def test_a_reader_that_is_slow_keeps_nothing_for_longer_than_the_whole():
    async def slowly(reply):
        async for _ in reply.pieces():
            await asyncio.sleep(0.1)

    head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    assert code([head, *[b"1\r\nx\r\n"] * 1000], take=slowly, timeouts=FAST) == "upstream.timeout"


def test_a_server_that_never_ends_is_ended():
    pieces = [b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", *[b"1\r\nx\r\n"] * 1000]
    assert code(pieces, timeouts=FAST) == "upstream.timeout"


def test_a_gigabyte_is_not_kept():
    async def slowly(reply):
        async for _ in reply.pieces():
            await asyncio.sleep(0.005)
            assert reply.connection.waiting < 2 << 20  # what the socket gives at once, and no more
            if reply.connection.received > 8 << 20:
                reply.abort()
                return True
        return False

    head = b"HTTP/1.1 200 OK\r\ncontent-length: 1073741824\r\n\r\n"
    assert asked([head, *[bytes(1 << 20)] * 64], take=slowly)[0]


def test_what_waits_when_an_answer_is_given_up_is_not_given_out():
    """A version that is frozen, while its reader is slow, gives out nothing more."""

    found = []

    async def cut(reply):
        async for piece in reply.pieces():
            found.append(piece)
            while not reply.connection.waiting:  # noqa: ASYNC110 - the socket is waited for
                await asyncio.sleep(0.01)
            reply.abort()

    head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    assert code([head, b"1\r\na\r\n", b"1\r\nb\r\n"], take=cut, close=False) == "upstream.aborted"
    assert found == [b"a"]


def test_certificates_of_the_settings_are_trusted_and_no_others(tmp_path):
    ours, others = Authority(tmp_path / "ours", "Ours"), Authority(tmp_path / "others", "Others")
    (tmp_path / "ours.pem").write_text(ours.pem)
    (tmp_path / "others.pem").write_text(others.pem)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with ours.issued(["127.0.0.1"]) as certificate:
        context.load_cert_chain(certificate)

    async def serve(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
        await writer.drain()
        writer.close()

    async def get(trusted):
        server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
        upstream = Upstream(f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}", timeouts=SLOW, trusted=trusted)
        try:
            return await (await upstream.get("/v1/models")).read()
        finally:
            upstream.close()
            server.close()

    assert asyncio.run(get(tmp_path / "ours.pem")) == b"ok"
    for each in (tmp_path / "others.pem", None):
        with pytest.raises(BackendError, match="can't be reached"):
            asyncio.run(get(each))
    for url, trusted in (("https://h", tmp_path / "none.pem"), ("http://h", tmp_path / "ours.pem")):
        with pytest.raises(UsageError) as caught:
            Upstream(url, trusted=trusted)
        assert caught.value.code == "upstream.ca"
        assert "[[upstream]] of the settings" in caught.value.hint


def test_more_than_64_mebibytes_are_malformed():
    head = b"HTTP/1.1 200 OK\r\ncontent-length: 1073741824\r\n\r\n"
    assert code([head, *[bytes(4 << 20)] * 17]) == "upstream.malformed"


def test_nobody_listens():
    async def run():
        upstream = Upstream("http://127.0.0.1:9", timeouts=FAST, clock=lambda: 1000.0)
        for _ in range(5):
            with pytest.raises(BackendError, match="can't be reached"):
                await upstream.get("/")
        assert not upstream.available  # left alone for a while

    asyncio.run(run())


@pytest.mark.parametrize("url", ["ftp://x", "x", "http://", "http://u@h", "http://h?x", "http://h:99999", "http://[x"])
def test_urls(url):
    with pytest.raises(UsageError) as caught:
        Upstream(url)
    assert caught.value.code == "upstream.url"
