"""Refusals, recorded: who was refused what, and by which rule. Bounded, because whoever is refused can be so without
end, and the log is kept for ever."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Iterator

from sqlalchemy.engine import Connection

from strongroom.errors import (
    AuthRequired,
    Conflict,
    Denied,
    LimitExceeded,
    NotFound,
    Pending,
    StrongroomError,
    UsageError,
)
from strongroom.formats.entry import UNKNOWN, Entry, Private
from strongroom.ledger.log import Draft, Ledger
from strongroom.policy.state import State

_DETAIL = 500  # characters of what is recorded of a refusal
_A_MINUTE = 60  # refusals of one principal, and of all strangers together, that are recorded
# It may be anybody who says this.
_STRANGERS = ("auth.refused", "login.key", "login.refused", "login.replayed", "statement.stale", "statement.replayed")
# What is refused of a statement that somebody has made; every other error says nothing about who asks.
_REFUSED = (Denied, AuthRequired, Conflict, Pending, UsageError, NotFound, LimitExceeded)
_OTHER_REASON = "entry.private"  # of the errors that are about bytes, the one that is the caller's
# Too busy, too slow, broken off; and what is in the log already, of which the answer was lost.
_OURS = ("server.", "upload.interrupted", "inference.told")


class Refusals:
    """The refusals of one room. Thread-safe."""

    def __init__(self, ledger: Ledger[State]) -> None:
        self._ledger = ledger
        # Of each principal, and of all whom nobody knows together: when refusals were recorded, how many were not.
        self._recent: dict[str, tuple[deque[float], list[int]]] = {}
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def recorded(self, by: str, action: str, ref: str = "") -> Iterator[None]:
        """What is refused in this block is recorded, once, then raised. `by` has to have been authenticated before
        anything is refused but with one of `_STRANGERS`: else anybody could fill the log in others' names."""
        try:
            yield
        except StrongroomError as error:
            refused = isinstance(error, _REFUSED) and not error.code.startswith(_OURS)
            if (refused or error.code == _OTHER_REASON) and not error.recorded:
                self.record(by, action, ref, error)
            raise

    def record(self, by: str, action: str, ref: str, error: StrongroomError) -> None:
        """Record a refusal. What it was about is free text of somebody who was refused: it is cut, and kept beside. Of
        one principal, and of all who are not authenticated, so many are recorded in a minute; the next one says how
        many were not."""
        error.recorded = True
        if error.code in _STRANGERS:
            by = UNKNOWN
        passed = self._passed_over(by)
        if passed is None:
            return
        more = f"; {passed} refusals like it before this one were not recorded" if passed else ""
        detail = Private.fresh("detail", error.message[:_DETAIL] + more)
        rule = str(error.evidence.get("rule", ""))[:80]

        def decide(_: Connection, state: State, now: int) -> Draft:
            known = by if by in state.principals else UNKNOWN
            about = ref if ref in state.versions else ""
            body = {"action": action, "code": error.code, "rule": rule}
            return Draft(Entry("refused", now, known, about, body, {"detail": detail.commitment}), [detail])

        self._ledger.append(decide)

    def _passed_over(self, by: str) -> int | None:
        """How many refusals of `by` were not recorded since the last one that was; None for one more of them."""
        with self._lock:
            now = time.monotonic()
            times, unrecorded = self._recent.setdefault(by, (deque(maxlen=_A_MINUTE), [0]))
            if len(times) == _A_MINUTE and now - times[0] < 60:
                unrecorded[0] += 1
                return None
            times.append(now)
            passed, unrecorded[0] = unrecorded[0], 0
            return passed
