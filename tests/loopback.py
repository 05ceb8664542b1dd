"""Ports of the loopback interface for servers that are told theirs before they listen on it."""

from __future__ import annotations

import contextlib
import random
import socket
from pathlib import Path

_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_FIRST = 20_000
_chance = random.SystemRandom()  # two processes of tests must not choose the same


def free_port(count: int = 1) -> int:
    """The first of so many ports in a row that nobody has. Not of those that the system gives to connections: one of
    another test's could have taken it before the server that it is for has started."""
    end = int(_RANGE.read_text().split()[0]) if _RANGE.exists() else 32_768
    while True:
        first = _chance.randrange(_FIRST, end - count) if end > _FIRST + 1000 else _of_the_system()
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for number in range(count):
                stack.enter_context(socket.create_server(("127.0.0.1", first + number)))
            return first


def _of_the_system() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])
