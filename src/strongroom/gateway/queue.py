"""Who is next, while an upstream has as many requests as it takes: deficit round robin (Shreedhar and Varghese, 1995).

Each identity has a queue of its own. They are served in turn, each with as many tokens at a turn, so whoever asks for
little is not kept waiting by whoever asks for much, nor by whoever asks often.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Self

from strongroom.errors import LimitExceeded
from strongroom.gateway.settings import Queue

_TURN = 16  # requests of one turn at most, and turns of one request


class _Waiting:
    """One request that waits. `turn` is done once it may go, or has waited too long."""

    __slots__ = ("cost", "timer", "turn")

    def __init__(self, cost: int, turn: asyncio.Future[None]) -> None:
        self.cost, self.turn = cost, turn
        self.timer: asyncio.TimerHandle | None = None


class _Line:
    """The queue of one identity. `credit`: tokens that it has left of its turns."""

    __slots__ = ("credit", "requests")

    def __init__(self) -> None:
        self.requests: deque[_Waiting] = deque()
        self.credit = 0


class FairQueue:
    """The queue before one upstream, which takes `concurrency` requests at a time; of one event loop. `quantum`: tokens
    of a turn, at best as many as the largest request may have."""

    def __init__(self, concurrency: int, limits: Queue, *, quantum: int = 4096) -> None:
        self._free, self._limits, self._quantum = concurrency, limits, max(quantum, 1)
        self._lines: dict[str, _Line] = {}
        self._order: deque[str] = deque()  # identities with something that waits, the next one first
        self.waiting = 0

    def free_place(self) -> Place | None:
        """A place, if there is one that nobody waits for."""
        if not self._free or self.waiting:
            return None
        self._free -= 1
        return Place(self)

    async def enter(self, who: str, cost: int) -> Place:
        """Wait until a request of `who`, for `cost` tokens, may go upstream. The place must be left again
        (``with await queue.enter(...):``); a request that is cancelled while it waits has none.

        LimitExceeded ``queue.full`` (of the caller, or of all) and ``queue.waited``, with scope, limit, retry_after.
        """
        if (place := self.free_place()) is not None:
            return place
        line = self._lines.get(who)
        if self.waiting >= self._limits.length:
            raise _full("everybody", self._limits.length)
        if line is not None and len(line.requests) >= self._limits.each:
            raise _full("identity", self._limits.each)
        loop = asyncio.get_running_loop()
        # Nobody asks for nothing, and no single request is looked for through a thousand rounds.
        cost = min(max(cost, self._quantum // _TURN, 1), _TURN * self._quantum)
        waiting = _Waiting(cost, loop.create_future())
        if line is None:
            line = self._lines[who] = _Line()
            self._order.append(who)
        line.requests.append(waiting)
        self.waiting += 1
        waiting.timer = loop.call_later(self._limits.wait, self._expire, who, waiting)
        try:
            await waiting.turn
        except asyncio.CancelledError:
            if waiting.turn.done() and not waiting.turn.cancelled() and waiting.turn.exception() is None:
                self.leave()  # its turn had come in the same moment
            else:
                self._drop(who, waiting)
            raise
        finally:
            waiting.timer.cancel()
        return Place(self)

    def leave(self) -> None:
        """A request has ended: the next one may go."""
        self._free += 1
        while self._free and self.waiting:
            turn = self._next().turn
            if not turn.done():  # cancelled, and not yet told
                self._free -= 1
                turn.set_result(None)

    def _next(self) -> _Waiting:
        """The request whose turn it is, taken out of its line."""
        while True:
            who = self._order[0]
            line = self._lines[who]
            head = line.requests[0]
            if line.credit >= head.cost:
                line.credit -= head.cost
                line.requests.popleft()
                self.waiting -= 1
                if not line.requests:  # no credit is kept by whoever has nothing to do
                    del self._lines[who]
                    self._order.popleft()
                return head
            line.credit += self._quantum
            self._order.rotate(-1)

    def _expire(self, who: str, waiting: _Waiting) -> None:
        if not waiting.turn.done():
            self._drop(who, waiting)
            waiting.turn.set_exception(
                LimitExceeded(
                    "queue.waited",
                    f"the model is busy: no place came free in {self._limits.wait:g} s",
                    hint="ask again in a while",
                    scope="model",
                    limit=self._limits.wait,
                    retry_after=1,
                )
            )

    def _drop(self, who: str, waiting: _Waiting) -> None:
        """Take a request that waits no longer out of its line."""
        line = self._lines.get(who)
        if line is None or waiting not in line.requests:
            return
        line.requests.remove(waiting)
        self.waiting -= 1
        if not line.requests:
            del self._lines[who]
            self._order.remove(who)


class Place:
    """A place at an upstream. `leave` gives it back, once."""

    __slots__ = ("_queue",)

    def __init__(self, queue: FairQueue) -> None:
        self._queue: FairQueue | None = queue

    def leave(self) -> None:
        queue, self._queue = self._queue, None
        if queue is not None:
            queue.leave()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()


def _full(scope: str, limit: int) -> LimitExceeded:
    return LimitExceeded(
        "queue.full",
        f"the model is busy, and {limit} requests of {scope} wait already",
        hint="ask again in a while",
        scope=scope,
        limit=limit,
        retry_after=1,
    )
