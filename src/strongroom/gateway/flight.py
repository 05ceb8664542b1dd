"""A request that is under way, and what may end it before its time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Coroutine, Mapping
from typing import Any, Protocol, TypeVar

from strongroom.errors import BackendError, Sealed, StrongroomError
from strongroom.gateway.answer import Meter
from strongroom.gateway.certificates import Peer
from strongroom.gateway.door import Caller, Door
from strongroom.gateway.queue import Place
from strongroom.gateway.request import NOTHING
from strongroom.gateway.spelt import Spelling
from strongroom.gateway.upstream import Reply
from strongroom.watch.budget import Reservation

T = TypeVar("T")


class Trace(Protocol):
    """As tracing.py has it."""

    header: bytes

    def part(self, name: str) -> None: ...
    def upstream(self, flight: Flight) -> None: ...
    def end(self, flight: Flight, status: int, code: str, tokens: int) -> None: ...


class Shown(Protocol):
    """By what its caller is known, and the network that it comes from. `token` is empty where a certificate, of `peer`,
    stands for it."""

    @property
    def token(self) -> str: ...
    @property
    def peer(self) -> Peer | None: ...
    @property
    def destination(self) -> str: ...


class Admission(Protocol):
    """That it was let through by limits, of this process or over Redis. `done` may have to be awaited."""

    @property
    def headers(self) -> list[tuple[bytes, bytes]]: ...
    def done(self, tokens: int) -> Awaitable[None] | None: ...


class Flight:
    """One request of an authenticated caller. `most`: tokens for each of its answers; `text_most`: bytes of text for
    all of them; `numbers`: of embeddings that were given out; `bits` are charged, of the `reserved`; `covered`: bytes
    of a stream's text that may go out before more is reserved; `owes`: it had more than was reserved or drawn, and that
    may not be on disk yet. `epoch`: that of the door's answers when it was allowed, -1 before; `known`: that before it
    was asked who calls."""

    __slots__ = (
        *("admission", "asked", "begun", "bits", "body", "caller", "covered", "destination", "epoch", "headers"),
        *("identifier", "known", "meter", "misspelled", "most", "numbers", "owes", "place", "recorded", "ref", "reply"),
        *("reserved", "route", "seed", "shown", "spelling", "started", "text_most", "tokens", "toll", "trace", "why"),
        *("_interrupted", "_task", "_waits"),
    )

    def __init__(
        self,
        route: str,
        caller: Caller,
        shown: Shown,
        identifier: str,
        task: asyncio.Task[Any],  # what answers it
        known: int = 0,
    ) -> None:
        self.route, self.caller, self.shown, self.known = route, caller, shown, known
        self.identifier, self.destination, self._task = identifier, shown.destination, task
        self.started = time.monotonic()
        self.ref = ""
        self.asked = NOTHING
        self.seed: int | None = None
        self.spelling: Spelling | None = None  # of the version, where its tokens come by the private channel
        self.most = self.numbers = self.reserved = self.text_most = 0
        self.covered = 0
        self.tokens = self.bits = 0  # that were given out, once it is settled
        self.admission: Admission | None = None
        self.toll: Reservation | None = None
        self.place: Place | None = None  # at an upstream
        self.reply: Reply | None = None
        self.begun = False  # its status has been sent
        self.recorded = False
        self.owes = False
        self.misspelled = False  # its text is not what its tokens spell
        self.why: StrongroomError | None = None
        self.trace: Trace | None = None
        self.epoch = -1
        self._interrupted = False
        self._waits = False  # so that it can be interrupted
        self.meter = Meter()
        self.body: Mapping[str, object] = {}  # as it went upstream
        self.headers = [(b"x-request-id", identifier.encode())]

    def check(self) -> None:
        """Whatever has ended it: to be asked before anything is begun or given out."""
        if self.why is not None:
            raise self.why

    async def interruptible(self, wait: Coroutine[Any, Any, T]) -> T:
        """`wait` for a place, or for an answer to begin, which takes as long as the answer where that comes whole: what
        ends the request is raised at once, and frees the place."""
        if self.why is not None:
            wait.close()
            raise self.why
        self._waits = True
        try:
            return await wait
        except asyncio.CancelledError:
            # Cancelled by `cut` alone, and not by a server that ends, too.
            if self._interrupted and not self._task.uncancel():
                self.check()
            raise
        finally:
            self._waits = False

    def leave(self) -> None:
        """The caller has gone."""
        self.cut(BackendError("upstream.aborted", "the client has gone"))

    def cut(self, why: StrongroomError) -> None:
        """End it: upstream's connection is closed, and `why` is what the caller is told."""
        self.why = self.why or why
        if self.reply is not None:
            self.reply.abort()
        if self._waits and not self._interrupted:
            self._interrupted = True
            self._task.cancel()


class Flights:
    """Those under way: asked about again as soon as the log changes what decides, so that a frozen version, or a key
    that has ended, gives out nothing more."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self._under_way: set[Flight] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        door.changed, door.blind = self._changed, self._blind

    def begin(self, flight: Flight) -> None:
        self._under_way.add(flight)

    def end(self, flight: Flight) -> None:
        self._under_way.discard(flight)

    def allowed(self, flight: Flight) -> bool:
        """As `allow`, from memory alone."""
        if flight.known != self._door.epoch or not self._door.allowed(flight.caller, flight.asked.actions, flight.ref):
            return False
        flight.epoch = self._door.epoch
        return True

    async def allow(self, flight: Flight) -> None:
        """Denied, NotFound; again if the log changes meanwhile."""
        while True:
            epoch = self._door.epoch
            if flight.known != epoch:  # else a key that ends while a body comes slowly would still be good for it
                flight.caller = await self._door.caller(flight.shown.token, flight.shown.peer)
                flight.known = epoch
            await self._door.allow(flight.caller, flight.asked.actions, flight.ref, flight.asked.model)
            if epoch == self._door.epoch:
                flight.epoch = epoch
                return

    def _changed(self) -> None:
        for flight in self._under_way:
            if 0 <= flight.epoch < self._door.epoch:
                task = asyncio.get_running_loop().create_task(self._again(flight))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    def _blind(self) -> None:
        """Whoever keeps the log from the gateway would keep a freeze from it, too."""
        for flight in self._under_way:
            flight.cut(Sealed("gateway.blind", "the gateway can't see the room's log, and gives out nothing meanwhile"))

    async def _again(self, flight: Flight) -> None:
        try:
            await self.allow(flight)
        except StrongroomError as error:
            flight.cut(error)
        except Exception:  # noqa: BLE001 - what can't be asked is not allowed
            flight.cut(BackendError("gateway.blind", "the room can't be asked"))

    def __len__(self) -> int:
        return len(self._under_way)
