"""One request of a connection and its answer, as an application has them: by ASGI's steps, or in fewer."""

from __future__ import annotations

import asyncio
import http
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from strongroom.gateway.connection import Connection

EXCHANGE = "strongroom.exchange"  # in a request's scope: its `Exchange`
_STATUS = {each.value: b"HTTP/1.1 %d %s\r\n" % (each.value, each.phrase.encode("ascii")) for each in http.HTTPStatus}


class Head:
    """The head of a request. `named`: headers by their name, of several with one the last; `length`: bytes of the body;
    `read`: whatever the application made of it, for the next request that has the same."""

    __slots__ = ("expects", "headers", "keep_alive", "length", "method", "named", "path", "read", "version")

    def __init__(
        self, method: str, path: str, version: str, headers: list[tuple[bytes, bytes]], *, keep_alive: bool
    ) -> None:
        self.method, self.path, self.version, self.headers = method, path, version, headers
        self.keep_alive = keep_alive
        self.named = dict(headers)
        # Others would take it for the answer.
        said = self.named.get(b"content-length", b"")  # httptools has refused a second one
        # 0 where it says none, or says it in another way.
        self.length = int(said) if len(said) <= 20 and said.isdigit() else 0
        self.expects = version == "1.1" and self.named.get(b"expect", b"").lower() == b"100-continue"
        self.read: Any = None

    def of_length(self, digits: bytes) -> Head:
        """The same with another length."""
        headers = [(name, digits if name == b"content-length" else value) for name, value in self.headers]
        made = Head(self.method, self.path, self.version, headers, keep_alive=self.keep_alive)
        made.read = self.read
        return made


class Exchange:
    """A request and its answer: what an ASGI application gets as `scope`, `receive` and `send`; and the same without a
    coroutine and a dictionary for each step, as `take` and `answer`. `task`: what answers it."""

    __slots__ = (
        *("connection", "head", "keep_alive", "task", "more", "unread", "gone", "begun", "chunked"),
        *("_expects", "_pieces", "_taken", "_waiter", "_tell", "_head"),
    )

    task: asyncio.Task[None]

    def __init__(self, connection: Connection, head: Head, *, keep_alive: bool) -> None:
        self.connection, self.head, self.keep_alive = connection, head, keep_alive
        self.more = True  # of the body is to come
        self.unread = 0  # bytes that came and were not taken
        self.gone = self.begun = self.chunked = False
        self._expects = head.expects
        self._pieces: list[bytes] = []
        self._taken = False  # the body, whole
        self._waiter: asyncio.Future[None] | None = None
        self._tell: Callable[[], object] | None = None
        self._head = b""

    def scope(self) -> dict[str, Any]:
        """As ASGI has it. Made for who asks: kept here, each would keep the other."""
        return {
            "type": "http",
            "method": self.head.method,
            "path": self.head.path,
            "http_version": self.head.version,
            "headers": self.head.headers,
            "client": self.connection.client,
            EXCHANGE: self,
        }

    # -- for the application -------------------------------------------------------------------------------------

    def take(self) -> bytes | None:
        """The body, if it is here whole and was not taken; else it is to be asked for with `receive`."""
        if self.more or self._taken or self.gone:
            return None
        return self._take_pieces()

    def answer(self, status: int, fixed: bytes, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
        """Begin and end the answer. `fixed`: lines of its head that are always the same, each with its end."""
        if self.gone:
            return
        lines = b"".join([b"%b: %b\r\n" % each for each in headers])
        self._check_lines(lines, len(headers))
        if (b"connection", b"close") in headers:
            self.keep_alive = False
        elif not self.keep_alive:
            lines += b"connection: close\r\n"
        if self.head.method == "HEAD":
            body, length = b"", len(body)
        else:
            length = len(body)
        self._write(b"%b%bcontent-length: %d\r\n%b\r\n%b" % (_STATUS[status], fixed, length, lines, body), more=False)

    def when_gone(self, tell: Callable[[], object] | None) -> None:
        """Call `tell` when the client goes, or now if it has gone; None: nobody is told. A task that waits for it in
        `receive`, as ASGI has it, would cost more than the checks of a request together."""
        self._tell = tell
        if self.gone and tell is not None:
            tell()

    # -- for the connection --------------------------------------------------------------------------------------

    def leave(self) -> None:
        """The client has gone."""
        self.gone = True
        self.wake()
        if self._tell is not None:
            self._tell()

    def once(self, name: bytes) -> bool:
        """Whether one header has this name, and not several."""
        head = self.head
        return len(head.named) == len(head.headers) or sum(each == name for each, _ in head.headers) == 1

    def whole(self, body: bytes) -> None:
        """The body has come, all of it at once, before anybody waited for it."""
        self._pieces, self.unread, self.more = [body], len(body), False

    def feed(self, body: bytes) -> None:
        self._pieces.append(body)
        self.unread += len(body)
        self.wake()

    def end(self) -> None:
        """The body has come whole."""
        self.more = False
        self.wake()

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def receive(self) -> dict[str, Any]:
        """A piece of the body; ``http.disconnect`` once the client has gone, and not before if all has been taken."""
        while not self.gone and (self._taken or (self.more and not self._pieces)):
            if self._expects and not self.begun:
                self._expects = False
                self.connection.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self.gone:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": self._take_pieces(), "more_body": self.more}

    def _take_pieces(self) -> bytes:
        body = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces, self.unread, self._taken = [], 0, not self.more
        if self.connection.paused:
            self.connection.read_on()
        return body

    async def send(self, message: dict[str, Any]) -> None:
        """The head is kept until the first of the body comes: two writes are two packets, and twice the work at both
        ends."""
        if self.connection.full and not self.gone:
            await self.connection.writable()
        if self.gone:
            return
        if message["type"] == "http.response.start":
            self._head = self._lines(message["status"], message["headers"])
            return
        self.give(message["body"], more=message.get("more_body", False))

    def give(self, body: bytes, *, more: bool) -> None:
        """A piece of the body, behind a head that was sent; at once, whether the connection is full or not."""
        if self.gone:
            return
        if self.head.method == "HEAD":
            body = b""
        elif self.chunked:
            body = b"%x\r\n%s\r\n" % (len(body), body) if body else b""
            if not more:
                body += b"0\r\n\r\n"
        self._write(body if self.begun else self._head + body, more=more)

    def _write(self, data: bytes, *, more: bool) -> None:
        self.begun = True
        self.connection.write(data)
        if not more:
            self._pieces, self.unread = [], 0  # what came and nobody took: else nothing is read behind it
            self.connection.answered(self)

    def _lines(self, status: int, headers: list[tuple[bytes, bytes]]) -> bytes:
        lines, chunked = [], True
        for name, value in headers:
            lines.append(b"%s: %s\r\n" % (name, value))
            if name == b"content-length":
                chunked = False
            elif name == b"connection":
                self.keep_alive = False
        if not self.keep_alive and (b"connection", b"close") not in headers:
            lines.append(b"connection: close\r\n")
        self.chunked = chunked and self.head.version == "1.1"
        if self.chunked:
            lines.append(b"transfer-encoding: chunked\r\n")
        said = b"".join(lines)
        self._check_lines(said, len(lines))
        return b"%s%s\r\n" % (_STATUS[status], said)

    @staticmethod
    def _check_lines(lines: bytes, count: int) -> None:
        if not lines.count(b"\r") == lines.count(b"\n") == count:
            raise ValueError("a header of an answer has a line break")  # another answer could begin behind it
