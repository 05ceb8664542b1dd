"""What a custodian records on nobody's signed word: how a room begins, and that shares have opened it."""

from __future__ import annotations

from sqlalchemy.engine import Connection

from strongroom.errors import Conflict
from strongroom.formats.entry import CUSTODIAN, Entry
from strongroom.ledger.log import Draft, Ledger
from strongroom.policy.engine import Policies
from strongroom.policy.state import State
from strongroom.vault.documents import Documents

FIRST_ROLES = {"team": ("operator", "officer"), "solo": ("operator", "officer", "researcher")}


class Founding:
    """The founding of one room, and of what is left of it."""

    def __init__(self, room: bytes, ledger: Ledger[State], documents: Documents) -> None:
        self._room, self._ledger, self._documents = room, ledger, documents

    def begin(self, owner: str, key: bytes, custody: str, signer: bytes, *, begun: bool = False) -> None:
        """The first two entries of a new room: the room itself under a shipped policy, unless that has `begun`, and its
        owner."""
        policies = Policies.shipped(custody)

        def genesis(tx: Connection, state: State, now: int) -> Draft:
            if state.room:
                raise Conflict("room.exists", "the log of this room has begun already")
            digest = self._documents.keep(tx, policies)
            body = {"room": self._room.hex(), "signer": signer.hex(), "policy": digest, "custody": custody}
            return Draft(Entry("genesis", now, CUSTODIAN, "", body))

        def first(_: Connection, state: State, now: int) -> Draft:
            if state.principals:
                raise Conflict("room.exists", "the room has an owner already")
            body = {
                "principal": owner,
                "key": key.hex(),
                "person": owner,
                "roles": sorted(FIRST_ROLES[custody]),
                "teams": [],
                "state": "active",
                "statement": "",
            }
            return Draft(Entry("principal", now, CUSTODIAN, owner, body))

        if not begun:
            self._ledger.append(genesis, writes=True)
        self._ledger.append(first)

    def recovered(self, epoch: int) -> int:
        """Record that shares have opened the room: what they prove is not who brought them; the entry."""
        body = {"operation": "recover", "epoch": epoch, "statement": ""}
        return self._ledger.append(lambda _, __, now: Draft(Entry("keystore", now, CUSTODIAN, "", body))).index
