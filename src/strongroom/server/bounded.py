"""A small HTTP server of the standard library that nobody can fill with threads: so many connections at a time, each
for so long."""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_AT_A_TIME = 64
_LIFE = 30.0  # seconds of a connection, whatever comes on it and however slowly


class BoundedServer(ThreadingHTTPServer):
    """On `address`, a pair of host and port; port 0 is any that is free. What is beyond `at_a_time` connections is
    closed; what is older than `life` seconds is cut off."""

    daemon_threads = True

    def __init__(
        self,
        address: tuple[str, int],
        handler: type[BaseHTTPRequestHandler],
        *,
        at_a_time: int = _AT_A_TIME,
        life: float = _LIFE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._slots = threading.BoundedSemaphore(at_a_time)
        self._life, self._clock = life, clock
        self._since: dict[socket.socket, float] = {}
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, handler)

    @property
    def url(self) -> str:
        host, port = str(self.server_address[0]), self.server_address[1]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._slots.acquire(blocking=False):
            self.shutdown_request(request)
            return
        self._since[request] = self._clock()
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._done(request)
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._done(request)

    def service_actions(self) -> None:
        """Called by `serve_forever` every now and then: who sends a byte every few seconds is cut off, too."""
        now = self._clock()
        for connection, since in list(self._since.items()):
            if now - since > self._life:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A traceback for faults of ours, and not for everybody who hangs up."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)

    def _done(self, request: Any) -> None:
        if self._since.pop(request, None) is not None:
            self._slots.release()
