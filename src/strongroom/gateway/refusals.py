"""How many refusals of one principal are recorded: each is a line on disk, and whoever is refused can ask again at once
(spec/gateway.md, section 6)."""

from __future__ import annotations

import math
from collections.abc import Callable

from strongroom.errors import LimitExceeded

_MOST = 600  # of one principal, in a minute
_MINUTE = 60.0


class Refusals:
    """Those of this minute, by principal. `clock`: seconds that never go back."""

    def __init__(self, clock: Callable[[], float], *, most: int = _MOST) -> None:
        self._clock, self._most = clock, most
        self._since = clock()
        self._counts: dict[str, int] = {}
        self._unrecorded: dict[str, int] = {}

    def check(self, principal: str) -> None:
        """Before anything of a request is read. LimitExceeded ``rate.refusals`` for whoever was refused too often in
        this minute: that is counted, and not recorded."""
        now = self._clock()
        if now - self._since >= _MINUTE:
            self._since, self._counts = now, {}
        if self._counts.get(principal, 0) >= self._most:
            self._unrecorded[principal] = self._unrecorded.get(principal, 0) + 1
            raise LimitExceeded(
                "rate.refusals",
                f"{self._most} requests were refused within a minute: nothing is looked at until it is over",
                retry_after=math.ceil(self._since + _MINUTE - now),
            )

    def add(self, principal: str) -> None:
        """One was refused, and is recorded."""
        self._counts[principal] = self._counts.get(principal, 0) + 1

    def unrecorded(self, principal: str) -> int:
        """How many were not recorded since this was last asked; the principal's next record says so."""
        return self._unrecorded.pop(principal, 0)
