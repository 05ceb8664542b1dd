"""Who waits to append: all of them in one batch, which one of them leads, and nobody for ever, whoever is interrupted
meanwhile."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Generic, TypeVar

D = TypeVar("D")  # what is decided
R = TypeVar("R")  # what comes of it

_BATCH = 1024  # entries: more of them are not waited for
_MOMENT = 0.0002  # seconds that one who was just answered has for asking again, while others do
_SLOW = 0.001  # seconds: who passes a wake-up on later than that had to wait for the interpreter
_LOOK = 1.0  # seconds after which who sleeps looks whether a wake-up was lost


class Waiting(Generic[D, R]):
    """A decision in the queue, and whoever waits for what comes of it."""

    __slots__ = ("_asleep", "decide", "error", "gone", "leads", "receipt", "writes")

    def __init__(self, decide: D, *, writes: bool) -> None:
        self.decide, self.writes = decide, writes
        self.leads = False  # it has the lead: nobody else appends until it does, or leaves
        self.gone = False  # it was interrupted, and passes no wake-up on
        self.receipt: R | None = None
        self.error: BaseException | None = None
        # A lock that is held until it is woken: an Event costs several times as much, and every entry has one.
        self._asleep = threading.Lock()
        self._asleep.acquire()

    @property
    def done(self) -> bool:
        return self.receipt is not None or self.error is not None

    def sleep(self) -> None:
        while not self._asleep.acquire(True, _LOOK):
            if self.done or self.leads:
                return

    def wake(self) -> None:
        if self._asleep.locked():
            self._asleep.release()


class Queue(Generic[D, R]):
    """Those who wait. Whoever finds nobody there leads: takes all who have come, and answers them."""

    def __init__(self) -> None:
        self.waiting: list[Waiting[D, R]] = []
        self.led = False
        self._lock = threading.Lock()
        self._crowd = 0  # how many were in the last batch
        self._gate: threading.Lock | None = None  # released when the crowd is back
        self._answered: deque[Waiting[D, R]] = deque()  # and not woken yet
        self._passed = 0.0  # when the last of them was

    def enter(self, waiting: Waiting[D, R]) -> None:
        """Wait until `waiting` is done, or leads."""
        with self._lock:
            self.waiting.append(waiting)
            waiting.leads, self.led = not self.led, True
            if self._gate is not None and len(self.waiting) >= self._crowd:
                self._gate.release()
                self._gate = None
        if waiting.leads:
            return
        try:
            waiting.sleep()
        finally:
            if waiting.done:
                self._pass_on()

    def settle(self) -> None:
        """Wait until no more come. Those who were answered a moment ago ask again in a moment: without this the first
        of them is a batch of one, and all others wait for its commit."""
        seen = 0
        while seen < len(self.waiting) < min(self._crowd, _BATCH):
            seen = len(self.waiting)
            self._await_crowd()
        # More than the last time, or the first time: they are not known to come back, so nobody sleeps for them.
        while max(self._crowd, seen, 1) < len(self.waiting) < _BATCH:
            seen = len(self.waiting)
            time.sleep(0)  # long enough for whoever can run to come as far as the queue

    def take(self, batch: list[Waiting[D, R]]) -> None:
        """Take all that wait."""
        with self._lock:
            batch += self.waiting
            self.waiting.clear()
        self._crowd = len(batch)

    def answer(self, batch: list[Waiting[D, R]], leader: Waiting[D, R]) -> None:
        """Wake those of `batch`, all done, and hand the lead to somebody who came meanwhile.

        One wakes the next, and none of them is woken in vain: they run one at a time anyhow, and all at once would
        fight for the interpreter, which costs more than the rest of an entry does.
        """
        try:
            self._answered += [waiting for waiting in batch if waiting is not leader]
            self._passed = time.perf_counter()
            self._pass_on()
        finally:
            with self._lock:
                self._hand_over()

    def leave(self, waiting: Waiting[D, R]) -> None:
        """Somebody who was interrupted appends nothing if it is not too late for that, and leads nobody."""
        waiting.gone = True
        with self._lock:
            if waiting in self.waiting:
                self.waiting.remove(waiting)
                if waiting.leads:
                    self._hand_over()
        if waiting.done:
            self._pass_on()

    def _pass_on(self) -> None:
        """Wake the next who was answered. All of them where the last wake-up took long to be passed on: a thread that
        computes has the interpreter then, and each of them in turn would wait for it."""
        now = time.perf_counter()
        every = now - self._passed > _SLOW
        self._passed = now
        while self._answered:
            try:
                waiting = self._answered.popleft()
            except IndexError:  # another has taken it meanwhile
                return
            waiting.wake()
            if not every and not waiting.gone:
                return

    def _await_crowd(self) -> None:
        gate = threading.Lock()
        gate.acquire()
        with self._lock:
            if len(self.waiting) >= self._crowd:
                return
            self._gate = gate
        gate.acquire(True, _MOMENT)
        with self._lock:
            self._gate = None

    def _hand_over(self) -> None:
        # A leader who was interrupted as it took them has answered some that are still there.
        self.waiting = [waiting for waiting in self.waiting if not waiting.done]
        self.led = bool(self.waiting)
        if self.waiting:
            self.waiting[0].leads = True
            self.waiting[0].wake()
