"""How the gateway listens: uvicorn on uvloop and httptools, with connections that nobody can keep by being slow."""

from __future__ import annotations

import ssl
from asyncio import TimerHandle, Transport
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from strongroom.errors import BackendError
from strongroom.gateway.certificates import Peer, peer

_HEAD_TIME = 20.0  # seconds in which a request has to begin on a new connection, and its head to have come
_TAKE_TIME = 60.0  # seconds in which a reader has to take what waits to be sent
_BODY_TIME = 30.0  # seconds in which what follows a head has to come, whether anybody still reads it or not
_HEAD_MOST = 64 << 10  # bytes, of trailers and of what is around chunks, too
_FRAMING = 8  # bytes that a body of chunks may take for each of its own
CONNECTION = "strongroom.connection"  # in a request's scope: its `Connection`
_FROM_ONE = 2000  # connections at a time from one address


class Connection(HttpToolsProtocol):
    """A connection that is closed when a request comes slowly, when its head or its trailers are too long, and when
    what was sent is not taken."""

    _from: ClassVar[Counter[str]] = Counter()
    _waiting: TimerHandle | None = None
    _taking: TimerHandle | None = None
    _in_message = _ended = False
    _beside = _body = 0  # bytes that are no body since the message began, and bytes of body in this piece
    _address = ""
    _gone = False
    peer: Peer | None = None  # who has shown a certificate

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._told: list[Callable[[], object]] = []

    def when_gone(self, tell: Callable[[], object]) -> Callable[[], None]:
        """Call `tell` when the client goes, or now if it has gone, until what this returns is called. A task that waits
        for it in `receive`, as ASGI has it, would cost more than the checks of a request together."""
        self._told.append(tell)
        if self._gone:
            tell()
        return partial(self._told.remove, tell)

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._address = self.client[0] if self.client else ""
        self._from[self._address] += 1
        if self._from[self._address] > _FROM_ONE:
            transport.abort()
            return
        self.peer = peer(transport)
        self._waiting = self.loop.call_later(_HEAD_TIME, transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        self._from[self._address] -= 1
        if not self._from[self._address]:
            del self._from[self._address]
        for timer in (self._waiting, self._taking):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)
        self._gone = True
        for tell in list(self._told):
            tell()

    def data_received(self, data: bytes) -> None:
        self._body, self._ended = 0, False
        super().data_received(data)
        if not self._in_message:
            return
        if not self._ended:  # else this piece has some of the message before
            self._beside = max(0, self._beside + len(data) - _FRAMING * self._body)
            if self._beside > _HEAD_MOST:
                self.transport.abort()
        if self._waiting is None:
            self._waiting = self.loop.call_later(_BODY_TIME, self.transport.abort)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope[CONNECTION] = self  # type: ignore[literal-required]
        self._in_message, self._beside = True, 0
        if self._waiting is None:
            self._waiting = self.loop.call_later(_HEAD_TIME, self.transport.abort)

    def on_headers_complete(self) -> None:
        self._in_time()
        super().on_headers_complete()
        self.headers = []  # trailers are no headers: nobody reads them
        if self.peer is not None and self.peer.old:
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        self._body += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_message, self._ended = False, True
        self._in_time()
        super().on_message_complete()

    def _in_time(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def _unsupported_upgrade_warning(self) -> None:
        # What follows is not looked at: each piece of it would be a line in this machine's log.
        self.cycle.keep_alive = False

    def pause_writing(self) -> None:
        super().pause_writing()
        # Who reads a byte a minute would keep a stream, and its place at an inference server, for as long as it likes.
        self._taking = self.loop.call_later(_TAKE_TIME, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._taking is not None:
            self._taking.cancel()
            self._taking = None


def configure(app: Any, certificate: tuple[Path, Path] | None = None) -> uvicorn.Config:
    """How `app` is served; with TLS where there are a certificate and its key. BackendError ``gateway.certificate``."""
    config = uvicorn.Config(
        app,
        http=Connection,
        loop="uvloop",
        ws="none",
        lifespan="on",
        proxy_headers=False,  # who asks would name another network each time
        server_header=False,
        date_header=False,
        log_level="warning",
        access_log=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=30,
        ssl_certfile=str(certificate[0]) if certificate else None,
        ssl_keyfile=str(certificate[1]) if certificate else None,
    )
    try:
        config.load()
    except (OSError, ssl.SSLError) as error:
        raise BackendError("gateway.certificate", f"can't use the certificate: {error}") from None
    if config.ssl is not None:
        config.ssl.minimum_version = ssl.TLSVersion.TLSv1_2
    return config
