"""Budgets on a database of their own, a clock that tests set, and workers that are processes of their own."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import sqlalchemy as sa

from strongroom.errors import BudgetExceeded
from strongroom.storage.db import Database
from strongroom.watch.budget import Budgets
from strongroom.watch.counters import Counters
from strongroom.watch.debts import Debts
from strongroom.watch.drawing import OwnCounters
from strongroom.watch.report import report
from strongroom.watch.rules import Rule, Spender, counted_ref, window_at

REF = "acme/tiny@1"
ROOM = "5d" * 16
SIZE = 10_000_000
NOON = 1_790_000_000 - 1_790_000_000 % 86_400 + 43_200
ANA = Spender("user/ana", "10.0.0.0/24", ("team/red",))
BEN = Spender("user/ben", "10.0.0.0/24", ("team/red", "team/blue"))
RULES = (
    Rule("identity", "day", 0.01, hard=True),
    Rule("destination", "day", 0.02, hard=True),
    Rule("team", "day", 0.05),
    Rule("model", "hour", 0.03, hard=True),
    Rule("model", "day", 0.03, hard=True),
    Rule("everybody", "lifetime", 0.5),
)


class Desk:
    """One database; `worker()` is as another process would open it."""

    def __init__(self, url: str) -> None:
        self.url, self.now = url, float(NOON)
        self.db = Database.open(url, create=True)
        self.alarms = []

    def worker(self, rules=RULES, size=SIZE, **more) -> Budgets:
        return Budgets(OwnCounters(self.db), rules, lambda _: size, lambda: self.now, alarm=self.alarms.append, **more)

    def report(self, rules=RULES, size=SIZE, uses=(), answered=(0, 0)):
        refs = {REF, *(counted_ref(rule.scope, REF) for rule in rules)}
        now, rows = Counters(self.db).look(int(self.now), refs)
        return report(rules, rows, uses, REF, size, now, answered)

    def settled(self) -> None:
        """What killed workers had begun has ended: PostgreSQL ends a transaction whose COMMIT had been sent whenever it
        gets to it."""
        others = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        while self.url.startswith("postgresql"):
            with self.db.reading() as tx:
                if not tx.execute(sa.text(f"{others} AND state <> 'idle'")).scalar_one():
                    return
            time.sleep(0.02)

    def used(self, scope, window, who="", ref=REF, at=None) -> int:
        start, _ = window_at(window, int(self.now if at is None else at))
        _, rows = Counters(self.db).look(int(self.now), {ref})
        return dict(rows).get((scope, window, start, who, ref), 0)


def spend(url: str, seed: int, threads: int, answers: int, *, die: bool = False) -> None:
    """A worker: reserves and settles until it is refused, then gives back; prints each grant before the next, and with
    `die` neither gives back nor ends."""
    database = Database.open(url)
    worker = Budgets(OwnCounters(database), RULES, lambda _: SIZE, lambda: float(NOON))
    lock = threading.Lock()
    charged: Counter[str] = Counter()

    def run(number: int) -> None:
        chance = random.Random(seed * 100 + number)
        who = (ANA, BEN, Spender(f"user/c{seed}", f"10.1.{seed}.0/24"))[number % 3]
        for _ in range(answers):
            bits = chance.randrange(1, 400)
            try:
                reservation = worker.reserve(who, REF, bits)
            except BudgetExceeded:
                break
            if die:
                os.write(1, f"{who.principal} {bits}\n".encode())  # whole, whichever thread it is of
                continue
            kept = chance.random()
            actual = bits if kept < 0.2 else chance.randrange(0, bits + 1)
            if kept < 0.9:  # else it is never settled, and all of it is charged
                reservation.settle(actual)
            with lock:
                charged[who.principal] += actual if kept < 0.9 else bits

    running = [threading.Thread(target=run, args=(number,)) for number in range(threads)]
    for each in running:
        each.start()
    for each in running:
        each.join()
    if die:
        threading.Event().wait()
    worker.close()
    for principal, bits in charged.items():
        print(principal, bits)
    sys.stdout.flush()


def owe(url: str, folder: str, step: str) -> None:
    """A worker that ends in the middle of charging what an answer had beyond all that it had drawn: by SIGKILL, at this
    step. Says what user/ana was granted, and, once the end of that answer goes out, that it does."""
    database = Database.open(url)

    def die(*_) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    class Table(OwnCounters):
        def pay(self, now, asked, bits):
            if step == "before it is sent":
                die()
            super().pay(now, asked, bits)
            if step == "the answer is lost":
                die()

    debts = Debts(Path(folder), ROOM)
    worker = Budgets(Table(database), RULES, lambda _: SIZE, lambda: float(NOON), debts=debts)
    if step == "before it is on disk":
        debts.write = die
    if step == "half of it is on disk":
        module = sys.modules[Debts.__module__]
        module._write = lambda file, data: die(os.write(file, data[:-20]))
    if step == "before the file is emptied":
        debts._empty = die
    granted = 0
    while reservation := worker.take(ANA, REF, 100) or (granted == 0 and worker.reserve(ANA, REF, 100)):
        granted, last = granted + 100, reservation
    os.write(1, f"{granted + 50_000}\n".encode())
    later = []
    assert last.settle(100 + 50_000, pay=later.append)
    debts.written().result()
    os.write(1, b"given\n")
    later[0]()
    assert step == "it is charged", step
    die()
