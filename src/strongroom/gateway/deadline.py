"""A time by which something has to have come."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable


class Deadline:
    """Calls `late` once its time has passed. It is moved with every request, and hardly ever passes: so there is one
    timer for many of its times, which looks whether it was moved. A timer for each costs more than most checks."""

    __slots__ = ("_at", "_fires", "_late", "_loop", "_timer")

    def __init__(self, loop: asyncio.AbstractEventLoop, late: Callable[[], object]) -> None:
        self._loop, self._late = loop, late
        self._at = self._fires = math.inf
        self._timer: asyncio.TimerHandle | None = None

    @property
    def pending(self) -> bool:
        return self._at < math.inf

    def within(self, seconds: float) -> None:
        """From now on, instead of what was before."""
        self.until(self._loop.time() + seconds)

    def until(self, at: float) -> None:
        """As `within`, by the loop's clock."""
        self._at = at
        if at < self._fires:
            if self._timer is not None:
                self._timer.cancel()
            self._timer, self._fires = self._loop.call_at(at, self._look), at

    def met(self) -> None:
        """It has come: there is no deadline until the next one."""
        self._at = math.inf

    def close(self) -> None:
        """No more, and nothing is kept: neither is whose it was."""
        self._at = self._fires = math.inf
        self._late = lambda: None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer, self._fires = None, math.inf
        if self._at == math.inf:
            return
        left = self._at - self._loop.time()
        if left > 0:
            self._timer, self._fires = self._loop.call_later(left, self._look), self._at
        else:
            self._at = math.inf
            self._late()
