"""Looking after a room: ceilings, thawing, its clock, and what is kept beside the log. Each act is an entry."""

from __future__ import annotations

from typing import Any, Protocol

from sqlalchemy import delete
from sqlalchemy.engine import Connection

from strongroom.core.canonical import MAX_INTEGER
from strongroom.core.ids import Ref
from strongroom.errors import NotFound, UsageError
from strongroom.formats.entry import Entry, Private
from strongroom.ledger.log import Decision, Draft, Receipt
from strongroom.policy.custody import Custody, ceilings
from strongroom.policy.speaker import TOLERANCE, speaking
from strongroom.policy.state import State
from strongroom.storage.db import Database, log_private
from strongroom.vault.refusals import Refusals
from strongroom.vault.requests import check_reason


class _Decide(Protocol):
    def __call__(self, decide: Decision[State], *, writes: bool = False) -> Receipt: ...


class Upkeep:
    """What those who may `administer` a room do to it, besides its policy. `decide` appends what a decision returns."""

    def __init__(self, rules: Custody, decide: _Decide, refusals: Refusals, db: Database) -> None:
        self._rules, self._decide, self._refusals, self._db = rules, decide, refusals, db

    def set_ceiling(self, by: str, ref: str, changes: dict[str, int]) -> dict[str, Any]:
        """Change how many may hold, copy and have copies of a version, or of every version of a name."""
        if not Ref.parse(ref).name or not all(0 <= value <= MAX_INTEGER for value in changes.values()):
            raise UsageError("ceiling.negative", f"a ceiling is a number from 0 to {MAX_INTEGER}")

        def decide(_: Connection, state: State, now: int) -> Draft:
            self._rules.may(state, speaking(state, by), "administer", now=now)
            if not any(ref in (each, each.partition("@")[0]) for each in state.versions):
                raise NotFound("version.missing", f"there are no weights {ref} in this room", hint="strongroom ls")
            before = dict(zip(("holders", "copies", "copiers"), ceilings(state, ref), strict=True))
            return Draft(Entry("ceiling", now, by, ref, before | changes))

        with self._refusals.recorded(by, "administer", ref):
            receipt = self._decide(decide)
        return {"ref": ref, **receipt.entry.body, "entry": receipt.index}

    def thaw(self, by: str, ref: str, reason: str) -> dict[str, Any]:
        """A version that was revoked may be asked for again. Its leases have ended: each takes new approvals."""
        note = Private.fresh("reason", reason)
        check_reason(note, note.commitment)

        def decide(_: Connection, state: State, now: int) -> Draft:
            self._rules.may(state, speaking(state, by), "administer", now=now)
            version = state.versions.get(ref)
            if version is None or not version.frozen:
                raise NotFound("thaw.nothing", f"{ref} is not a frozen version of this room", hint="strongroom ls")
            return Draft(Entry("thaw", now, by, ref, {}, {"reason": note.commitment}), [note])

        with self._refusals.recorded(by, "administer", ref):
            return {"ref": ref, "entry": self._decide(decide).index}

    def set_clock(self, by: str, reason: str) -> dict[str, Any]:
        """After the clock had been ahead: take the room's time back to now. Ends every lease."""
        note = Private.fresh("reason", reason)
        check_reason(note, note.commitment)

        def decide(_: Connection, state: State, now: int) -> Draft:
            self._rules.may(state, speaking(state, by), "administer", now=now)
            if now >= state.latest - TOLERANCE:
                raise UsageError("clock.right", "the clock is not behind the log: nothing has to be mended")
            body = {"before": state.latest}
            return Draft(Entry("clock", now, by, "", body, {"reason": note.commitment}), [note])

        with self._refusals.recorded(by, "administer"):
            receipt = self._decide(decide)
        return {"before": receipt.entry.body["before"], "now": receipt.entry.at, "entry": receipt.index}

    def redact(self, by: str, index: int) -> dict[str, Any]:
        """Delete what was kept beside an entry: its commitments stay in the log, and the tree as it was."""

        def decide(tx: Connection, state: State, now: int) -> Draft:
            self._rules.may(state, speaking(state, by), "administer", now=now)
            if not tx.execute(delete(log_private).where(log_private.c.position == index)).rowcount:
                raise NotFound("redact.nothing", f"nothing is kept beside entry {index}", hint="strongroom log show")
            return Draft(Entry("redact", now, by, "", {"entry": index}))

        with self._refusals.recorded(by, "administer"):
            receipt = self._decide(decide, writes=True)
        self._db.scrub()
        return {"redacted": index, "entry": receipt.index}
