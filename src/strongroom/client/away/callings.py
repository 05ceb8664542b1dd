"""Who calls a gateway elsewhere, asked of the custodian: once for all who ask at that moment, and for strangers not
oftener than leaves room for everybody else (spec/gateway.md, section 10)."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from strongroom.errors import LimitExceeded
from strongroom.vault.callers import Caller

Found = tuple[Caller, int] | None
_MOMENT = 1.0  # seconds for which an answer is that of others who ask the same, while the log does not change
_KEPT = 10_000
_RATE, _BURST = 20.0, 100.0  # of what nobody has been known by yet, a second


@dataclass
class _Asked:
    answer: Future[Found]
    at: float
    epoch: int


class Callings:
    """`ask` is the question itself. Thread-safe."""

    def __init__(self, ask: Callable[[Mapping[str, Any]], Found], clock: Callable[[], float] = time.monotonic) -> None:
        self._ask, self._clock = ask, clock
        self._lock = threading.Lock()
        self._epoch = 0
        self._asked: OrderedDict[str, _Asked] = OrderedDict()
        self._known: OrderedDict[str, None] = OrderedDict()  # what somebody has been known by
        self._left, self._at = _BURST, clock()

    def changed(self) -> None:
        """The log has changed what decides: what was answered before is no answer any more."""
        with self._lock:
            self._epoch += 1

    def of(self, shown: Mapping[str, Any]) -> Found:
        """Who has `shown` this, or None for nobody; whatever `ask` raises. LimitExceeded ``gateway.strangers``: whoever
        sends keys that there are not would have the custodian answer nobody else."""
        name = _digest(shown)
        # Of a certificate each handshake has another time, and has proved the same key.
        by = _digest({**shown, "at": 0}) if "at" in shown else name
        with self._lock:
            now = self._clock()
            before = self._asked.get(name)
            if before is not None and before.epoch == self._epoch and now - before.at < _MOMENT:
                answer, mine = before.answer, False
            else:
                if by not in self._known:
                    self._one_more(now)
                answer, mine = Future[Found](), True
                self._asked[name] = _Asked(answer, now, self._epoch)
                self._asked.move_to_end(name)
                _shorten(self._asked)
        if mine:
            self._find(name, by, shown, answer)
        return answer.result()

    def _find(self, name: str, by: str, shown: Mapping[str, Any], answer: Future[Found]) -> None:
        try:
            found = self._ask(shown)
        except BaseException as error:  # noqa: BLE001 - whoever waits has to know
            with self._lock:
                if (kept := self._asked.get(name)) is not None and kept.answer is answer:
                    del self._asked[name]  # the next one asks again
            answer.set_exception(error)
            return
        if found is not None:
            with self._lock:
                self._known[by] = None
                self._known.move_to_end(by)
                _shorten(self._known)
        answer.set_result(found)

    def _one_more(self, now: float) -> None:
        self._left = min(_BURST, self._left + (now - self._at) * _RATE)
        self._at = now
        if self._left < 1:
            raise LimitExceeded(
                "gateway.strangers",
                "too many ask with keys or tokens that are not known here",
                hint="wait a second, then try again",
                retry_after=1,
            )
        self._left -= 1


def _digest(shown: Mapping[str, Any]) -> str:
    """What stands for it in memory: no token is kept."""
    return hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()


def _shorten(kept: OrderedDict[str, Any]) -> None:
    if len(kept) > _KEPT:
        kept.popitem(last=False)
