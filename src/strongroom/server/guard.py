"""Before a request is looked at: how often an address may ask; and what every answer says to browsers and caches."""

from __future__ import annotations

import ipaddress
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

_RATE = 200.0  # requests a second from one address, on average
_BURST = 1000.0
_ADDRESSES = 10_000  # of which buckets are remembered
_HEADERS = (
    (b"cache-control", b"no-store"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"referrer-policy", b"no-referrer"),
    (b"strict-transport-security", b"max-age=31536000"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
)


class Guard:
    """ASGI middleware: a token bucket for each address, and security headers on every answer."""

    def __init__(
        self,
        app: Any,
        *,
        rate: float = _RATE,
        burst: float = _BURST,
        clock: Callable[[], float] = time.monotonic,
        refused: Callable[[], None] = lambda: None,
    ) -> None:
        self._app, self._rate, self._burst, self._clock, self._refused = app, rate, burst, clock, refused
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # address: tokens, when
        self._lock = threading.Lock()

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def guarded(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                ours = [name for name, _ in _HEADERS]
                kept = [pair for pair in message.get("headers", []) if pair[0].lower() not in ours]
                message = {**message, "headers": [*kept, *_HEADERS]}
            await send(message)

        address = _network((scope.get("client") or ("",))[0])
        if self._allows(address):
            await self._app(scope, receive, guarded)
        else:
            self._refused()
            await _busy(guarded)

    def _allows(self, address: str) -> bool:
        now = self._clock()
        with self._lock:
            tokens, when = self._buckets.pop(address, (self._burst, now))
            tokens = min(self._burst, tokens + (now - when) * self._rate)
            self._buckets[address] = (max(0.0, tokens - 1), now)
            if len(self._buckets) > _ADDRESSES:
                self._buckets.popitem(last=False)
        return tokens >= 1


def _network(address: str) -> str:
    """What one customer of a provider has: an IPv4 address, or the 64 bits that its IPv6 addresses begin with."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address
    if found.version == 4:
        return address
    return str(found.ipv4_mapped or ipaddress.ip_network((found.packed[:8] + bytes(8), 64)))


async def _busy(send: Any) -> None:
    value = {
        "type": "about:blank",
        "title": "LimitExceeded",
        "status": 429,
        "code": "server.busy",
        "hint": "wait a second",
    }
    body = json.dumps({**value, "detail": "this address asks too often", "evidence": {}}).encode()
    headers = [(b"content-type", b"application/problem+json"), (b"retry-after", b"1")]
    await send(
        {"type": "http.response.start", "status": 429, "headers": [*headers, (b"content-length", b"%d" % len(body))]}
    )
    await send({"type": "http.response.body", "body": body})
