"""A server whose connections begin with TLS. asyncio tells nobody of a connection before its handshake is over, so
whoever opens thousands and says nothing is counted nowhere, and each is kept for a minute."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, cast

import uvicorn

_TIME = 10.0  # seconds that a handshake may take
_AT_ONCE = 64  # connections that are taken before others' work goes on
_AGAIN = 1.0  # seconds until it is tried again where there are no file descriptors left


class Counted(Protocol):
    """Connections of a class: how many each has (`crowd`) that `whose` makes of an address, and may have at `most`.
    `counted`: whose it was counted as before its handshake, until the connection itself sees to that."""

    crowd: Counter[str]
    most: int
    counted: str | None

    @staticmethod
    def whose(host: str) -> str: ...


class Server(uvicorn.Server):
    """uvicorn's, but that handshakes count as connections of their address, and take a time that is ours."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        tls = self.config.ssl
        if tls is None or sockets is None:
            await super().startup(sockets)
            return
        await super().startup([])
        loop, kind = asyncio.get_running_loop(), cast("Any", self.config.http_protocol_class)
        make = partial(kind, self.config, self.server_state, self.lifespan.state, loop)
        self.servers += [cast("Any", Handshakes(loop, each, tls, make, kind)) for each in sockets]


class Handshakes:
    """Takes what comes to `listener`, and hands it to what `make` makes once its handshake is over. To uvicorn it is a
    server of asyncio's."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        listener: socket.socket,
        tls: ssl.SSLContext,
        make: Callable[[], Any],
        kind: type[Counted],
    ) -> None:
        self._loop, self._listener, self._tls, self._make, self._kind = loop, listener, tls, make, kind
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False
        listener.setblocking(False)
        loop.add_reader(listener.fileno(), self._take)

    def get_loop(self) -> asyncio.AbstractEventLoop:
        return self._loop

    def close(self) -> None:
        """Take no more, and end the handshakes that are under way."""
        if not self._closed:
            self._closed = True
            self._loop.remove_reader(self._listener.fileno())
            for each in self._tasks:
                each.cancel()

    async def wait_closed(self) -> None:
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _take(self) -> None:
        for _ in range(_AT_ONCE):
            try:
                accepted, address = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):  # or another worker has taken it
                return
            except OSError:  # no file descriptors, or no memory: they come back
                self._loop.remove_reader(self._listener.fileno())
                self._loop.call_later(_AGAIN, self._go_on)
                return
            whose = self._kind.whose(str(address[0]))
            if self._kind.crowd[whose] >= self._kind.most:
                accepted.close()
                continue
            accepted.setblocking(False)
            self._kind.crowd[whose] += 1
            task = self._loop.create_task(self._shake(accepted, whose))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _go_on(self) -> None:
        if not self._closed:
            self._loop.add_reader(self._listener.fileno(), self._take)

    async def _shake(self, accepted: socket.socket, whose: str) -> None:
        made = self._make()
        made.counted = whose
        try:
            # What goes wrong here is the other side's, and told nobody.
            with contextlib.suppress(OSError, TimeoutError):
                accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                await self._loop.connect_accepted_socket(
                    lambda: made, accepted, ssl=self._tls, ssl_handshake_timeout=_TIME
                )
        finally:
            if made.counted is not None:  # it never was a connection
                self._kind.crowd[whose] -= 1
                if not self._kind.crowd[whose]:
                    del self._kind.crowd[whose]
