"""Who waits for the sequencer: all of them in one batch, and nobody for ever, whoever is interrupted meanwhile."""

from __future__ import annotations

import contextlib
import signal
import sqlite3
import threading
import time

import pytest

from ledger.logs import login
from strongroom.errors import Sealed
from strongroom.formats.merkle import leaf_hash
from strongroom.ledger import queue as queue_module
from strongroom.ledger.log import Ledger
from strongroom.ledger.queue import Queue, Waiting


class Writer(threading.Thread):
    """Appends once, and keeps what came of it."""

    def __init__(self, log: Ledger, decide=None) -> None:
        super().__init__(daemon=True)
        self.log, self.decide = log, decide or login(1)
        self.receipt = self.error = None
        self.start()

    def run(self):
        try:
            self.receipt = self.log.append(self.decide)
        except BaseException as error:  # noqa: BLE001 - what a test looks at
            self.error = error

    def done(self):
        self.join(30)
        assert not self.is_alive()
        return self


def queued(log, count):
    while len(log._queue.waiting) < count:
        time.sleep(0.002)


@contextlib.contextmanager
def database_taken(desk):
    """Another process is writing: nobody here gets any further than to wait for the database."""
    with contextlib.closing(sqlite3.connect(desk.folder / "room.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("COMMIT")


@contextlib.contextmanager
def sequencer_held(log):
    """Somebody leads, and is in the middle of it: whoever comes now waits."""
    going, go = threading.Event(), threading.Event()

    def hold(tx, state, now):
        going.set()
        go.wait(30)
        return login(0)(tx, state, now)

    writer = Writer(log, hold)
    assert going.wait(30)
    try:
        yield
    finally:
        go.set()
    writer.done()


def check_goes_on(desk, size):
    assert Writer(desk.log).done().receipt.index == size
    assert desk.ledger().checkpoint()[0].size == size + 1
    assert not desk.log._queue.waiting
    assert not desk.log._queue.led


def test_all_who_came_while_the_database_was_waited_for_are_one_batch(desk):
    with database_taken(desk):
        writers = [Writer(desk.log) for _ in range(8)]
        queued(desk.log, 8)
    receipts = [writer.done().receipt for writer in writers]
    assert sorted(receipt.index for receipt in receipts) == list(range(1, 9))
    assert {receipt.size for receipt in receipts} == {9}
    assert len({leaf_hash(receipt.data) for receipt in receipts}) == 8
    check_goes_on(desk, 9)


def test_where_the_sequencer_cannot_begin_all_who_wait_are_told(desk, monkeypatch):
    asked, answer = threading.Event(), threading.Event()

    def signer():
        asked.set()
        answer.wait(30)
        raise Sealed("keystore.down", "down")

    real = desk.log._signer
    monkeypatch.setattr(desk.log, "_signer", signer)
    writers = [Writer(desk.log)]
    assert asked.wait(30)
    writers += [Writer(desk.log) for _ in range(4)]
    queued(desk.log, 5)
    answer.set()
    assert all(isinstance(writer.done().error, Sealed) for writer in writers)
    monkeypatch.setattr(desk.log, "_signer", real)
    check_goes_on(desk, 1)


def test_who_is_interrupted_while_waiting_appends_nothing(desk):
    """By the signal that Control-C sends."""

    def interrupt():
        queued(desk.log, 1)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    with sequencer_held(desk.log):
        sender = threading.Thread(target=interrupt)
        sender.start()
        with pytest.raises(KeyboardInterrupt):
            desk.log.append(login(1))
        sender.join()
        assert not desk.log._queue.waiting
    check_goes_on(desk, 2)


def test_who_is_interrupted_when_handed_the_lead_passes_it_on(desk, monkeypatch):
    slept = Waiting.sleep
    chosen = []

    def sleep(waiting):
        chosen.append(waiting)
        slept(waiting)
        if waiting is chosen[0]:
            raise KeyboardInterrupt

    monkeypatch.setattr(Waiting, "sleep", sleep)
    with sequencer_held(desk.log):
        first = Writer(desk.log)
        while not chosen:
            time.sleep(0.002)
        others = [Writer(desk.log) for _ in range(3)]
        queued(desk.log, 4)
    assert isinstance(first.done().error, KeyboardInterrupt)
    assert sorted(writer.done().receipt.index for writer in others) == [2, 3, 4]
    check_goes_on(desk, 5)


@pytest.mark.parametrize("when", ["deciding", "taking"])
def test_a_leader_that_is_interrupted_leaves_nobody_waiting(desk, when):
    """What its batch asked for is undone, and they are told; those who come later are none of it."""

    class Stuck(list):
        def clear(self):
            raise KeyboardInterrupt

    def interrupted(*_):
        raise KeyboardInterrupt

    with database_taken(desk):
        if when == "taking":
            desk.log._queue.waiting = Stuck()
        writers = [Writer(desk.log, interrupted if when == "deciding" else None)]
        queued(desk.log, 1)
        writers += [Writer(desk.log) for _ in range(4)]
        queued(desk.log, 5)
    assert all(isinstance(writer.done().error, KeyboardInterrupt) for writer in writers)
    check_goes_on(desk, 1)


@pytest.fixture
def asleep(monkeypatch):
    """A queue with a leader, and three threads that wait in it; which of them have gone on."""
    monkeypatch.setattr(queue_module, "_LOOK", 3600)  # nobody but who should does wake them

    class Asleep:
        def __init__(self):
            self.queue, self.gone_on = Queue(), []
            self.leader, *self.waiting = [Waiting(None, writes=False) for _ in range(4)]
            self.threads = [threading.Thread(target=self.wait, args=(each,), daemon=True) for each in self.waiting]

        def wait(self, waiting):
            try:
                self.queue.enter(waiting)
            except KeyboardInterrupt:
                self.queue.leave(waiting)
            self.gone_on.append(waiting)

        def answer(self, batch):
            for waiting in batch:
                waiting.receipt = "recorded"
            self.queue.answer(batch, self.leader)

        def all_go_on(self):
            for thread in self.threads:
                thread.join(30)
            assert len(self.gone_on) == 3

    made = Asleep()
    made.queue.enter(made.leader)
    assert made.leader.leads
    return made


def start(asleep):
    for count, thread in enumerate(asleep.threads, 2):
        thread.start()
        while len(asleep.queue.waiting) < count:  # they are woken in this order
            time.sleep(0.002)
    batch = []
    asleep.queue.take(batch)
    assert len(batch) == 4
    return batch


def test_who_is_interrupted_before_the_answer_keeps_nobody_from_it(asleep, monkeypatch):
    """It was taken already, so it is answered; and whom it would have woken is woken all the same."""
    interrupt, slept = threading.Event(), Waiting.sleep

    def sleep(waiting):
        if waiting is asleep.waiting[0]:
            interrupt.wait(30)
            raise KeyboardInterrupt
        slept(waiting)

    monkeypatch.setattr(Waiting, "sleep", sleep)
    batch = start(asleep)
    interrupt.set()
    asleep.threads[0].join(30)
    assert asleep.waiting[0].gone
    asleep.answer(batch)
    asleep.all_go_on()


def test_who_is_interrupted_as_it_is_woken_wakes_the_next(asleep, monkeypatch):
    slept = Waiting.sleep

    def sleep(waiting):
        slept(waiting)
        if waiting is asleep.waiting[0]:
            raise KeyboardInterrupt

    monkeypatch.setattr(Waiting, "sleep", sleep)
    asleep.answer(start(asleep))
    asleep.all_go_on()


def test_a_wake_up_that_was_lost_is_noticed(asleep, monkeypatch):
    monkeypatch.setattr(queue_module, "_LOOK", 0.01)
    monkeypatch.setattr(Queue, "_pass_on", lambda queue: None)
    asleep.answer(start(asleep))
    asleep.all_go_on()


@pytest.mark.parametrize(("slow", "woken"), [(3600, 1), (-1, 3)])
def test_where_waking_one_another_takes_long_all_are_woken_at_once(asleep, monkeypatch, slow, woken):
    monkeypatch.setattr(queue_module, "_SLOW", slow)
    asleep.answer([asleep.leader, *asleep.waiting])
    assert sum(not each._asleep.locked() for each in asleep.waiting) == woken


def test_the_leader_waits_for_those_who_were_just_answered_and_not_for_long(asleep, monkeypatch):
    monkeypatch.setattr(queue_module, "_MOMENT", 30)
    asleep.queue._crowd = 4
    leader = threading.Thread(target=asleep.queue.settle, daemon=True)
    leader.start()
    while asleep.queue._gate is None:
        time.sleep(0.002)
    for thread in asleep.threads:
        thread.start()
    leader.join(20)
    assert not leader.is_alive()
    asleep.queue.take(batch := [])
    assert len(batch) == 4
    monkeypatch.setattr(queue_module, "_MOMENT", 0.001)
    asleep.answer(batch)
    asleep.all_go_on()
    asleep.queue.enter(again := Waiting(None, writes=False))
    asleep.queue.settle()
    asleep.queue.take(batch := [])
    assert batch == [again]
