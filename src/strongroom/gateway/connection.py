"""A client's connection, HTTP/1.1: a request, its answer, and the next, read with httptools and passed on as ASGI.

uvicorn's own protocol costs as much again (docs/adr/0014-a-gateway-of-our-own.md), and would have to be held to limits
that it does not have: nobody keeps a connection by being slow, nobody is read ahead without end, and a head, or what is
around a body, has a length.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, ClassVar, cast
from urllib.parse import unquote

import httptools

from strongroom.gateway.certificates import Peer, peer
from strongroom.gateway.deadline import Deadline
from strongroom.gateway.exchange import Exchange, Head
from strongroom.gateway.heads import KnownHead
from strongroom.gateway.leaving import Leaving, left

if TYPE_CHECKING:
    import uvicorn
    from uvicorn.server import ServerState

_HEAD_TIME = 20.0  # seconds in which a request has to begin on a new connection, and its head to have come
_IDLE_TIME = 30.0  # seconds until the next one begins
_BODY_TIME = 30.0  # seconds in which what follows a head has to come, whether anybody still reads it or not
_TAKE_TIME = 60.0  # seconds in which a reader has to take what waits to be sent
_HEAD_MOST = 64 << 10  # bytes, of trailers and of what is around chunks, too
_FRAMING = 8  # bytes that a body of chunks may take for each of its own
_UNREAD_MOST = 64 << 10  # bytes of a body that nobody has asked for; then the connection is not read
_AHEAD_MOST = 16  # requests that were sent before the one under way is answered
_FROM_ONE = 2000  # connections at a time from one address, or one network of IPv6, whose addresses nobody counts
_MALFORMED = (
    b"HTTP/1.1 400 Bad Request\r\ncontent-type: text/plain\r\ncontent-length: 24\r\nconnection: close\r\n\r\n"
    b"this is no HTTP request\n"
)
_FAILED = b"HTTP/1.1 500 Internal Server Error\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
_log = logging.getLogger("strongroom.gateway")


class Connection(asyncio.Protocol):
    """Made by uvicorn's server, which has its name, its lists, and `shutdown`."""

    __slots__ = (
        *("client", "counted", "full", "paused", "peer"),
        *("_address", "_ahead", "_answer", "_app", "_beside", "_body", "_coming", "_current", "_deaf", "_declined"),
        *("_ended", "_gone", "_headers", "_heads", "_in_head", "_in_message", "_known", "_leaving", "_loop", "_owed"),
        *("_parser", "_reading", "_server", "_taking", "_task", "_transport", "_turn", "_url", "_writable"),
    )
    crowd: ClassVar[Counter[str]] = Counter()  # connections, by whose they are
    most: ClassVar[int] = _FROM_ONE

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],  # noqa: ARG002 - of a lifespan, which has none
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        self._app, self._server = config.loaded_app, server_state
        # An application of ours takes an exchange as it is.
        self._answer: Callable[[Exchange], Awaitable[None]] | None = getattr(config.loaded_app, "exchange", None)
        self._loop = _loop or asyncio.get_running_loop()
        self._parser: Any = httptools.HttpRequestParser(self)
        self._coming, self._taking = Deadline(self._loop, self._late), Deadline(self._loop, self._abort)
        self._transport: asyncio.Transport | None = None
        self._address, self.client = "", ("", 0)
        self.counted: str | None = None  # see gateway/handshakes.py
        self.peer: Peer | None = None  # who has shown a certificate
        self._current: Exchange | None = None  # the one that is answered
        self._reading: Exchange | None = None  # the one whose request comes
        self._ahead: deque[Exchange] = deque()
        self._task: asyncio.Task[None] | None = None
        self._turn: asyncio.Future[None] | None = None  # what it waits for between two requests
        self._deaf = self._gone = self.paused = False
        self._leaving: Leaving | None = None  # while nothing is read
        self.full, self._writable = False, asyncio.Event()
        # Of the message that comes: whether one does, its head, whether one ended in this piece; bytes of this piece
        # that were body, and bytes since its beginning that were not.
        self._in_message = self._in_head = self._ended = False
        self._body, self._beside = 0, 0
        self._declined = 0  # bytes of a body that are still to come behind the offer of another protocol
        self._url, self._headers = b"", cast("list[tuple[bytes, bytes]]", [])
        self._heads: list[Head] = []  # that ended in this piece
        self._known: KnownHead[Head] | None = None
        self._owed = 0  # bytes of a body that are still to come behind a head that was known

    @staticmethod
    def whose(host: str) -> str:
        """Whose an address is: of IPv6 everybody has 2^64."""
        try:
            packed = socket.inet_pton(socket.AF_INET6, host.partition("%")[0]) if ":" in host else b""
        except OSError:
            return host
        return packed[:8].hex() if packed[:12].strip(b"\0") not in (b"", b"\xff\xff") else host

    # -- what the application uses -------------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)

    async def writable(self) -> None:
        await self._writable.wait()

    def read_on(self) -> None:
        """Read what comes, unless nobody has taken what has come already."""
        wanted = not self._ahead and (self._reading is None or self._reading.unread <= _UNREAD_MOST)
        if wanted is self.paused and self._transport is not None and not self._transport.is_closing():
            self.paused = not wanted
            if wanted:
                self._transport.resume_reading()
            else:
                self._transport.pause_reading()
            self._look_after(None if wanted else self._transport)

    def answered(self, exchange: Exchange) -> None:
        """The answer has been written whole: the next request's turn."""
        self._server.total_requests += 1
        self._current = None
        if not exchange.keep_alive:
            self._close()
            return
        if self._ahead:
            if self._transport is None or left(self._transport):  # nothing is begun for nobody
                self._abort()
                return
            self._begin(self._ahead.popleft())
        elif not self._in_message:
            self._coming.within(_IDLE_TIME)
        if self.paused:
            if self._in_message:  # it could not come before
                self._coming.within(_BODY_TIME)
            self.read_on()

    # -- what uvicorn's server uses ------------------------------------------------------------------------------

    def shutdown(self) -> None:
        """Answer what is under way, and no more."""
        if self._current is None:
            self._close()
        else:
            self._ahead.clear()
            self._current.keep_alive = False

    # -- asyncio.Protocol ----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is one in all but name
        self._server.connections.add(self)  # type: ignore[arg-type]
        name = transport.get_extra_info("peername")
        if isinstance(name, tuple):
            self.client = (str(name[0]), int(name[1]))
        if self.counted is None:
            self._address = self.whose(self.client[0])
            self.crowd[self._address] += 1
        else:
            self._address, self.counted = self.counted, None
        if self.crowd[self._address] > self.most:
            self._abort()
            return
        self._coming.within(_HEAD_TIME)
        self.peer = peer(transport)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - why makes no difference
        self._server.connections.discard(self)
        self.crowd[self._address] -= 1
        if not self.crowd[self._address]:
            del self.crowd[self._address]
        self._coming.close()
        self._taking.close()
        self._look_after(None)
        self._gone, self._deaf, self.full = True, True, False
        self._writable.set()
        self._wake()
        if self._current is not None:
            self._current.leave()
        self._ahead.clear()
        # Each of these keeps this, and would until the collector looks, which is seldom.
        self._current = self._reading = self._transport = self._parser = None

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            if self._declined:
                self._decline(data)
            return
        if self._owed:
            data = self._repay(data)
        elif self._known is not None and not self._in_message and self._current is None:
            data = self._again(self._known, data)
        if not data:
            return
        self._body, self._ended, self._heads, within = 0, False, [], self._in_message
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._offered(data[upgrade.args[0] :])
        except httptools.HttpParserError:
            self._malformed()
            return
        if self._in_message:
            if not self._ended:  # else this piece has some of the message before
                self._beside = max(0, self._beside + len(data) - _FRAMING * self._body)
                if self._beside > _HEAD_MOST:
                    self._abort()
            if not self._coming.pending:
                self._coming.within(_HEAD_TIME if self._in_head else _BODY_TIME)
        if len(self._heads) == 1 and not within and not self._deaf:
            self._learn(self._heads[0], data)

    def pause_writing(self) -> None:
        # Who reads a byte a minute would keep a stream, and its place at an inference server, for as long as it likes.
        self.full = True
        self._writable.clear()
        self._taking.within(_TAKE_TIME)

    def resume_writing(self) -> None:
        self.full = False
        self._writable.set()
        self._taking.met()

    # -- httptools -----------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self._url, self._headers = b"", []
        self._in_message, self._in_head, self._beside = True, True, 0
        self._coming.met()

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_head:  # trailers are no headers: nobody reads them
            return
        self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._coming.met()
        parser, url = self._parser, self._url
        version = parser.get_http_version()
        old = self.peer is not None and self.peer.old  # its certificate has to be shown again
        if not url.startswith(b"/"):  # with the scheme and host, as proxies are asked
            url = httptools.parse_url(url).path or b"/"
        path = url.partition(b"?")[0].decode("ascii")
        head = Head(
            parser.get_method().decode("ascii"),
            unquote(path) if "%" in path else path,
            version,
            self._headers,
            keep_alive=version == "1.1" and parser.should_keep_alive(),
        )
        self._heads.append(head)
        exchange = self._reading = Exchange(self, head, keep_alive=head.keep_alive and not old)
        if parser.should_upgrade():
            self._declined = exchange.head.length
        if self._current is None:
            self._begin(exchange)
        elif len(self._ahead) < _AHEAD_MOST:
            self._ahead.append(exchange)
            self.read_on()
        else:
            self._abort()

    def on_body(self, body: bytes) -> None:
        self._body += len(body)
        reading = self._reading
        if reading is not None and (reading is self._current or reading in self._ahead):  # else it is answered
            reading.feed(body)
            if reading.unread > _UNREAD_MOST:
                self.read_on()

    def on_message_complete(self) -> None:
        if self._declined:  # that is httptools' word, of whom offers another protocol
            return
        self._in_message, self._ended = False, True
        reading, self._reading = self._reading, None
        if reading is not None:
            reading.end()
        if self._current is None:  # it was answered before all of it had come
            self._coming.within(_IDLE_TIME)
        else:
            self._coming.met()

    # -- heads that are known ------------------------------------------------------------------------------------

    def _learn(self, head: Head, data: bytes) -> None:
        """What the parser has read in this piece, and it alone, from its first byte: the next that begins so is not
        read by it. One whose body can't be counted, or behind which nothing comes, is not known."""
        said = head.named.get(b"content-length", b"")  # httptools has refused a second one
        if head.keep_alive and not head.expects and b"transfer-encoding" not in head.named:
            self._known = KnownHead.of(data, self._body, said, head)

    def _again(self, known: KnownHead[Head], data: bytes) -> bytes:
        """What of `data` is for the parser: all of it, unless it is a request, or the beginning of one, whose head is
        known. Then what httptools would call is done here."""
        begin = known.matches(data)
        owed = known.size - (len(data) - begin)
        if not begin or owed < 0:
            return data
        head = known.said
        if known.digits != head.named[b"content-length"]:
            head = known.said = head.of_length(known.digits)
        self._coming.met()
        exchange = Exchange(self, head, keep_alive=self.peer is None or not self.peer.old)
        self._begin(exchange)
        if not owed:
            exchange.whole(data[begin:])
            return b""
        self._in_message, self._reading, self._owed = True, exchange, owed
        if len(data) > begin:
            self.on_body(data[begin:])
        self._coming.within(_BODY_TIME)
        return b""

    def _repay(self, data: bytes) -> bytes:
        """What of `data` is behind the body that is owed."""
        body = data[: self._owed]
        self._owed -= len(body)
        self.on_body(body)
        if not self._owed:
            self.on_message_complete()
        elif not self._coming.pending:
            self._coming.within(_BODY_TIME)
        return data[len(body) :]

    # -- parts ---------------------------------------------------------------------------------------------------

    def _begin(self, exchange: Exchange) -> None:
        self._current = exchange
        if self._task is None:
            self._task = self._loop.create_task(self._serve())
            # Also while it waits for the next request: a server that ends has closed its connection before.
            self._server.tasks.add(self._task)
        else:
            self._wake()
        exchange.task = self._task

    def _look_after(self, transport: asyncio.Transport | None) -> None:
        """Hear when the other side goes, while `transport` is not read."""
        if self._leaving is not None:
            self._leaving.close()
            self._leaving = None
        if transport is not None:
            self._leaving = Leaving(self._loop, transport, self._abort)

    def _wake(self) -> None:
        turn, self._turn = self._turn, None
        if turn is not None and not turn.done():  # cancelled
            turn.set_result(None)

    async def _serve(self) -> None:
        """Answer one request after the other: a task of its own for each would cost more than most checks of it."""
        try:
            while not self._gone:
                exchange = self._current
                if exchange is None:
                    self._turn = self._loop.create_future()
                    await self._turn
                    continue
                if self.full:  # of answers before: who takes none of them is given no more
                    await self.writable()
                if self._answer is not None:
                    await self._answer(exchange)
                else:
                    await self._app(exchange.scope(), exchange.receive, exchange.send)
                if self._current is exchange:  # it was left without an end
                    break
        except Exception:  # noqa: BLE001 - a fault of the application's ends its connection, and no other
            _log.exception("a request failed")
            if self._current is not None and not self._current.begun:
                self.write(_FAILED)
        except BaseException:
            self._abort()
            raise
        finally:
            self._server.tasks.discard(cast("asyncio.Task[None]", self._task))
        self._close()

    def _offered(self, rest: bytes) -> None:
        """Another protocol, which nobody here speaks; and httptools reads no more of this one."""
        self._deaf = True
        for exchange in (self._current, *self._ahead):
            if exchange is not None:
                exchange.keep_alive = False
        if self._declined:
            self._decline(rest)

    def _decline(self, data: bytes) -> None:
        """The body of a request that offers another protocol, as Java's client does with its first one: who is answered
        in HTTP/1.1 goes on in that (RFC 9110, section 7.8), and its body is there."""
        body = data[: self._declined]
        self._declined -= len(body)
        if body:
            self.on_body(body)
        if not self._declined:
            self.on_message_complete()
        elif not self._coming.pending:
            self._coming.within(_BODY_TIME)

    def _malformed(self) -> None:
        """What came is no HTTP, or has two readings: nothing more of this connection is read."""
        self._deaf = True
        current = self._current
        if current is not None and not current.more:  # it came whole before
            current.keep_alive = False
            self._ahead.clear()
            return
        # Of a body whose request is answered already: a second answer would be taken for that of somebody's next one.
        if self._reading is None if current is None else not current.begun:
            self.write(_MALFORMED)
        self._close()

    def _late(self) -> None:
        """What is to come has not, unless it is here that it is not read."""
        if self.paused and self._ahead:
            self._coming.within(_BODY_TIME)
        else:
            self._abort()

    def _close(self) -> None:
        """Once what was written has been taken: for that there is a time, too."""
        self._deaf = True
        self._ahead.clear()  # nobody answers those, nor may they keep a connection that nobody reads from being late
        if self._transport is not None and not self._gone:
            self._transport.close()
            self._coming.within(_TAKE_TIME)

    def _abort(self) -> None:
        self._deaf = True
        if self._transport is not None:
            self._transport.abort()
