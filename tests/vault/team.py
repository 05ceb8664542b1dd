"""A team room with a version in it, and the people in it."""

from __future__ import annotations

from strongroom.client import Room
from strongroom.core.clock import unix
from vault.rooms import write_model

PEOPLE = {"user/ana": "researcher", "user/ben": "officer", "user/eva": "executive"}


class Team:
    """Everybody in the room as a `Room` of their own. `later` moves the clock.

    `folder` has a copy of what `furnish` makes, and whoever looks at its log must not remember another copy's.
    """

    def __init__(self, folder):
        self.folder, self.offset = folder, 0
        self.olga, self.ana, self.ben, self.eva = map(self.be, ("user/olga", *PEOPLE))

    @staticmethod
    def furnish(folder):
        room, _ = Room.init(folder / "room", owner="user/olga")
        with room:
            room.put(write_model(folder / "model"), "acme/tiny", share="1/2")
            for path, role in PEOPLE.items():
                room.principal_add(path, roles=[role])

    def be(self, principal):
        room = Room(self.folder / "room", principal)
        room._vault.clock = room._vault.custodian.ledger._clock = self.clock
        return room

    def add(self, principal, *roles, **options):
        self.olga.principal_add(principal, roles=roles, **options)
        return self.be(principal)

    def clock(self):
        return unix() + self.offset

    def later(self, seconds):
        self.offset += seconds

    def lease(self, who=None, **options):
        asked = (who or self.ana).request("acme/tiny", reason="evaluation", **options)
        self.ben.approve(asked["id"])
        return self.eva.approve(asked["id"])
