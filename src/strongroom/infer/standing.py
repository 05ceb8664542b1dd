"""Whether the room still lets this server have its version: looked at each second, by the log and not by memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from strongroom.core.clock import unix
from strongroom.errors import BackendError, Denied, Sealed, StrongroomError

if TYPE_CHECKING:
    from strongroom.client.room import Room

LOOK = 1.0  # seconds between two looks
_BLIND = 10.0  # seconds without a look after which it is as if the answer were no


class Standing:
    """What the principal of `room` has the version `ref` under, as of now: the leases that are in force, if there are
    any (a room of one needs none)."""

    def __init__(self, room: Room, ref: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._room, self._ref, self._clock = room, ref, clock
        self._leases = [
            request["id"]
            for request in room.requests()
            if request["action"] == "load"
            and request["ref"] == ref
            and request["lease"] is not None
            and request["lease"]["holder"] == room.principal
            and self._in_force(request["lease"])
        ]
        self._seen = clock()

    def look(self) -> None:
        """Denied ``infer.ended`` if the version is frozen or gone, its holder suspended, or no lease is left; Sealed
        ``infer.blind`` when the room could not be asked for too long."""
        try:
            self._check()
        except (BackendError, Sealed) as error:
            if self._clock() - self._seen > _BLIND:
                raise Sealed(
                    "infer.blind", f"the room could not be asked for {_BLIND:.0f} s: {error.message}", hint=error.hint
                ) from error
            return
        self._seen = self._clock()

    def _check(self) -> None:
        state = next((each.state for each in self._room.ls() if each.ref == self._ref), "gone")
        if state != "active":
            raise _ended(f"{self._ref} is {state}")
        holder = self._room.principal_show(self._room.principal)
        if holder["state"] != "active":
            raise _ended(f"{self._room.principal} is {holder['state']}")
        if self._leases and not any(self._holds(each) for each in self._leases):
            raise _ended(f"the lease of {self._room.principal} on {self._ref} has ended")

    def _holds(self, identifier: str) -> bool:
        lease = self._room.show_request(identifier)["lease"]
        return lease is not None and self._in_force(lease)

    def _in_force(self, lease: dict[str, object]) -> bool:
        # Whether its uses are used up says nothing: this server took its keys under one of them.
        ends = lease["expires_at"]
        return not lease["ended"] and isinstance(ends, int) and ends > unix()


def _ended(what: str) -> Denied:
    return Denied("infer.ended", f"{what}: this server has stopped answering", hint="strongroom requests")


def watch(standing: Standing, ended: Callable[[StrongroomError], None], over: Callable[[float], bool]) -> None:
    """Look until `over(seconds)`, which waits, says so; `ended` is called once, with why."""
    while not over(LOOK):
        try:
            standing.look()
        except StrongroomError as error:
            ended(error)
            return
