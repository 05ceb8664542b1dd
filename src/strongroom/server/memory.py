"""Memory for found files (spec/http.md, section 9): there is so much, for few at a time, and it is asked for before."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from strongroom.core.limits import MIB
from strongroom.errors import LimitExceeded

_AT_A_TIME = 2
_MOST = 8192 * MIB
_CGROUPS = Path("/sys/fs/cgroup")
Take = Callable[[int], None]


class Memory:
    """At most `most` bytes, by default 8 GiB or half of what is free, whichever is less. Thread-safe."""

    def __init__(self, most: int | None = None, free: Callable[[], int] | None = None) -> None:
        self._most, self._free = most, free or free_bytes
        self._held: dict[object, int] = {}
        self._lock = threading.Lock()

    def check(self, size: int) -> None:
        """LimitExceeded ``trace.too_large`` for more than there ever is, ``server.busy`` for more than there is now."""
        with self._lock:
            self._check(size)

    @contextmanager
    def held(self, size: int) -> Iterator[Take]:
        """Hold `size` bytes; what is given holds more of them, and both are let go at the end. Errors of `check`."""
        key = object()

        def take(more: int) -> None:
            with self._lock:
                self._fit(more, self._held[key] + more)
                self._held[key] += more

        with self._lock:
            self._check(size)
            self._held[key] = size
        try:
            yield take
        finally:
            with self._lock:
                del self._held[key]

    def _check(self, size: int) -> None:
        self._fit(size, size)
        if len(self._held) >= _AT_A_TIME:
            raise _busy(f"{_AT_A_TIME} searches are going on in this server already")

    def _fit(self, size: int, together: int) -> None:
        """Whether `size` more bytes fit, of one who would have so many `together`."""
        held = sum(self._held.values())
        most = self._most if self._most is not None else min(_MOST, (self._free() + held) // 2)
        if together > most:
            raise LimitExceeded(
                "trace.too_large",
                f"the found files take {together} bytes of the custodian's memory, where at most {most} are for that",
                hint="trace some of the files, or a part of them; or whoever runs the custodian: strongroom serve "
                "--trace-memory, or strongroom trace on its host",
                most=most,
            )
        if held + size > most:
            raise _busy("other searches have the memory for this one")


def free_bytes() -> int:
    """Memory that this process may still fill: the machine's, or that of its control group if that is less."""
    free = _MOST * 2  # where the system does not say it
    for line in _text(Path("/proc/meminfo")).splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    for line in _text(Path("/proc/self/cgroup")).splitlines():
        if line.startswith("0::"):
            group = _CGROUPS / line[3:].strip("/")
            limit, used = _text(group / "memory.max").strip(), _text(group / "memory.current").strip()
            if limit.isdigit() and used.isdigit():
                stat = dict(each.split() for each in _text(group / "memory.stat").splitlines())
                free = min(free, int(limit) - int(used) + int(stat.get("inactive_file", 0)))
    return max(0, free)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except (OSError, ValueError):
        return ""


def _busy(why: str) -> LimitExceeded:
    return LimitExceeded("server.busy", why, hint="wait, then try again")
