"""Ports of the loopback interface for servers that are told theirs before they listen on it."""

from __future__ import annotations

import contextlib
import random
import socket
from pathlib import Path

_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_FIRST = 20_000
_STRETCH = 100
_chance = random.SystemRandom()  # two processes of tests must not choose the same
_mine: list[socket.socket] = []  # what says that a stretch of ports is this process's, as long as it lives
_next: list[int] = []


def free_port(count: int = 1) -> int:
    """The first of so many ports in a row that nobody has. Not of those that the system gives to connections: one of
    another test's could have taken it before the server that it is for has started. Nor of those that another process
    of tests gives to its servers, for the same reason."""
    end = int(_RANGE.read_text().split()[0]) if _RANGE.exists() else 32_768
    if end <= _FIRST + 1000:
        return _of_the_system()
    while True:
        if len(_next) < count:
            _next[:] = _stretch(end)
        first = _next[0]
        del _next[:count]
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for number in range(count):
                stack.enter_context(socket.create_server(("127.0.0.1", first + number)))
            return first


def _stretch(end: int) -> range:
    """Ports that no other process of tests has: whose they are is said by a name of the network's own, which goes with
    the process."""
    while True:
        first = _chance.randrange(_FIRST, end - _STRETCH, _STRETCH)
        claim = socket.socket(socket.AF_UNIX)
        try:
            claim.bind(f"\0strongroom-tests-{first}")
        except OSError:
            claim.close()
            continue
        _mine.append(claim)
        return range(first, first + _STRETCH)


def _of_the_system() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])
