"""Appending: durable before it is answered, one order for everybody, nothing believed that the log key has not
signed."""

from __future__ import annotations

import random
import sqlite3
import threading
from contextlib import contextmanager

import pytest
import sqlalchemy as sa

from ledger.logs import KEY, Desk, check_acknowledged, kill_in_the_middle, login
from strongroom.core import canonical
from strongroom.errors import (
    BackendError,
    Denied,
    Forked,
    IntegrityError,
    LimitExceeded,
    NotFound,
    Rollback,
    Sealed,
    StrongroomError,
    Tampered,
    Truncated,
)
from strongroom.formats.entry import Entry, Private
from strongroom.formats.merkle import Frontier, leaf_hash, verify_consistency, verify_inclusion
from strongroom.ledger import log as log_module
from strongroom.ledger.log import Draft, Ledger
from strongroom.policy.state import State
from strongroom.storage.db import log_private, log_snapshot


def check(receipt) -> None:
    """The receipt proves, by itself, that its entry is in the log."""
    checkpoint = KEY.open(receipt.note)
    assert receipt.size == checkpoint.size
    leaf = leaf_hash(receipt.data)
    verify_inclusion(leaf, receipt.index, checkpoint.size, receipt.proof(), checkpoint.root)


def raw(desk: Desk, statement: str, *values: object) -> None:
    with sqlite3.connect(desk.folder / "room.db") as connection:
        assert connection.execute(statement, values).rowcount
    connection.close()


class TestAppending:
    def test_each_entry_has_its_place_and_its_proof(self, desk):
        for number in range(1, 40):
            receipt = desk.log.append(login(number))
            assert receipt.index == number
            check(receipt)
        assert desk.log.checkpoint()[0].size == 40

    def test_what_a_decision_raises_is_raised_and_nothing_recorded(self, desk):
        def refuse(_, __, ___):
            raise Denied("test.no", "no")

        with pytest.raises(Denied):
            desk.log.append(refuse)
        assert desk.log.checkpoint()[0].size == 1

    def test_tables_change_with_the_entry_or_not_at_all(self, desk):
        table = log_module.log_private

        def decide(fail):
            def change(tx, state, now):
                tx.execute(sa.insert(table).values(position=99, name="x", value="y", salt=b"z"))
                if fail:
                    raise Denied("test.no", "no")
                return login(0)(tx, state, now)

            return change

        def count():
            with desk.db.reading() as tx:
                return tx.execute(sa.select(sa.func.count()).select_from(table)).scalar()

        with pytest.raises(Denied):
            desk.log.append(decide(fail=True), writes=True)
        assert count() == 0
        desk.log.append(decide(fail=False), writes=True)
        assert count() == 1

    def test_a_decision_sees_every_entry_before_its_own(self, desk):
        """Two that race: the second is decided on what the first has left."""
        taken = []

        def once(_, state, now):
            if state.latest and taken:
                raise Denied("test.taken", "taken")
            taken.append(1)
            return login(0)(None, state, now)

        outcomes = []

        def run():
            try:
                outcomes.append(desk.log.append(once).index)
            except Denied:
                outcomes.append(None)

        threads = [threading.Thread(target=run) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(outcomes, key=str) == [1, *[None] * 15]

    def test_many_writers_share_batches_and_each_gets_its_own(self, desk):
        receipts, together = [], threading.Barrier(32)

        def run(number):
            together.wait()
            receipts.extend(desk.log.append(login(number * 100 + k)) for k in range(20))

        threads = [threading.Thread(target=run, args=(number,)) for number in range(32)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(receipt.index for receipt in receipts) == list(range(1, 641))
        assert len({receipt.note for receipt in receipts}) < 640
        for receipt in receipts:
            check(receipt)
            assert desk.log.entries(receipt.index, receipt.index + 1) == [receipt.data]

    def test_a_failing_signer_fails_those_who_wait_and_no_others(self, desk):
        broken = [True]

        def signer():
            if broken[0]:
                raise Sealed("keystore.down", "down")
            return log_module.Signer(bytes(32))

        other = desk.ledger()
        other._signer = signer
        with pytest.raises(Sealed):
            other.append(login(1))
        assert desk.log.append(login(2)).index == 1

    def test_a_fault_in_one_decision_does_not_reach_the_others(self, desk):
        barrier = threading.Barrier(8)
        outcomes = []

        def run(number):
            def decide(tx, state, now):
                if number == 3:
                    raise ZeroDivisionError
                return login(number)(tx, state, now)

            barrier.wait()
            try:
                outcomes.append(desk.log.append(decide).index)
            except ZeroDivisionError:
                outcomes.append(-1)

        threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(outcomes) == [-1, 1, 2, 3, 4, 5, 6, 7]

    def test_a_full_database_loses_nothing_that_was_answered(self, desk):
        """SQLite's own limit on pages stands for a full disk: it fails in the middle of a batch, with the same
        error."""
        acknowledged = [desk.log.append(login(number)) for number in range(5)]
        pages = 0

        @sa.event.listens_for(desk.db._engine, "begin")
        def limit(connection):
            if pages:
                connection.exec_driver_sql(f"PRAGMA max_page_count={pages}")

        with desk.db.reading() as tx:
            pages = tx.exec_driver_sql("PRAGMA page_count").scalar()
        desk.db.close()
        with pytest.raises(BackendError) as caught:
            acknowledged.extend(desk.log.append(login(number)) for number in range(10_000))
        assert caught.value.code == "db.full"
        pages = 1 << 30
        desk.db.close()
        last = desk.log.append(login(0))
        assert last.index == len(acknowledged) + 1
        again = desk.ledger()
        assert again.entries(1, last.index) == [receipt.data for receipt in acknowledged]
        assert again.checkpoint()[0].size == last.index + 1


class TestProofs:
    @pytest.mark.parametrize("size", [2, 255, 256, 257, 600])
    def test_of_entries_and_sizes(self, desk, size):
        desk.login(size - 1)
        other = desk.ledger()
        checkpoint, _ = other.checkpoint()
        entries = other.entries(0, size)
        chosen = random.Random(size).sample(range(size), min(size, 20))
        for index in {0, size - 1, *chosen}:
            leaf = leaf_hash(entries[index])
            verify_inclusion(leaf, index, size, other.inclusion(index, size), checkpoint.root)
            before = Frontier()
            before.extend([leaf_hash(data) for data in entries[:index]])
            verify_consistency(index, before.root(), size, checkpoint.root, other.consistency(index, size))

    def test_grow_with_the_logarithm(self, desk):
        desk.login(299)
        assert len(desk.log.inclusion(7, 300)) == 9
        assert len(desk.log.consistency(100, 300)) <= 9

    def test_of_what_is_not_there(self, desk):
        for call in (
            lambda: desk.log.inclusion(1, 1),
            lambda: desk.log.consistency(2, 1),
            lambda: desk.log.inclusion(-1, 1),
        ):
            with pytest.raises(StrongroomError):
                call()


class TestTheDatabaseLies:
    """Whoever writes to the database has no key: whatever they change is seen before anything is decided on it."""

    @pytest.fixture
    def grown(self, desk):
        desk.login(30)
        return desk

    @pytest.mark.parametrize(
        ("statement", "error"),
        [
            ("DELETE FROM log_entries WHERE position = 7", Truncated),
            ("UPDATE log_entries SET entry = X'7b7d' WHERE position = 7", Tampered),
            ("UPDATE log_entries SET entry = 5 WHERE position = 7", Tampered),
            ("UPDATE log_entries SET position = 99 WHERE position = 30", Truncated),
            ("UPDATE log_state SET size = 30", Tampered),
            ("UPDATE log_state SET size = 'many'", Tampered),
            ("UPDATE log_state SET checkpoint = X'00'", Tampered),
        ],
    )
    def test_an_altered_row(self, grown, statement, error):
        raw(grown, statement)
        fresh = grown.ledger(published=False)
        for attempt in (fresh.checkpoint, lambda: fresh.append(login(0))):
            with pytest.raises(error):
                attempt()

    def test_two_entries_swapped(self, grown):
        raw(grown, "UPDATE log_entries SET position = -1 WHERE position = 7")
        raw(grown, "UPDATE log_entries SET position = 7 WHERE position = 8")
        raw(grown, "UPDATE log_entries SET position = 8 WHERE position = -1")
        with pytest.raises(Tampered) as caught:
            grown.ledger(published=False).append(login(0))
        assert caught.value.code == "log.tampered"

    def test_another_logs_checkpoint(self, grown, tmp_path_factory):
        other = Desk(tmp_path_factory.mktemp("other"))
        other.begin()
        other.login(30)
        _, note = other.log.checkpoint()
        raw(grown, "UPDATE log_state SET checkpoint = ?", note)
        with pytest.raises(Tampered):
            grown.ledger(published=False).append(login(0))
        # The process that has seen the true one says what it is.
        with pytest.raises(Forked):
            grown.log.append(login(0))
        other.db.close()

    def test_set_back(self, grown):
        grown.db.close()
        kept = (grown.folder / "room.db").read_bytes()
        grown.login(3)
        grown.log.publish()
        grown.db.close()
        for name in ("room.db-wal", "room.db-shm"):
            (grown.folder / name).unlink(missing_ok=True)
        (grown.folder / "room.db").write_bytes(kept)
        with pytest.raises(Rollback):
            grown.log.append(login(0))
        with pytest.raises(Rollback):  # a process that has just started knows what was published
            grown.ledger().append(login(0))

    def test_not_set_back_when_others_append_and_publish_as_it_is_read(self, grown, monkeypatch):
        """What a transaction shows is older than what is published after it began."""
        fresh, reading = grown.ledger(), grown.db.reading

        @contextmanager
        def slow():
            with reading() as tx:
                tx.exec_driver_sql("SELECT size FROM log_state").one()
                other = Desk(grown.folder)
                other.login()
                other.log.publish()
                other.db.close()
                yield tx

        monkeypatch.setattr(grown.db, "reading", slow)
        with fresh.view() as state:
            assert state is not None
        monkeypatch.undo()
        assert fresh.append(login(0)).index == fresh.checkpoint()[0].size - 1

    def test_all_of_it_gone(self, grown):
        grown.log.publish()
        for table in ("log_entries", "log_state"):
            raw(grown, f"DELETE FROM {table}")
        with pytest.raises(Rollback):
            grown.ledger().append(login(0))

    def test_a_private_value_that_was_replaced(self, desk):
        note = Private.fresh("detail", "192.0.2.7")

        def decide(_, __, now):
            body = {"action": "load", "code": "auth.refused", "rule": ""}
            return Draft(Entry("refused", now, "unknown", "", body, {"detail": note.commitment}), [note])

        receipt = desk.log.append(decide)
        assert desk.log.private(receipt.index, receipt.entry) == {"detail": "192.0.2.7"}
        raw(desk, "UPDATE log_private SET value = '192.0.2.8'")
        with pytest.raises(Tampered):
            desk.log.private(receipt.index, receipt.entry)
        raw(desk, "DELETE FROM log_private")
        assert desk.log.private(receipt.index, receipt.entry) == {}  # redacted: the log stands as it was
        check(receipt)


class TestSnapshots:
    @pytest.fixture
    def grown(self, desk, monkeypatch):
        monkeypatch.setattr(log_module, "_SNAPSHOT_EVERY", 16)
        desk.login(50)
        return desk

    def test_shorten_the_way(self, grown, monkeypatch):
        read = []
        fresh = grown.ledger()
        reading = fresh._read
        monkeypatch.setattr(fresh, "_read", lambda tx, begin, end: read.append(begin) or reading(tx, begin, end))
        assert fresh.checkpoint()[0].size == 51
        assert read
        assert min(read) >= 16
        with fresh.view() as state, grown.log.view() as whole:
            assert state == whole

    def test_one_that_was_forged_is_passed_over(self, grown):
        with grown.db.reading() as tx:
            data = tx.execute(sa.select(log_snapshot.c.data)).scalar()
        envelope = canonical.decode(data)
        for forged in (
            b"",
            b"{}",
            data[:-3],
            data.replace(b'"sig":"', b'"sig":"A', 1),
            canonical.encode(envelope)[:-1],
        ):
            raw(grown, "UPDATE log_snapshot SET data = ?", forged)
            fresh = grown.ledger()
            assert fresh.checkpoint()[0].size == 51
            with fresh.view() as state, grown.log.view() as whole:
                assert state == whole

    def test_one_from_before_a_rollback_shows_it(self, grown):
        """Entries and checkpoint of an older time, and the snapshot of now."""
        raw(grown, "DELETE FROM log_entries WHERE position >= 5")
        raw(grown, "UPDATE log_state SET size = 5")
        with pytest.raises(IntegrityError):
            grown.ledger(published=False).checkpoint()


def test_two_processes_killed_at_random_lose_and_fork_nothing(desk):
    """kill -9 while they append: every acknowledged entry is there, in one order, under a root that was signed."""
    kill_in_the_middle(desk, 4, random.Random(5))
    check_acknowledged(desk, 80)


def test_an_empty_log(tmp_path):
    desk = Desk(tmp_path)
    with pytest.raises(NotFound):
        desk.log.checkpoint()
    with pytest.raises(Tampered):  # the fold refuses what does not begin with genesis
        desk.log.append(login(0))
    desk.begin()
    assert desk.log.checkpoint()[0].size == 1
    desk.db.close()


def test_an_entry_that_is_too_large_leaves_nothing_of_what_was_written_for_it(desk):
    """It is refused after the tables were changed: a version must not appear without its entry."""

    def decide(tx, _, now):
        tx.execute(sa.insert(log_private).values(position=99, name="detail", value="x", salt=bytes(32)))
        return Draft(Entry("refused", now, "unknown", "", {"action": "x" * 70_000, "code": "x", "rule": ""}))

    with pytest.raises(LimitExceeded):
        desk.log.append(decide, writes=True)
    with desk.db.reading() as tx:
        assert not tx.execute(sa.select(log_private.c.position)).all()


def test_who_appends_is_answered_whatever_becomes_of_what_is_published(desk, monkeypatch):
    monkeypatch.setattr(desk.log, "_published_at", -10.0)

    def fails(_):
        raise ZeroDivisionError

    monkeypatch.setattr(desk.published, "publish", fails)
    assert desk.log.append(login(1)).index == 1
    assert desk.ledger().checkpoint()[0].size == 2


@pytest.mark.parametrize("data", [b"", b"x", None])
def test_a_published_checkpoint_that_is_damaged_is_not_passed_over(desk, data):
    """It is what shows that the database was set back: whoever does that could cut off a few of its bytes, too."""
    desk.login(3)
    desk.log.publish()
    path = desk.folder / "log" / "checkpoint"
    path.write_bytes(path.read_bytes()[:-9] if data is None else data)
    with pytest.raises(Tampered) as caught:
        desk.ledger().checkpoint()
    assert caught.value.code == "log.published"
    path.unlink()
    assert desk.ledger().checkpoint()[0].size == 4


def test_a_snapshot_of_another_fold_is_not_believed(desk, monkeypatch):
    monkeypatch.setattr(log_module, "_SNAPSHOT_EVERY", 4)
    desk.login(8)
    read = []
    real = Ledger._read
    monkeypatch.setattr(Ledger, "_read", lambda self, tx, begin, end: read.append(begin) or real(self, tx, begin, end))
    desk.ledger().checkpoint()
    assert min(read, default=9) > 0
    read.clear()
    monkeypatch.setattr(State, "FOLD", State.FOLD + 1)
    desk.ledger().checkpoint()
    assert min(read) == 0
