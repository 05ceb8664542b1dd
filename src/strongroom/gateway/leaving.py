"""Clients that leave while nobody reads what they have sent.

A connection whose client has sent more than one request at a time is not read until the first one is answered; and what
is not read has no end. Without a look of its own such a client would be noticed once its answer is written, and
another answer be begun for nobody.
"""

from __future__ import annotations

import asyncio
import select
from collections.abc import Callable

_EVERY = 0.5  # seconds between two looks
# That the other side sends no more is seen behind bytes that wait to be read, too. (Linux; elsewhere a reset only.)
_GONE = getattr(select, "POLLRDHUP", 0) | select.POLLHUP | select.POLLERR


def left(transport: asyncio.BaseTransport) -> bool:
    """Whether the other side of a connection has gone, or will send nothing more: here that is one, read or not."""
    found = transport.get_extra_info("socket")
    if found is None or (number := found.fileno()) < 0:
        return False
    look = select.poll()
    look.register(number, _GONE)
    return bool(look.poll(0))


class Leaving:
    """Calls `gone` once the other side of `transport` has left, until it is closed."""

    __slots__ = ("_gone", "_loop", "_timer", "_transport")

    def __init__(
        self, loop: asyncio.AbstractEventLoop, transport: asyncio.BaseTransport, gone: Callable[[], object]
    ) -> None:
        self._loop, self._transport, self._gone = loop, transport, gone
        self._timer = loop.call_later(_EVERY, self._look)

    def close(self) -> None:
        self._timer.cancel()

    def _look(self) -> None:
        if left(self._transport):
            self._gone()
        else:
            self._timer = self._loop.call_later(_EVERY, self._look)
