"""The log on a real PostgreSQL: several custodians on one database, of which one at a time appends."""

from __future__ import annotations

import os
import random
import subprocess
import threading
import time

import pytest
import sqlalchemy as sa

from ledger.logs import KEY, Desk, check_acknowledged, kill_in_the_middle, login
from strongroom.errors import BackendError, Conflict, Rollback, StrongroomError
from strongroom.formats.entry import Entry
from strongroom.formats.merkle import leaf_hash, verify_inclusion
from strongroom.ledger.log import Draft
from strongroom.storage.db import documents, log_entries, log_private

pytestmark = pytest.mark.server


@pytest.fixture
def desk(postgresql_url, tmp_path):
    made = Desk(tmp_path, postgresql_url)
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


def test_entries_go_to_their_positions_or_none_does(desk):
    first = 2**40
    query = sa.select(log_entries).where(log_entries.c.position >= first).order_by(log_entries.c.position)

    def stored():
        with desk.db.reading() as tx:
            return [tuple(row) for row in tx.execute(query)]

    with desk.db.transaction() as tx:
        desk.db.add_entries(tx, first + 2, [b"\x00\xff'\\", b"", b"{}"])
    assert stored() == [(first + 2, b"\x00\xff'\\"), (first + 3, b""), (first + 4, b"{}")]
    with pytest.raises(Conflict), desk.db.transaction() as tx:
        desk.db.add_entries(tx, first, [b"a", b"b", b"c"])
    assert len(stored()) == 3


def test_custodians_killed_at_random_lose_and_fork_nothing(desk):
    kill_in_the_middle(desk, 3, random.Random(7))
    check_acknowledged(desk, 60)


def test_a_connection_that_breaks_is_an_error_of_ours_and_passes(desk, tmp_path):
    desk.login(3)
    other = Desk(tmp_path, desk.url)

    def break_all():
        # Until they are gone, or for a minute: one that was slow to go would break what comes after.
        others = "pg_stat_activity WHERE pid <> pg_backend_pid() AND datname = current_database()"
        with other.db._engine.connect() as connection:
            connection.execute(sa.text(f"SELECT pg_terminate_backend(pid, 60000) FROM {others}"))

    def broken(tx, state, now):
        break_all()
        return login(1)(tx, state, now)

    break_all()
    desk.login(1)  # it is noticed before anything is asked
    with pytest.raises(BackendError):
        desk.log.append(broken)
    desk.login(1)
    assert desk.log.checkpoint()[0].size == 6
    other.db.close()


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


def test_who_reads_undoes_nobody_who_writes(desk, tmp_path):
    """The one anomaly that a reader alone makes: it sees what came after another's snapshot, and not that one's."""
    other, third = Desk(tmp_path, desk.url), Desk(tmp_path, desk.url)
    with desk.db.transaction() as tx:
        assert tx.execute(sa.select(documents.c.digest)).all() == []
        with other.db.transaction() as later:
            later.execute(sa.insert(documents).values(digest="0" * 64, data=b""))
        with third.db.reading() as reading:
            assert len(reading.execute(sa.select(documents.c.digest)).all()) == 1
            assert reading.execute(sa.select(log_private.c.name)).all() == []
        tx.execute(sa.insert(log_private).values(position=1, name="x", value="x", salt=b""))
    other.db.close()
    third.db.close()


def batch_of(desk, decisions):
    """Appends all of `decisions` in one batch, while a first one holds the sequencer up; what each came to."""
    outcomes, going, go = {}, threading.Event(), threading.Event()

    def hold(tx, state, now):
        going.set()
        go.wait(30)
        return login(0)(tx, state, now)

    def run(name, decide, writes):
        try:
            outcomes[name] = desk.log.append(decide, writes=writes).index
        except StrongroomError as error:
            outcomes[name] = error.code

    threads = [threading.Thread(target=run, args=("first", hold, False))]
    threads[0].start()
    assert going.wait(30)
    for name, (decide, writes) in decisions.items():
        threads.append(threading.Thread(target=run, args=(name, decide, writes)))
        threads[-1].start()
    while len(desk.log._queue.waiting) < len(decisions):
        time.sleep(0.01)
    go.set()
    for thread in threads:
        thread.join()
    return outcomes


def noted(tx, state, now):
    """A decision that writes a table besides."""
    tx.execute(sa.insert(log_private).values(position=999, name="detail", value="x", salt=bytes(32)))
    return login(1)(tx, state, now)


def check_after(desk, size):
    """The log is as it was with `size` entries, to this custodian and to one that reads it anew, and goes on."""
    for ledger in (desk.log, desk.ledger()):
        assert ledger.checkpoint()[0].size == size
        assert len(ledger.entries(0, size)) == size
    assert desk.login(1).index == size
    assert desk.ledger().append(login(0)).index == size + 1
    with desk.db.reading() as tx:
        assert not tx.execute(sa.select(log_private.c.position).where(log_private.c.position == 999)).all()


def fill(desk, table, when, *, late=False):
    """From now on the server's own error 53100, where `when` is true of a row: when it is written, or at the commit."""
    raising = "BEGIN RAISE EXCEPTION 'no space left on device' USING ERRCODE = '53100'; END"
    with desk.db._engine.begin() as tx:
        tx.execute(sa.text(f"CREATE FUNCTION no_space() RETURNS trigger LANGUAGE plpgsql AS $${raising}$$"))
        kind, timing = ("CONSTRAINT TRIGGER", "DEFERRABLE INITIALLY DEFERRED ") if late else ("TRIGGER", "")
        event = f"AFTER INSERT OR UPDATE ON {table} {timing}FOR EACH ROW WHEN ({when})"
        tx.execute(sa.text(f"CREATE {kind} no_space {event} EXECUTE FUNCTION no_space()"))


def make_room(desk, table):
    with desk.db._engine.begin() as tx:
        tx.execute(sa.text(f"DROP TRIGGER no_space ON {table}"))


WRITERS = {name: (login(number), False) for number, name in enumerate(("ana", "ben", "eva"))} | {"kim": (noted, True)}


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(("table", "what"), [("log_entries", "position"), ("log_state", "size")])
def test_a_disk_that_is_full_in_the_middle_of_a_batch(desk, table, what, late):
    """The third entry of it, or its checkpoint, can't be stored, or not be committed. Nobody of it is answered."""
    size = desk.login(5).size
    fill(desk, table, f"NEW.{what} >= {size + 3}", late=late)
    outcomes = batch_of(desk, WRITERS)
    assert outcomes.pop("first") == size
    assert outcomes == dict.fromkeys(WRITERS, "db.full")
    make_room(desk, table)
    check_after(desk, size + 1)


def test_a_disk_that_is_full_for_what_one_of_a_batch_writes(desk):
    size = desk.login(5).size
    fill(desk, "log_private", "NEW.position = 999")
    outcomes = batch_of(desk, WRITERS)
    assert outcomes.pop("kim") == "db.full"
    assert sorted(outcomes.values()) == [size, size + 1, size + 2, size + 3]
    make_room(desk, "log_private")
    check_after(desk, size + 4)


def test_a_disk_that_is_full(desk, postgresql_server, tmp_path_factory):
    """A real one: the entries lie in a tablespace of one MiB."""
    disk = tmp_path_factory.mktemp("disk")
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], check=False, capture_output=True
    ).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        owner = postgresql_server.pgdata.stat()
        os.chown(disk, owner.st_uid, owner.st_gid)
        name = f"tiny_{os.urandom(6).hex()}"
        with desk.db._engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(sa.text(f"CREATE TABLESPACE {name} LOCATION '{disk}'"))
            connection.execute(sa.text(f"ALTER TABLE log_entries SET TABLESPACE {name}"))
        size = desk.login(5).size
        large = {f"{number}": (entry_of(60_000), False) for number in range(40)}
        outcomes = batch_of(desk, large)
        assert outcomes.pop("first") == size
        assert outcomes == dict.fromkeys(large, "db.full")
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        check_after(desk, size + 1)
        with desk.db._engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(sa.text("ALTER TABLE log_entries SET TABLESPACE pg_default"))
            connection.execute(sa.text(f"DROP TABLESPACE {name}"))
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def entry_of(size):
    """A decision whose entry has about so many bytes, which no compression makes fewer."""
    body = {"action": os.urandom(size // 2).hex(), "code": "auth.refused", "rule": ""}
    return lambda _, __, now: Draft(Entry("refused", now, "unknown", "", body))


def test_set_back(desk):
    desk.login(5)
    desk.log.publish()
    with desk.db.transaction() as tx:
        tx.execute(sa.text("DELETE FROM log_entries WHERE position > 2"))
        tx.execute(sa.text("UPDATE log_state SET size = 3"))
    for ledger in (desk.log, desk.ledger()):
        with pytest.raises(Rollback):
            ledger.append(login(0))
