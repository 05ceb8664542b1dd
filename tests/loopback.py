"""Ports of the loopback interface for servers that are told theirs before they listen on it."""

from __future__ import annotations

import contextlib
import os
import random
import socket
from pathlib import Path

_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_FIRST = 20_000
_chance = random.SystemRandom()  # two runs of the tests at one time must not choose the same
# Nor must the workers of one: a server begins to listen a while after its port was chosen.
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % _WORKERS


def free_port(count: int = 1) -> int:
    """The first of so many ports in a row that nobody has. Not of those that the system gives to connections: one of
    another test's could have taken it before the server that it is for has started."""
    end = int(_RANGE.read_text().split()[0]) if _RANGE.exists() else 32_768
    each = (end - _FIRST) // _WORKERS
    begin = _FIRST + each * _WORKER
    while True:
        first = _chance.randrange(begin, begin + each - count) if each > 500 else _of_the_system()
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for number in range(count):
                stack.enter_context(socket.create_server(("127.0.0.1", first + number)))
            return first


def _of_the_system() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])
