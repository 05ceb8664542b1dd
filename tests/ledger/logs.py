"""Logs of their own for tests: database, key, and the folder they are published in."""

from __future__ import annotations

import itertools
from pathlib import Path

from strongroom.formats.entry import Entry
from strongroom.ledger.key import LogKey, log_signer
from strongroom.ledger.log import Draft, Ledger
from strongroom.ledger.published import Published
from strongroom.policy.state import State
from strongroom.storage.db import Database

ROOM = bytes(range(16))
SIGNER = log_signer(bytes(32))
KEY = LogKey(ROOM, SIGNER.public_key)
NOW = 1_790_000_000


class Desk:
    """A log on SQLite under `folder`; `ledger()` is as another process would open it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.now = NOW
        self.db = Database.open(f"sqlite:///{folder}/room.db", create=True)
        self.published = Published(folder / "log", KEY)
        self.log = self.ledger()

    def ledger(self, *, published: bool = True) -> Ledger[State]:
        return Ledger(
            self.db,
            KEY,
            lambda: SIGNER,
            State,
            clock=lambda: self.now,
            published=self.published if published else None,
        )

    def begin(self) -> None:
        body = {"room": ROOM.hex(), "signer": "0" * 64, "policy": "0" * 64, "custody": "team"}
        self.log.append(lambda _, __, now: Draft(Entry("genesis", now, "custodian", "", body)))

    def login(self, count: int = 1, ledger: Ledger[State] | None = None):
        """Append `count` entries; the last receipt."""
        receipts = [(ledger or self.log).append(login(number)) for number in range(count)]
        return receipts[-1]


_counter = itertools.count()


def login(number: int):
    return lambda _, __, now: Draft(Entry("login", now, "user/ana", "", {"method": f"key {number} {next(_counter)}"}))
