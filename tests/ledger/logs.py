"""Logs of their own for tests: database, key, and the folder they are published in."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

from strongroom.crypto import signatures
from strongroom.formats.entry import Entry
from strongroom.formats.merkle import leaf_hash
from strongroom.ledger.key import LogKey, log_signer
from strongroom.ledger.log import Draft, Ledger
from strongroom.ledger.published import Published, read_from
from strongroom.ledger.verify import verify_log
from strongroom.policy.state import State
from strongroom.storage.db import Database

ROOM = bytes(range(16))
SIGNER = log_signer(bytes(32))
KEY = LogKey(ROOM, SIGNER.public_key)
NOW = 1_790_000_000


class Desk:
    """A log on SQLite under `folder`; `ledger()` is as another process would open it."""

    def __init__(self, folder: Path, url: str = "") -> None:
        self.folder = folder
        self.now = NOW
        self.url = url or f"sqlite:///{folder}/room.db"
        self.db = Database.open(self.url, create=True)
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


def append_until_killed(folder: str, name: str, url: str = "") -> None:
    """A process that appends for ever, and writes down what was acknowledged."""
    desk = Desk(Path(folder), url)
    with (desk.folder / f"acknowledged-{name}").open("w") as out:
        for number in itertools.count():
            receipt = desk.log.append(login(number))
            out.write(f"{receipt.index} {leaf_hash(receipt.data).hex()};\n")
            out.flush()


def kill_in_the_middle(desk: Desk, rounds: int, chance: random.Random) -> None:
    """Two of those processes at a time, killed at a random moment once both have been answered often."""
    context = multiprocessing.get_context("spawn")
    for round_ in range(rounds):
        names = [f"{round_}-{number}" for number in range(2)]
        workers = [
            context.Process(target=append_until_killed, args=(str(desk.folder), name, desk.url), daemon=True)
            for name in names
        ]
        for worker in workers:
            worker.start()
        files = [desk.folder / f"acknowledged-{name}" for name in names]
        while not all(file.exists() and file.read_text().count("\n") >= 10 for file in files):
            assert all(worker.is_alive() for worker in workers)
            time.sleep(0.02)
        time.sleep(chance.random())
        for worker in workers:
            os.kill(worker.pid, signal.SIGKILL)
            worker.join()


def check_acknowledged(desk: Desk, at_least: int) -> None:
    """Everything that was acknowledged is in the log, at its index; the log has the root that was signed."""
    acknowledged: dict[int, str] = {}
    for file in desk.folder.glob("acknowledged-*"):
        for line in file.read_text().splitlines():
            if line.endswith(";"):
                index, leaf = line[:-1].split()
                assert acknowledged.setdefault(int(index), leaf) == leaf
    assert len(acknowledged) >= at_least
    fresh = desk.ledger()
    size = fresh.checkpoint()[0].size
    assert max(acknowledged) < size
    entries = fresh.entries(0, size)
    for index, leaf in acknowledged.items():
        assert leaf_hash(entries[index]).hex() == leaf
    fresh.publish()
    # A killed process may have sent its COMMIT already: PostgreSQL ends such a transaction whenever it gets to it.
    published = verify_log(read_from(desk.folder / "log"), KEY.verifier, signatures.verify).size
    assert size <= published <= fresh.checkpoint()[0].size


def _refusal(now: int, action: str) -> Entry:
    """An entry that changes nothing, and rests on nobody's word."""
    return Entry("refused", now, "unknown", "", {"action": action, "code": "auth.refused", "rule": ""})


def login(number: int):
    return lambda _, __, now: Draft(_refusal(now, f"key {number} {next(_counter)}"))
