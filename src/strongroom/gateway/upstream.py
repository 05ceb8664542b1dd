"""One inference server behind the gateway: HTTP/1.1 over plain connections that are kept, read with httptools.

Libraries that do more cost more than all of the gateway's checks (docs/reference/bench-gateway.md). What an upstream
sends is bounded before it is kept: its head, a body that is read whole, and what of a stream waits to be taken.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import httptools

from strongroom.errors import BackendError, StrongroomError, UsageError
from strongroom.gateway.deadline import Deadline
from strongroom.gateway.heads import KnownHead

_BODY_MOST = 64 << 20  # bytes of an answer, whole or streamed
_WAITING_MOST = 256 << 10  # bytes of a stream that wait; then the connection is no longer read
_HEAD_MOST = 64 << 10  # bytes of the head of an answer, of its trailers, and of what is around its chunks
_FRAMING = 8  # bytes that chunks may take for each byte in them
_KEPT = 512  # idle connections
_IDLE = 30.0  # seconds after which an idle one is not used again: upstreams close theirs without a word
_FAILURES = 5  # in a row, after which an upstream is left alone
_LEFT_ALONE = 5.0  # seconds


@dataclass(frozen=True)
class Timeouts:
    """Seconds: to connect, until the head of an answer, between two pieces of it, and for the whole."""

    connect: float = 5.0
    first: float = 120.0
    between: float = 60.0
    whole: float = 600.0


class Upstream:
    """Where requests go. `headers`: lines that each request carries, such as the channel's secret; `trusted`: a file of
    certificates to trust instead of the machine's. UsageError ``upstream.url``, ``upstream.ca``."""

    def __init__(
        self,
        url: str,
        *,
        timeouts: Timeouts | None = None,
        headers: tuple[tuple[str, str], ...] = (),
        trusted: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        try:
            parts = urlsplit(url)
            host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError:
            host, port, parts = "", 0, urlsplit("")
        if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment or parts.username:
            raise UsageError(
                "upstream.url", f"{url!r:.80} is no http(s)://HOST:PORT[/PATH]", hint="--upstream http://127.0.0.1:8000"
            )
        self.url, self.host, self.port = url, host, port
        self._tls = _context(url, trusted) if parts.scheme == "https" or trusted is not None else None
        self._path = parts.path.rstrip("/").removesuffix("/v1")  # base URLs of clients end so
        self.timeouts = timeouts or Timeouts()
        lines = [f"host: {parts.netloc}", "content-type: application/json", "accept-encoding: identity"]
        lines += [f"{name}: {value}" for name, value in headers]
        self._head = "\r\n".join(lines).encode("latin-1")
        self._clock = clock
        self._idle: deque[tuple[_Connection, float]] = deque()
        self._failures, self._closed_until = 0, 0.0

    @property
    def available(self) -> bool:
        """Whether it is worth a try: after several failures in a row an upstream is left alone for a while."""
        return self._clock() >= self._closed_until

    def post(self, path: str, body: bytes, *, whole: bool = False, more: bytes = b"") -> Coroutine[Any, Any, Reply]:
        """Begin a request; back when the head of the answer is there. BackendError ``upstream.unavailable``,
        ``upstream.timeout``, ``upstream.malformed``. `whole`: of an answer that is no stream, the first byte comes when
        all of it has been generated, so it may take as long as the whole. `more`: lines of the head, each after CR LF.

        A connection that was kept may have been closed meanwhile: only then, and before a byte of an answer, is a
        request sent again. Nothing is generated twice.
        """
        return self.send(self.request(path, body, more), self.timeouts.whole if whole else self.timeouts.first)

    def request(self, path: str, body: bytes, more: bytes = b"") -> bytes:
        """What `post` sends."""
        return b"POST %s HTTP/1.1\r\n%s%s\r\ncontent-length: %d\r\n\r\n%s" % (
            (self._path + path).encode("ascii"), self._head, more, len(body), body
        )  # fmt: skip

    async def get(self, path: str) -> Reply:
        """As `post`, without a body."""
        request = b"GET %s HTTP/1.1\r\n%s\r\n\r\n" % ((self._path + path).encode("ascii"), self._head)
        return await self.send(request, self.timeouts.first)

    def begin(self, request: bytes, first: float) -> Reply | None:
        """Send a request over a connection that was kept, if one was, without waiting: then wait for `Reply.head`, and
        go on with `send` where that is not `there`, or with `answered`. `first`: seconds until the head is there."""
        connection = self._kept()
        return None if connection is None else connection.ask(request, self, first)

    def answered(self) -> None:
        """It has answered."""
        self._failures = 0

    async def send(self, request: bytes, first: float, begun: Reply | None = None) -> Reply:
        """What `post` waits for, from its beginning, or from that of `begun`."""
        while True:
            fresh, reply, begun = False, begun or self.begin(request, first), None
            try:
                if reply is None:
                    fresh, reply = True, (await self._connect()).ask(request, self, first)
                while not reply.connection.answers():
                    await reply.head()
            except _ClosedEarly:
                if not fresh:
                    continue
                raise self._failed("upstream.unavailable", "closed the connection without an answer") from None
            except OSError as error:
                raise self._failed("upstream.unavailable", f"can't be reached: {error.strerror or error}") from None
            except asyncio.CancelledError:
                if reply is not None:
                    reply.connection.abort()
                raise
            self.answered()
            return reply

    def _kept(self) -> _Connection | None:
        oldest = self._clock() - _IDLE
        while self._idle:
            connection, since = self._idle.pop()
            if since >= oldest and not connection.closed:
                return connection
            connection.abort()
        return None

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self.timeouts.connect):
                _, connection = await loop.create_connection(_Connection, self.host, self.port, ssl=self._tls)
        except TimeoutError:
            raise self._failed("upstream.timeout", f"did not connect within {self.timeouts.connect:g} s") from None
        return connection

    def keep(self, connection: _Connection) -> None:
        if len(self._idle) < _KEPT:
            self._idle.append((connection, self._clock()))
        else:
            connection.abort()

    def _failed(self, code: str, what: str) -> BackendError:
        self._failures += 1
        if self._failures >= _FAILURES:
            self._closed_until = self._clock() + _LEFT_ALONE
        return BackendError(code, f"the inference server {what}")

    def close(self) -> None:
        while self._idle:
            self._idle.pop()[0].abort()


def _context(url: str, trusted: Path | None) -> ssl.SSLContext:
    if not url.lower().startswith("https:"):
        raise UsageError(
            "upstream.ca",
            f"{url!r:.80} is not https, and shows no certificate to trust",
            hint='url = "https://HOST:PORT" in [[upstream]] of the settings, or no ca beside it',
        )
    try:
        return ssl.create_default_context(cafile=trusted)
    except OSError as error:
        raise UsageError(
            "upstream.ca",
            f"can't trust the certificates in {trusted}: {error}",
            hint="ca in [[upstream]] of the settings is a file with the certificates of its authority, PEM",
        ) from None


class _ClosedEarly(Exception):
    """The connection was closed before the first byte of an answer."""


class _Connection(asyncio.Protocol):
    """One connection: a request, its answer, and again. Callbacks of httptools fill what `Reply` takes."""

    __slots__ = (
        *("begun", "closed", "content_type", "failure", "loop", "most", "pieces", "received", "status", "waiting"),
        *("whole", "_again", "_chunked", "_deadline", "_head_size", "_known", "_length", "_owed", "_parser", "_paused"),
        *("_seconds", "_transport", "_until_closed", "_waiter"),
    )

    def __init__(self) -> None:
        self.closed = False
        self._transport: asyncio.Transport | None = None
        self._parser: Any = httptools.HttpResponseParser(self)
        self._waiter: asyncio.Future[None] | None = None
        self.loop = asyncio.get_running_loop()
        self._seconds, self._deadline = 0.0, Deadline(self.loop, self._late)
        self._known: KnownHead[bytes] | None = None  # of answers with status 200, with their content-type
        self._owed = 0  # bytes of a body that are still to come behind such a head
        self._fresh()

    def _fresh(self) -> None:
        self.status, self.whole, self.begun = 0, False, False
        self.failure: BackendError | None = None
        self.pieces: list[bytes] = []
        self.waiting, self.received, self._head_size = 0, 0, 0
        self.content_type, self.most = b"", _BODY_MOST
        self._paused, self._again, self._until_closed = False, True, False
        self._length: bytes | None = None
        self._chunked = False

    # -- asking --------------------------------------------------------------------------------------------------

    def ask(self, request: bytes, upstream: Upstream, first: float) -> Reply:
        assert self._transport is not None  # noqa: S101 - made by create_connection
        self._fresh()
        self._transport.write(request)
        return Reply(self, upstream, first)

    def answers(self) -> bool:
        """Whether the head of an answer is there; _ClosedEarly, BackendError ``upstream.*`` if it will not come."""
        if self.failure is not None:
            raise self.failure
        if self.closed and not self.status:
            if not self.begun:
                raise _ClosedEarly
            raise BackendError("upstream.malformed", "the inference server's answer ends in its head")
        return self.status > 0

    def more(self, until: float, of: float) -> asyncio.Future[None]:
        """Done when something came, or at that time, the end `of` so many seconds: then it has failed."""
        self._waiter, self._seconds = self.loop.create_future(), of
        self._deadline.until(until)
        return self._waiter

    def _late(self) -> None:
        self._fail("upstream.timeout", f"the inference server sent nothing for {self._seconds:g} s")

    def take(self) -> bytes:
        """All that waits, as one piece: each costs its taker a write."""
        pieces, self.pieces, self.waiting = self.pieces, [], 0
        if self._paused and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def finish(self, upstream: Upstream) -> None:
        """The answer has been taken whole."""
        if self._again and not self.closed and self.failure is None:
            upstream.keep(self)
        else:
            self.abort()

    def abort(self) -> None:
        self.closed = True
        if self._transport is not None:
            self._transport.abort()

    # -- asyncio.Protocol ----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is one in all but name

    def data_received(self, data: bytes) -> None:
        if self.whole:  # something that nobody asked for
            self.abort()
            return
        if self._owed or (not self.begun and self._known is not None):
            data = self._read_known(data)
            if not data:
                return
        first, before = not self.begun, self.received
        self.begun = True
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._fail("upstream.malformed", "the inference server sent what is not HTTP/1.1")
        if first and self.status == 200 and self._length is not None and self._again and self.failure is None:
            self._known = KnownHead.of(data, self.received, self._length, self.content_type)
        # Trailers come without end as well as a head does.
        beside = self._head_size + len(data) - _FRAMING * (self.received - before)
        self._head_size = beside if beside > 0 else 0  # noqa: FURB136 - asked with every piece
        if beside > _HEAD_MOST:
            self._fail("upstream.malformed", "the inference server's answer has a head, or trailers, that are too long")
        self._heed()

    def _heed(self) -> None:
        """Something has come."""
        if self.waiting > _WAITING_MOST and not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()
        self.wake()

    def _read_known(self, data: bytes) -> bytes:
        """What of `data` is for the parser: all of it, unless it is an answer, or a part of one, whose head is known.
        Then what httptools would call is done here."""
        if not self._owed:
            known = self._known
            assert known is not None  # noqa: S101 - its caller has looked
            begin = known.matches(data)
            if not begin or known.size < len(data) - begin:
                return data
            self.begun, self._until_closed, self._again = True, False, True
            self.content_type, self.status, self._owed = known.said, 200, known.size
            data = data[begin:]
        body = data[: self._owed]
        self._owed -= len(body)
        if body:
            self.on_body(body)
        self.whole = not self._owed
        self._heed()
        return data[len(body) :]

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - why makes no difference
        self.closed = True
        self._deadline.close()
        if self.status and not self.whole and self.failure is None:
            if self._until_closed:
                self.whole = True
            else:
                self.failure = BackendError("upstream.malformed", "the inference server's answer was cut short")
        self.wake()
        self._transport = self._parser = None  # each keeps this, and would until the collector looks, which is seldom

    def _fail(self, code: str, what: str) -> None:
        if self.failure is None:
            self.failure = BackendError(code, what)
        self.abort()
        self.wake()

    def wake(self) -> None:
        """Whoever waits looks again."""
        waiter, self._waiter = self._waiter, None
        if waiter is not None:
            self._deadline.met()
            if not waiter.done():  # cancelled
                waiter.set_result(None)

    # -- httptools -----------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self.whole:  # a second answer: what is left of it would be somebody else's
            self._fail("upstream.malformed", "the inference server answered twice")
        self._length, self._chunked = None, False

    def on_header(self, name: bytes, value: bytes) -> None:
        lowered = name.lower()
        if lowered == b"content-type":
            self.content_type = value.lower()
        elif lowered == b"content-length":
            self._length = value
        elif lowered == b"transfer-encoding":
            self._chunked = True
        elif lowered == b"content-encoding" and value.lower() != b"identity":
            self._fail("upstream.malformed", "the inference server compressed an answer that was to come as it is")

    def on_headers_complete(self) -> None:
        if self._length is not None and self._chunked:  # two readers would see two ends: smuggling
            self._fail("upstream.malformed", "the inference server's answer has two lengths")
            return
        self._until_closed = self._length is None and not self._chunked
        self._again = self._parser.should_keep_alive() and not self._until_closed
        self.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        size = len(body)
        self.received += size
        if self.received > self.most:
            self._fail("upstream.malformed", f"the inference server's answer is longer than {self.most >> 10} KiB")
            return
        self.waiting += size
        self.pieces.append(body)

    def on_message_complete(self) -> None:
        if self.status < 200:  # 100 Continue and its kind: the answer is still to come
            self.status = 0
            return
        self.whole = True


class Reply:
    """An answer that has begun. Take it with `read` or `pieces`, or `abort` it."""

    __slots__ = ("_begun", "_done", "_first", "_until", "_upstream", "connection")

    def __init__(self, connection: _Connection, upstream: Upstream, first: float) -> None:
        self.connection, self._upstream, self._first = connection, upstream, first
        self._done = False
        self._begun = connection.loop.time()
        self._until = self._begun + upstream.timeouts.whole

    @property
    def status(self) -> int:
        return self.connection.status

    @property
    def content_type(self) -> bytes:
        return self.connection.content_type

    @property
    def there(self) -> bool:
        """Whether its head is."""
        return self.connection.failure is None and self.connection.status > 0

    def head(self) -> asyncio.Future[None]:
        """Done when something of it came, or nothing will: its time is that of the whole head, else a server that sends
        it byte by byte would keep a request's place for days."""
        return self.connection.more(self._begun + self._first, self._first)

    def at_once(self) -> bytes | None:
        """As `read`, without waiting; None where something is still to come, or never will."""
        connection = self.connection
        if not connection.whole or connection.failure is not None or self._done:
            return None
        body = connection.take()
        self.finish()
        return body

    async def read(self, most: int = _BODY_MOST) -> bytes:
        """The whole body, of at most so many bytes; BackendError ``upstream.*``."""
        self.connection.most = min(most, _BODY_MOST)
        pieces = []
        try:
            while (piece := self.now()) != b"":
                if piece is None:
                    await self.more()
                else:
                    pieces.append(piece)
        except BaseException:
            self.abort()
            raise
        self.finish()
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body as it comes; BackendError ``upstream.*``. While nobody takes them, the connection is not read."""
        try:
            while (piece := self.now()) != b"":
                if piece is None:
                    await self.more()
                else:
                    yield piece
        except BaseException:
            self.abort()
            raise
        self.finish()

    def more(self) -> asyncio.Future[None]:
        """Done when something of the body came, or nothing will."""
        now = self.connection.loop.time()
        until = min(now + self._upstream.timeouts.between, self._until)
        return self.connection.more(until, until - now)

    def finish(self) -> None:
        """All of it was taken: the connection is another request's."""
        self._done = True
        self.connection.finish(self._upstream)

    def now(self) -> bytes | None:
        """What there is of the body; nothing at its end, and None where that, or more, is still to come."""
        connection = self.connection
        if self._done and connection.failure is not None:  # aborted: what waits is nobody's any more
            raise connection.failure
        # Where something always waits, too: whoever reads slowly would keep a server's place for longer.
        if not connection.whole and connection.failure is None and connection.loop.time() >= self._until:
            whole = self._upstream.timeouts.whole
            raise BackendError("upstream.timeout", f"the inference server took longer than {whole:g} s")
        if connection.waiting:
            return connection.take()
        if connection.failure is not None:
            raise connection.failure
        return b"" if connection.whole else None

    def abort(self) -> None:
        """Close the connection: an inference server stops generating for whoever has gone."""
        if not self._done:
            self._done = True
            self.connection.failure = self.connection.failure or BackendError(
                "upstream.aborted", "the request was given up"
            )
            self.connection.abort()
            self.connection.wake()


def unexpected(status: int) -> StrongroomError:
    """The error for an answer that is not 200. What an upstream says beside its status is not passed on."""
    if status in (429, 503):
        return BackendError("upstream.unavailable", "the inference server has more to do than it can", retry_after=1)
    if status in (400, 413, 422):
        # All else that was asked has been validated here; clients try a status of 5xx again, and it would help nothing.
        return UsageError(
            "parameter.invalid",
            f"the inference server refuses this request (status {status}): most often prompt and max_tokens together "
            "are longer than the model's context; ask with a shorter prompt, or for fewer max_tokens",
        )
    why = {
        401: ": the channel or key that the gateway has for it is not the right one",
        403: ": the channel or key that the gateway has for it is not the right one",
        404: ": it has no model under the name that the gateway has for this one (--model REF=NAME)",
    }.get(status, "")
    return BackendError("upstream.malformed", f"the inference server answered with status {status}{why}")
