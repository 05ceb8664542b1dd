"""Running the custodian: uvicorn with TLS, on a socket that listens already, and with connections that don't wait for
ever. Nothing in front of it is believed: whoever connects is who asks.

The gateway's connections (gateway/connection.py) have the same limits, written anew: they are of another parser,
httptools, which tells when a head begins and ends where h11 has states to look at; and the gateway is in a layer below.
"""

from __future__ import annotations

import contextlib
import resource
import socket
import ssl
from asyncio import TimerHandle, Transport
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from strongroom.errors import BackendError
from strongroom.gateway.handshakes import Server

_HEAD_TIME = 20.0  # seconds in which the next request has to begin, and its head to have come
_TAKE_TIME = 60.0  # seconds in which a reader has to take what waits to be sent: a piece of an object at most
_FROM_ONE = 1000  # connections at a time from one address, which a whole cluster may share
_HEAD = 64 * 1024  # bytes


class Connection(H11Protocol):
    """A connection that is closed when no request comes, or what it was sent is not taken, and is not opened when its
    address has too many."""

    crowd: ClassVar[Counter[str]] = Counter()  # connections, by their address
    most: ClassVar[int] = _FROM_ONE
    counted: str | None = None  # see gateway/handshakes.py
    _waiting: TimerHandle | None = None
    _taking: TimerHandle | None = None

    @staticmethod
    def whose(host: str) -> str:
        """As it is: this is for those whom the room knows, and a cluster may share an address."""
        return host

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if self.counted is None:
            self._address = self.whose(self.client[0] if self.client else "")
            self.crowd[self._address] += 1
        else:
            self._address, self.counted = self.counted, None
        if self.crowd[self._address] > self.most:
            transport.abort()
            return
        self._waiting = self.loop.call_later(_HEAD_TIME, self._look, None)

    def connection_lost(self, exc: Exception | None) -> None:
        self.crowd[self._address] -= 1
        if not self.crowd[self._address]:
            del self.crowd[self._address]
        for timer in (self._waiting, self._taking):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        # Who reads a byte a minute would keep the connection, and a piece in memory, for as long as it likes.
        self._taking = self.loop.call_later(_TAKE_TIME, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._taking is not None:
            self._taking.cancel()
            self._taking = None

    def _look(self, before: Any) -> None:
        """Close if there was no new request since the last look, and none is being answered."""
        idle = self.cycle is before and (self.cycle is None or self.cycle.response_complete)
        if idle and self.conn.their_state in (h11.IDLE, h11.DONE):
            self.transport.close()
            return
        self._waiting = self.loop.call_later(_HEAD_TIME, self._look, self.cycle)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens at `host` and `port`, 0 for any that is free. BackendError ``serve.listen``."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise BackendError(
            "serve.listen",
            f"can't listen on {host}, port {port}: {error.strerror or error}",
            hint="--listen with another port, or stop what listens there",
        ) from None


def configure(app: Any, certificate: Path) -> uvicorn.Config:
    """How `app` is served, with the certificate and key in one file. BackendError ``serve.certificate``."""
    config = uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        lifespan="off",
        proxy_headers=False,  # whoever asks too often would name another address each time
        server_header=False,
        log_level="warning",
        access_log=False,
        timeout_keep_alive=30,
        h11_max_incomplete_event_size=_HEAD,
        ssl_certfile=str(certificate),
    )
    try:
        config.load()
    except (OSError, ssl.SSLError) as error:
        raise BackendError("serve.certificate", f"can't use the certificate {certificate}: {error}") from None
    if config.ssl is not None:
        config.ssl.minimum_version = ssl.TLSVersion.TLSv1_2
    return config


def run(config: uvicorn.Config, listener: socket.socket) -> None:
    """Serve until interrupted."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 65_536) if hard > 0 else 65_536, hard))
    with contextlib.suppress(KeyboardInterrupt):
        Server(config).run(sockets=[listener])
