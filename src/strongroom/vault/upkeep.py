"""Looking after a room: its policy, ceilings, thawing, its clock, reviews, what is kept beside the log, and what its
gateways have answered. Each act is a signed statement, and an entry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from sqlalchemy import delete
from sqlalchemy.engine import Connection

from strongroom.errors import NotFound, UsageError
from strongroom.formats.entry import Entry, Private
from strongroom.formats.statement import Statement
from strongroom.ledger.log import Decision, Draft
from strongroom.policy import acts
from strongroom.policy.custody import Custody
from strongroom.policy.state import State
from strongroom.storage.db import Database, log_private
from strongroom.vault.requests import check_reason

_ACTS: dict[str, Callable[[Custody, State, Statement, int], Entry]] = {
    "ceiling": acts.ceiling,
    "clock": acts.clock,
    "copy": acts.copy,
    "enact": acts.enact,
    "inference": acts.inference,
    "keystore": acts.keystore,
    "redact": acts.redact,
    "review": acts.review,
    "thaw": acts.thaw,
}


@dataclass(frozen=True)
class Recorded:
    """An entry that is in the log, durable."""

    index: int
    entry: Entry


class _Once(Protocol):
    def __call__(self, statement: Statement, decide: Decision[State], *, writes: bool = ...) -> Recorded: ...


class Upkeep:
    """What people do to a room besides asking and approving. `once` appends what a decision returns, and answers a
    statement that is recorded already."""

    def __init__(self, rules: Custody, once: _Once, db: Database) -> None:
        self._rules, self._once, self._db = rules, once, db

    def act(self, statement: Statement, reason: Private | None, size: int, entry: Callable[[int], Entry]) -> Recorded:
        """Do what `statement` says; `reason` is what it commits to, `size` that of the log now, `entry` gives one of
        its entries, proven."""
        decide = _ACTS.get(statement.kind)
        if decide is None:
            raise UsageError("statement.kind", f"a statement of the kind {statement.kind} does nothing by itself")
        body, notes = statement.body, []
        if body.get("reason") or (statement.kind != "enact" and "reason" in body):
            if reason is None:
                raise UsageError("reason.empty", "this takes a reason", hint="--reason TEXT")
            check_reason(reason, body["reason"])
            notes = [reason]
        released = None
        if statement.kind == "copy" and body["release"] < size:
            released = entry(body["release"])

        def within(tx: Connection, state: State, now: int) -> Draft:
            entry = decide(self._rules, state, statement, now)
            # After it is known who speaks: strangers are told nothing.
            if statement.kind == "redact":
                _redact(tx, body["entry"])
            if statement.kind == "copy":
                _check_release(released, statement)
            if statement.kind == "review" and body["size"] > size:
                raise UsageError("review.size", f"nobody has reviewed {body['size']} entries: the log has {size}")
            return Draft(entry, notes)

        try:
            return self._once(statement, within, writes=statement.kind == "redact")
        finally:
            if statement.kind == "redact":  # again, too, where it was deleted, and the file could not be cleared then
                self._db.scrub()


def _redact(tx: Connection, index: int) -> None:
    """Delete what was kept beside an entry: its commitments stay in the log, and the tree as it was."""
    if not tx.execute(delete(log_private).where(log_private.c.position == index)).rowcount:
        raise NotFound("redact.nothing", f"nothing is kept beside entry {index}", hint="strongroom log tail")


def _check_release(found: Entry | None, statement: Statement) -> None:
    """Whoever says that a copy is written was given the keys for one."""
    index, ref = statement.body["release"], statement.body["ref"]
    if found is None or (found.type, found.by, found.ref) != ("release", statement.by, ref):
        raise UsageError("copy.release", f"entry {index} is no release of {ref} to {statement.by}")
    if found.body["action"] != "copy":
        raise UsageError("copy.release", f"the release in entry {index} is not one to copy")
