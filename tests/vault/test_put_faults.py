"""Power cuts, full disks and races: whatever happens to a put, a rotation or a shred, the room is valid afterwards."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sqlite3
import threading
import time
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from strongroom.client import Room
from strongroom.errors import BackendError, Conflict, Denied, NotFound, StrongroomError, Truncated, UsageError
from strongroom.formats.entry import Entry
from strongroom.ledger.log import Draft
from strongroom.storage.reader import ImageReader
from strongroom.vault import packing
from strongroom.vault.fsck import fsck
from strongroom.vault.source import ModelSource
from strongroom.vault.sourcefile import Signature
from strongroom.vault.vault import Vault
from vault.rooms import NAME, OWNER, REF, House, clone, original, recorded, write_model

BODY = 60_000  # bytes of a pack here: two to four packs of each kind
NEXT = f"{NAME}@2"


@pytest.fixture
def small_packs(monkeypatch):
    monkeypatch.setattr(packing, "PACK_BODY", BODY)


@pytest.fixture
def ground(pristine, tmp_path):
    """Copies of the room with acme/tiny@1 in it, each used up by one accident."""

    class Ground:
        count = 0

        def fresh(self) -> Path:
            pristine.close()
            self.count += 1
            return Path(shutil.copytree(pristine.folder, tmp_path / f"room{self.count}"))

        def clear(self, folder: Path) -> None:
            shutil.rmtree(folder)

    return Ground()


def consistent(house: House) -> None:
    """Nothing in the room is damaged, and it is as its log says."""
    assert fsck(house.vault).problems == []
    recorded(house)


def sound(house: House, *, readable: dict[str, bytes]) -> None:
    """Nothing in the room is damaged, and exactly these versions are in it and read as they should."""
    consistent(house)
    active = {info.ref for info in house.vault.ls() if info.state == "active"}
    assert active == set(readable)
    for ref, image in readable.items():
        report = house.vault.verify(ref, deep=True)
        assert report.ok, report.problems
        assert_marked(house, ref, image)


def assert_marked(house: House, ref: str, image: bytes) -> None:
    """What the owner reads has the size of the original, and its unmarked bytes."""
    reader = house.reader(ref)
    layout, read = reader.layout, reader.read_all()
    assert len(read) == len(image)
    for number in range(len(layout.stripes)):
        segment = layout.common_segment(number)
        assert read[segment.start : segment.end] == image[segment.start : segment.end]


def tidied(house: House) -> None:
    """After a repair nothing is left that nothing refers to."""
    fsck(house.vault, repair=True)
    house.vault.blobs.sweep(0.0)
    report = fsck(house.vault)
    assert (report.problems, report.orphans, report.pending, report.leftovers) == ([], [], [], 0)
    recorded(house)


def every_step(doom, ground, job: dict[str, object]):
    """Rooms in which `job` was killed before its 1st, 2nd, 3rd … change, until it gets to its end.

    How many changes it makes depends a little on how its threads meet: it ends when it got to its end a few times.
    """
    ended = 0
    for kill_at in range(1, 2000):
        folder = ground.fresh()
        outcome = doom(**{"room": folder, "pack_body": BODY, **job, "kill_at": kill_at})
        if outcome["killed"]:
            yield kill_at, folder
        else:
            assert "result" in outcome, outcome
            ended += 1
        ground.clear(folder)
        if ended == 3:
            return
    pytest.fail("it never ended")


def interrupted(doom, folder: Path, *, packs: int = 2, **job: object) -> None:
    """A put or rotation in this room was killed, maybe more than once, after at least so many packs were noted."""
    for kill_at in range(1, 50):
        defaults = {"do": "put", "room": folder, "pack_body": BODY, "counted": ["committed"]}
        outcome = doom(**{**defaults, **job}, kill_at=kill_at)
        assert outcome["killed"], outcome
        with sqlite3.connect(folder / "room.db") as connection:
            (count,) = connection.execute("SELECT count(*) FROM put_packs").fetchone()
        connection.close()
        if count >= packs:
            return
    pytest.fail("no pack was ever journalled")


class TestPutKilled:
    @pytest.mark.parametrize("torn", [False, True])
    def test_at_every_step(self, doom, ground, other_source, monkeypatch, torn):
        """Before each change; torn: in the middle of each write."""
        monkeypatch.setattr(packing, "PACK_BODY", 2 * BODY)
        steps, resumed, second = 0, 0, b""
        job = {"do": "put", "source": other_source, "pack_body": 2 * BODY, "torn": torn}
        if torn:
            job["counted"] = ["write"]
        for _, folder in every_step(doom, ground, job):
            steps += 1
            house = House(folder)
            appeared = [info.ref for info in house.vault.ls()] == [REF, NEXT]
            consistent(house)
            if not appeared:
                assert [info.ref for info in house.vault.ls()] == [REF]
            result = house.put(other_source)
            resumed += result.resumed_packs
            assert result.ref == (f"{NAME}@3" if appeared else NEXT)
            second = second or original(house, NEXT, other_source)
            assert house.vault.verify(REF).ok
            for ref in {NEXT, result.ref}:
                assert house.vault.verify(ref, deep=True).ok
            assert_marked(house, result.ref, second)
            tidied(house)
            house.close()
        assert steps > (6 if torn else 50)
        assert resumed > steps / 2

    @pytest.mark.parametrize("counted", [("commit", "committed"), ("commit", "committed", "reading", "read")])
    def test_at_every_commit(self, doom, ground, other_source, small_packs, counted):
        """Before and after each: the version is there after the last one that writes, and not before it."""
        appeared = []
        for kill_at in range(1, 100):
            folder = ground.fresh()
            job = {"do": "put", "room": folder, "source": other_source, "counted": counted}
            outcome = doom(**job, pack_body=BODY, kill_at=kill_at)
            house = House(folder)
            appeared.append([info.ref for info in house.vault.ls()] == [REF, NEXT])
            consistent(house)
            assert not appeared[-1] or house.vault.verify(NEXT, deep=True).ok
            house.close()
            ground.clear(folder)
            if not outcome["killed"]:
                break
        else:
            pytest.fail("it never ended")
        before = appeared.index(True)
        assert all(appeared[before:])
        if "read" in counted:
            # The log is read and published after the commit, and nothing depends on that.
            assert before > 15
            assert len(appeared) - before > 2
        else:
            assert before > 12
            assert len(appeared) - before == 2

    def test_again_and_again(self, doom, ground, source, other_source, small_packs, tmp_path):
        """Each attempt is killed a few packs on; what is durable is kept, so it ends."""
        folder, log = ground.fresh(), tmp_path / "nonces"
        job = {"do": "put", "room": folder, "source": other_source, "pack_body": BODY, "nonces": log}
        kept = []
        for attempt in range(40):
            doom(**job, kill_at=25 + 5 * (attempt % 5))
            with sqlite3.connect(folder / "room.db") as connection:
                kept.append(connection.execute("SELECT count(*) FROM put_packs").fetchone()[0])
                versions = connection.execute("SELECT count(*) FROM versions").fetchone()[0]
            connection.close()
            if versions == 2:
                break
        assert kept.pop() == 0
        assert kept == sorted(kept)
        assert len(kept) >= 3
        house = House(folder)
        assert house.vault.verify(NEXT, deep=True).ok
        tidied(house)
        house.close()
        no_nonce_twice(log)

    def test_at_any_moment(self, doom, ground, source, other_source, small_packs):
        """By the clock, so that it also falls inside the database's own writes."""
        for turn in range(12):
            folder = ground.fresh()
            job = {"do": "put", "room": folder, "source": other_source, "pack_body": BODY}
            doom(**job, kill_after=0.012 * (turn + 1))
            house = House(folder)
            consistent(house)
            assert house.vault.verify(REF, deep=True).ok
            house.put(other_source)
            for info in house.vault.ls():
                assert house.vault.verify(info.ref, deep=True).ok
            tidied(house)
            house.close()
            ground.clear(folder)

    def test_no_nonce_is_used_twice(self, doom, ground, other_source, tmp_path, small_packs):
        """Every pair of key and nonce, over kills, resumed puts and rotations of one room."""
        folder, log = ground.fresh(), tmp_path / "nonces"
        common = {"room": folder, "pack_body": BODY, "nonces": log}
        put = {"do": "put", "source": other_source, **common}
        for kill_at in (22, 40, 31, 60, 0):
            doom(**put, kill_at=kill_at)
        for kill_at in (30, 45, 25, 70, 0):
            doom(do="rotate", ref=NEXT, **common, kill_at=kill_at)
        doom(do="keystore_rotate", **common)
        house = House(folder)
        assert house.vault.find(NEXT).revision > 1
        assert house.vault.verify(NEXT, deep=True).ok
        house.close()
        assert no_nonce_twice(log) > 300

    def test_a_release_that_fills_packs_otherwise_starts_over(self, doom, ground, other_source, monkeypatch):
        folder = ground.fresh()
        interrupted(doom, folder, source=other_source)
        monkeypatch.setattr(packing, "PACK_BODY", 2 * BODY)
        house = House(folder)
        house.put(other_source)
        assert house.vault.verify(NEXT, deep=True).ok
        tidied(house)
        house.close()

    def test_room_key_rotated_before_it_is_resumed(self, doom, ground, other_source, small_packs):
        folder = ground.fresh()
        interrupted(doom, folder, source=other_source)
        house = House(folder)
        house.vault.keys.rotate()
        assert house.put(other_source).resumed_packs > 0
        assert house.vault.verify(NEXT, deep=True).ok
        house.close()

    def test_a_durable_pack_lost_before_it_is_resumed(self, doom, ground, other_source, small_packs):
        """Somebody tidied the store by hand: that pack is made again, with another identifier."""
        folder = ground.fresh()
        interrupted(doom, folder, source=other_source)
        house = House(folder)
        packs = house.sql("SELECT pack_id FROM put_packs")
        for (pack,) in packs:
            (house.store / f"packs/{pack[:2]}/{pack}").unlink()
        assert house.put(other_source).resumed_packs == 0
        assert house.vault.verify(NEXT, deep=True).ok
        tidied(house)
        house.close()

    def test_repair_drops_an_interrupted_put(self, doom, ground, other_source, small_packs):
        folder = ground.fresh()
        interrupted(doom, folder, source=other_source)
        house = House(folder)
        before = len(house.objects())
        report = fsck(house.vault)
        assert [(job["name"], job["running"]) for job in report.pending] == [(NAME, False)]
        assert not report.repaired
        assert len(house.objects()) == before
        tidied(house)
        assert len(house.objects()) == 4
        assert house.put(other_source).resumed_packs == 0
        house.close()


def no_nonce_twice(log: Path) -> int:
    lines = log.read_text().splitlines()
    pairs = Counter(line.split()[0] for line in lines)
    assert [pair for pair, count in pairs.items() if count > 1] == []
    return len(pairs)


class TestDurability:
    def test_everything_is_durable_before_it_is_recorded(self, doom, ground, other_source, tmp_path):
        """A power cut keeps only what was synced: the order of the calls, as they were made."""
        folder, trace = ground.fresh(), tmp_path / "trace"
        outcome = doom(do="put", room=folder, source=other_source, pack_body=BODY, trace=trace)
        threads, calls = [], []
        for line in trace.read_text().splitlines():
            thread, *call = json.loads(line)
            threads.append(thread)
            calls.append(tuple(call))
        assert outcome["result"]["ref"] == NEXT
        links = {
            (source, target): at
            for at, (name, source, target, *_) in enumerate(c for c in pad(calls))
            if name == "link"
        }
        new = [target for _, target in links]
        assert len(new) >= 8
        for (temporary, target), at in links.items():
            writes = [k for k, (name, path, *_) in enumerate(pad(calls)) if name == "write" and path == temporary]
            syncs = [k for k, (name, path, *_) in enumerate(pad(calls)) if name == "fsync" and path == temporary]
            assert max(writes) < max(syncs) < at
            folders = [
                k
                for k, (name, path, *_) in enumerate(pad(calls))
                if name == "fsync" and path == str(Path(target).parent)
            ]
            # By the thread that wrote it: packs are written side by side, and what another one commits meanwhile is
            # about another pack.
            recorded = [
                k
                for k, (name, *_) in enumerate(pad(calls))
                if name == "commit" and k > at and threads[k] == threads[at]
            ]
            assert any(at < k < recorded[0] for k in folders), target
        # The folders on the way there, too.
        for k, (name, path, *_) in enumerate(pad(calls)):
            if name == "mkdir" and "/packs" in path:
                assert any(n == "fsync" and p == str(Path(path).parent) for n, p, *_ in pad(calls)[k:])


def pad(calls: list[tuple[object, ...]]) -> list[tuple[object, ...]]:
    return [(*call, None, None)[:3] for call in calls]


class TestSourceChanges:
    @pytest.fixture
    def model(self, tmp_path):
        return write_model(tmp_path / "model", seed=5)

    def changed(self, path: Path, at: int) -> None:
        data, before = bytearray(path.read_bytes()), path.stat().st_ctime_ns
        data[at] ^= 0x01
        while path.stat().st_ctime_ns == before:  # some kernels' clocks tick every few milliseconds
            path.write_bytes(data)

    def test_between_kill_and_resume(self, doom, ground, model, small_packs):
        """It is another source now: the put starts over, and stores that."""
        folder = ground.fresh()
        interrupted(doom, folder, source=model)
        self.changed(model / "model-00001-of-00002.safetensors", 70_000)
        house = House(folder)
        result = house.put(model)
        assert (result.ref, result.resumed_packs) == (NEXT, 0)
        report = house.vault.verify(NEXT, deep=True)
        assert report.ok
        assert_marked(house, NEXT, original(house, NEXT, model))
        # One that began after the other was killed has gone on with what that had begun.
        assert len(fsck(house.vault).pending) <= 1
        tidied(house)
        house.close()

    @pytest.mark.parametrize(("file", "at"), [("config.json", 20), ("model-00001-of-00002.safetensors", 900)])
    def test_between_kill_and_resume_unseen_by_the_file_system(
        self, doom, ground, model, small_packs, monkeypatch, file, at
    ):
        """Size, inode and times are as before (a clock set back, a careless copy): the content tells. What was stored
        is not mixed with what is there now."""
        of = Signature.of
        monkeypatch.setattr(Signature, "of", lambda status: of(status)._replace(mtime_ns=0, ctime_ns=0))
        folder = ground.fresh()
        interrupted(doom, folder, source=model, blind=True)
        self.changed(model / file, at)
        house = House(folder)
        with pytest.raises(Conflict) as caught:
            house.put(model)
        assert caught.value.code == "source.changed"
        assert [info.ref for info in house.vault.ls()] == [REF]
        report = fsck(house.vault)
        assert (report.problems, report.pending) == ([], [])
        result = house.put(model)
        assert (result.ref, result.resumed_packs) == (NEXT, 0)
        assert house.vault.verify(NEXT, deep=True).ok
        assert_marked(house, NEXT, original(house, NEXT, model))
        tidied(house)
        house.close()

    def test_unseen_but_beyond_what_was_stored(self, doom, ground, model, small_packs, monkeypatch):
        """Then nothing is mixed: the part that was stored is the same in both."""
        of = Signature.of
        monkeypatch.setattr(Signature, "of", lambda status: of(status)._replace(mtime_ns=0, ctime_ns=0))
        folder = ground.fresh()
        interrupted(doom, folder, source=model, blind=True)
        shard = model / "model-00002-of-00002.safetensors"
        self.changed(shard, shard.stat().st_size - 1)
        house = House(folder)
        assert house.put(model).resumed_packs > 0
        assert house.vault.verify(NEXT, deep=True).ok
        assert_marked(house, NEXT, original(house, NEXT, model))
        house.close()

    @pytest.mark.parametrize("how", ["early", "late", "appended", "truncated", "replaced", "deleted", "link"])
    def test_during_the_put(self, house, model, small_packs, how):
        shard = model / "model-00002-of-00002.safetensors"
        done = []

        def change(_done: int, _total: int) -> None:
            if done:
                return
            done.append(how)
            match how:
                case "early":
                    self.changed(model / "config.json", 20)
                case "late":
                    self.changed(shard, 50_000)
                case "appended":
                    with shard.open("ab") as file:
                        file.write(b"more")
                case "truncated":
                    os.truncate(shard, 40_000)
                case "replaced":
                    shutil.copy(shard, model / "copy")
                    (model / "copy").rename(shard)
                case "deleted":
                    shard.unlink()
                case "link":
                    shard.rename(model.parent / "elsewhere")
                    shard.symlink_to(model.parent / "elsewhere")

        before = set(house.objects())
        with pytest.raises(Conflict) as caught:
            house.vault.put(ModelSource.scan(model), NAME, by=OWNER, share="1/2", progress=change)
        assert caught.value.code == "source.changed"
        assert done
        assert [info.ref for info in house.vault.ls()] == [REF]
        report = fsck(house.vault)
        assert (report.problems, report.pending, report.orphans) == ([], [], [])
        assert set(house.objects()) == before

    def test_a_source_that_can_not_be_read(self, house, model, monkeypatch):
        """A bad sector under the source is the source's fault, and said so."""
        preadv = os.preadv

        def failing(descriptor: int, buffers: object, offset: int) -> int:
            if "model-00002" in Path(f"/proc/self/fd/{descriptor}").readlink().name and offset > 4096:
                raise OSError(5, "Input/output error")
            return preadv(descriptor, buffers, offset)

        source = ModelSource.scan(model)
        monkeypatch.setattr(os, "preadv", failing)
        with pytest.raises(UsageError) as caught:
            house.vault.put(source, NAME, by=OWNER)
        assert caught.value.code == "source.unreadable"
        monkeypatch.undo()
        assert house.put(model).ref == NEXT
        assert house.vault.verify(NEXT, deep=True).ok


class TestTogether:
    def test_two_puts_of_the_same_source_under_the_same_name(self, doom, ground, other_source):
        folder = ground.fresh()
        job = {"do": "put", "room": folder, "source": other_source, "pack_body": BODY}
        outcomes = doom.all(*[job] * 3)
        refs = sorted(outcome["result"]["ref"] for outcome in outcomes)
        assert refs == [f"{NAME}@{number}" for number in (2, 3, 4)]
        house = House(folder)
        for ref in refs:
            assert house.vault.verify(ref, deep=True).ok
        ids = house.sql("SELECT DISTINCT version_id FROM versions")
        assert len(ids) == 4
        tidied(house)
        house.close()

    def test_two_that_both_could_resume(self, doom, ground, other_source):
        """One goes on where the killed one was; the other starts its own."""
        folder = ground.fresh()
        job = {"do": "put", "room": folder, "source": other_source, "pack_body": BODY}
        interrupted(doom, folder, source=other_source)
        outcomes = doom.all(job, job)
        assert sorted(outcome["result"]["ref"] for outcome in outcomes) == [NEXT, f"{NAME}@3"]
        house = House(folder)
        for outcome in outcomes:
            assert house.vault.verify(outcome["result"]["ref"], deep=True).ok
        tidied(house)
        house.close()

    def test_one_killed_while_the_other_goes_on(self, doom, ground, other_source):
        folder = ground.fresh()
        job = {"do": "put", "room": folder, "source": other_source, "pack_body": BODY}
        killed, done = doom.all({**job, "kill_at": 60}, job)
        assert killed["killed"]
        assert done["result"]["ref"] == NEXT
        house = House(folder)
        assert house.vault.verify(NEXT, deep=True).ok
        # One that began after the other was killed has gone on with what that had begun.
        assert len(fsck(house.vault).pending) <= 1
        tidied(house)
        house.close()

    def test_two_rooms(self, doom, ground, source, other_source):
        one, two = ground.fresh(), ground.fresh()
        outcomes = doom.all(
            {"do": "put", "room": one, "source": other_source, "pack_body": BODY},
            {"do": "put", "room": two, "source": other_source, "pack_body": BODY},
            {"do": "put", "room": one, "source": source, "name": "acme/same", "pack_body": BODY},
        )
        assert [outcome["result"]["ref"] for outcome in outcomes] == [NEXT, NEXT, "acme/same@1"]
        for folder in (one, two):
            house = House(folder)
            for info in house.vault.ls():
                assert house.vault.verify(info.ref, deep=True).ok
            house.close()

    def test_two_rotations_of_one_version(self, doom, ground, pristine, source):
        """The slower one must not write over what the faster one has published."""
        for _ in range(4):
            folder = ground.fresh()
            job = {"do": "rotate", "room": folder, "ref": REF, "pack_body": BODY}
            outcomes = doom.all(*[job] * 3)
            done = [outcome["result"]["revision"] for outcome in outcomes if "result" in outcome]
            refused = [outcome["error"]["code"] for outcome in outcomes if "error" in outcome]
            assert done
            assert set(refused) <= {"rotate.busy", "rotate.raced", "manifest.missing", "pack.missing"}
            house = House(folder)
            assert house.vault.find(REF).revision == 1 + len(done)
            sound(house, readable={REF: original(pristine, REF, source)})
            tidied(house)
            house.close()
            ground.clear(folder)

    def test_one_who_is_interrupted_while_waiting_holds_nobody_up(self, house):
        """Ctrl-C in a thread that waits for its turn to append: it appends nothing, and nobody waits for it."""
        ledger, going, go = house.vault.custodian.ledger, threading.Event(), threading.Event()

        def login(_tx, _state, now):
            return Draft(Entry("refused", now, OWNER, "", {"action": "x", "code": "x.y", "rule": ""}))

        def slow(tx, state, now):
            going.set()
            go.wait(30)
            return login(tx, state, now)

        def interrupt(*_):
            go.set()
            raise KeyboardInterrupt

        before = ledger.checkpoint()[0].size
        first = threading.Thread(target=lambda: ledger.append(slow))
        first.start()
        assert going.wait(30)

        def kill():
            while not ledger._queue.waiting:
                time.sleep(0.002)
            os.kill(os.getpid(), signal.SIGUSR1)

        old = signal.signal(signal.SIGUSR1, interrupt)
        try:
            threading.Thread(target=kill).start()
            with pytest.raises(KeyboardInterrupt):
                ledger.append(login)
        finally:
            signal.signal(signal.SIGUSR1, old)
        first.join(30)
        done = []
        last = threading.Thread(target=lambda: done.append(ledger.append(login)), daemon=True)
        last.start()
        last.join(30)
        assert done, "it waits for somebody who has gone"
        assert ledger.checkpoint()[0].size == before + 2
        recorded(house)

    def test_repair_while_somebody_puts(self, house, other_source, small_packs):
        """What is being written is never taken for an orphan."""
        reports = []

        def repair(_done: int, _total: int) -> None:
            reports.append(fsck(house.vault, repair=True))

        result = house.vault.put(ModelSource.scan(other_source), NAME, by=OWNER, share="1/2", progress=repair)
        assert [report.repaired for report in reports] == [False] * len(reports)
        assert all(report.pending[0]["running"] for report in reports)
        assert house.vault.verify(result.ref, deep=True).ok
        tidied(house)

    def test_shred_while_it_is_rotated(self, house, small_packs):
        done = []

        def shred(_done: int, _total: int) -> None:
            if not done:
                done.append(house.vault.shred(REF, confirm=REF, by=OWNER))

        with pytest.raises(Conflict) as caught:
            house.vault.rotate(REF, by=OWNER, progress=shred)
        assert caught.value.code == "rotate.raced"
        assert done
        assert house.sql("SELECT count(*) FROM puts WHERE record IS NOT NULL") == [(0,)]
        tidied(house)
        assert house.objects() == {}

    @pytest.mark.parametrize("database_too", [False, True])
    def test_a_rotation_that_the_store_refuses_says_so_and_is_continued(
        self, house, small_packs, monkeypatch, database_too
    ):
        """It was raced by nobody: the error is the store's own, and what is durable is kept for the next time."""
        write, written = house.vault.blobs.write, []

        def fails(name, chunks):
            if len(written) == 2:
                if database_too:
                    patch.setattr(house.vault.db, "reading", no_database)
                raise BackendError("store.full", "no space is left")
            written.append(name)
            return write(name, chunks)

        def no_database():
            raise BackendError("db.unreachable", "the database is gone, too")

        with monkeypatch.context() as patch:
            patch.setattr(house.vault.blobs, "write", fails)
            with pytest.raises(BackendError) as caught:
                house.vault.rotate(REF, by=OWNER)
        assert caught.value.code == "store.full"
        assert house.sql("SELECT count(*) FROM puts") == [(1,)]
        kept = set(house.objects())
        assert set(written) <= kept
        house.vault.rotate(REF, by=OWNER)
        assert set(written) <= set(house.objects()), "the packs of the first attempt are part of the revision"
        assert house.vault.verify(REF, deep=True).ok
        tidied(house)


class TestBackends:
    def test_disk_full(self, doom, ground, other_source, tmp_path):
        """A real disk that is too small for the store, then less so, then large enough."""
        folder = ground.fresh()
        sizes = ["400k", "480k", "560k", "64m"]
        outcome = doom(do="full", room=folder, place=folder / "store", source=other_source, pack_body=BODY, sizes=sizes)
        if outcome.get("errno") == 1:
            pytest.skip("this user may not mount anything")
        assert "result" in outcome, outcome
        *full, done = outcome["result"]
        assert [step["error"]["code"] for step in full] == ["store.full"] * 3
        assert {step["kind"] for step in full} == {"BackendError"}
        for step in full:
            assert step["versions"] == [REF]
            assert step["verified"] == [True]
            assert step["fsck"]["ok"]
            assert step["fsck"]["leftovers"] == 0
        assert done["result"]["ref"] == NEXT
        assert done["result"]["resumed_packs"] > 0
        assert done["verified"] == [True, True]

    def test_disk_full_for_the_whole_room(self, doom, ground, other_source):
        """Store, database and locks on the same small disk."""
        folder = ground.fresh()
        sizes = ["560k", "580k", "600k", "620k", "640k", "680k", "720k", "780k", "64m"]
        outcome = doom(do="full", room=folder, place=folder, source=other_source, pack_body=BODY, sizes=sizes)
        if outcome.get("errno") == 1:
            pytest.skip("this user may not mount anything")
        assert "result" in outcome, outcome
        *full, done = outcome["result"]
        assert all("oserror" not in step for step in full), full
        codes = {step["error"]["code"] for step in full if "error" in step}
        assert codes
        assert codes <= {"store.full", "db.full", "room.unwritable", "db.failed", "db.unreachable"}, codes
        assert all(all(step["verified"]) and step["fsck"]["ok"] for step in [*full, done])
        assert "result" in done

    def test_quota(self, doom, ground, other_source, small_packs):
        """No file may grow beyond a size: a pack can't be written, and no half of it stays."""
        folder = ground.fresh()
        outcome = doom(do="put", room=folder, source=other_source, pack_body=1 << 20, file_size=150_000)
        assert outcome["error"]["code"] == "store.full"
        house = House(folder)
        assert [info.ref for info in house.vault.ls()] == [REF]
        consistent(house)
        assert house.vault.blobs.leftovers() == []
        assert house.put(other_source).ref == NEXT
        assert house.vault.verify(NEXT, deep=True).ok
        house.close()

    @pytest.mark.parametrize("how", ["no folder", "no database"])
    def test_what_can_not_be_published_is_recorded_all_the_same(self, house, other_source, monkeypatch, how):
        """Once it is durable a put, a rotation and a shred have been done, and are not said to have failed."""
        shutil.rmtree(house.folder / "log")
        with monkeypatch.context() as patch:
            if how == "no folder":
                (house.folder / "log").write_bytes(b"")
            else:
                patch.setattr(house.vault.custodian.ledger, "entries", self.gone)
            assert house.put(other_source).ref == NEXT
            assert house.vault.rotate(NEXT, by=OWNER)["revision"] == 2
            assert house.vault.shred(REF, confirm=REF, by=OWNER)["ref"] == REF
            assert not (house.folder / "log" / "checkpoint").exists()
        if how == "no folder":
            (house.folder / "log").unlink()
        consistent(house)

    def gone(self, *_):
        raise BackendError("db.unreachable", "the database is gone")

    def test_a_read_only_store(self, doom, ground, other_source):
        folder = ground.fresh()
        outcome = doom(do="read_only", room=folder, place=folder / "store", source=other_source)
        if outcome.get("errno") == 1:
            pytest.skip("this user may not mount anything")
        result = outcome["result"]
        assert (result["kind"], result["error"]["code"]) == ("BackendError", "store.read_only")
        assert result["versions"] == [REF]
        assert result["verified"] == [True]
        assert result["fsck"]["ok"]
        house = House(folder)
        assert house.put(other_source).ref == NEXT
        house.close()

    def test_short_reads_and_writes(self, ground, other_source, monkeypatch):
        """A network file system may move fewer bytes than asked: every call is made to."""
        preadv, pread, write = os.preadv, os.pread, os.write
        house = House(ground.fresh())
        turns = iter(range(1, 10**9))

        def short_preadv(descriptor: int, buffers: object, offset: int) -> int:
            (buffer,) = buffers
            return preadv(descriptor, [memoryview(buffer)[: 1 + next(turns) % 3001]], offset)

        monkeypatch.setattr(os, "preadv", short_preadv)
        monkeypatch.setattr(os, "pread", lambda fd, size, at: pread(fd, min(size, 1 + next(turns) % 101), at))
        monkeypatch.setattr(os, "write", lambda fd, data: write(fd, memoryview(data)[: 1 + next(turns) % 5003]))
        result = house.put(other_source)
        read = house.read(result.ref)
        assert house.vault.verify(result.ref, deep=True).ok
        monkeypatch.undo()
        assert read == house.read(result.ref)
        assert_marked(house, result.ref, original(house, result.ref, other_source))
        house.close()

    def test_a_store_that_answers_slowly_and_out_of_order(self, house):
        class Slow:
            def __init__(self, blobs: object) -> None:
                self._blobs, self._turn, self._lock = blobs, 0, threading.Lock()

            def __getattr__(self, name: str) -> object:
                return getattr(self._blobs, name)

            def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
                with self._lock:
                    self._turn += 1
                    turn = self._turn
                threading.Event().wait(0.002 * (turn * 7 % 5))
                self._blobs.read_into(name, offset, buffer)

        assert house.reader(blobs=Slow(house.vault.blobs), workers=8).read_all() == house.read()

    @pytest.mark.parametrize("fails", ["ends early", "EIO", "ESTALE", "EMFILE"])
    def test_a_store_that_fails_while_it_is_read(self, house, monkeypatch, fails):
        preadv = os.preadv
        errors = {"EIO": 5, "ESTALE": 116, "EMFILE": 24}
        reader, count = house.reader(), iter(range(10**6))

        def failing(descriptor: int, buffers: object, offset: int) -> int:
            if next(count) < 20:
                return preadv(descriptor, buffers, offset)
            if fails in errors:
                raise OSError(errors[fails], os.strerror(errors[fails]))
            return 0

        out = memoryview(bytearray(b"\xa5" * reader.layout.image))
        monkeypatch.setattr(os, "preadv", failing)
        with pytest.raises(BackendError if fails in errors else Truncated):
            reader.read_into(out)
        assert not any(out)
        if fails in errors:
            with pytest.raises(BackendError):  # it says nothing about the bytes: it is not in the report
                house.vault.verify(REF)
        else:
            assert {problem.kind for problem in house.vault.verify(REF).problems} == {"truncated"}
        monkeypatch.undo()
        assert house.vault.verify(REF).ok


class TestRotateKilled:
    def test_at_every_step(self, doom, ground, pristine, monkeypatch):
        monkeypatch.setattr(packing, "PACK_BODY", 2 * BODY)
        word = pristine.vault.bundle(REF, OWNER).word
        read = pristine.read()
        revisions = Counter()
        for _, folder in every_step(doom, ground, {"do": "rotate", "ref": REF, "pack_body": 2 * BODY}):
            house = House(folder)
            consistent(house)
            assert house.vault.verify(REF, deep=True).ok
            revisions[house.vault.find(REF).revision] += 1
            assert house.read() == read
            house.vault.rotate(REF, by=OWNER)
            assert house.vault.verify(REF).ok
            assert house.vault.bundle(REF, OWNER).word == word
            assert house.read() == read
            tidied(house)
            house.close()
        assert set(revisions) == {1, 2}

    def test_old_bundle_works_until_it_is_done(self, house, small_packs):
        """A reader that is at it while somebody rotates gets the old revision, or an error; never a mixture."""
        old, right = house.vault.bundle(REF, OWNER), house.read()
        reader = ImageReader(house.vault.blobs, old, workers=2)
        assert reader.read_all() == right
        reads = []
        house.vault.rotate(REF, by=OWNER, progress=lambda _done, _total: reads.append(bytes(reader.read_all())))
        assert set(reads) == {right}
        assert house.read() == right
        with pytest.raises(Truncated):
            ImageReader(house.vault.blobs, old)


class TestShred:
    def test_killed_at_every_step(self, doom, ground, pristine, source, small_packs):
        image = original(pristine, REF, source)
        states = Counter()
        for kill_at in range(1, 200):
            folder = ground.fresh()
            outcome = doom(do="shred", room=folder, ref=REF, kill_at=kill_at)
            house = House(folder)
            (info,) = house.vault.ls()
            states[info.state] += 1
            if info.state == "active":
                sound(house, readable={REF: image})
                house.vault.shred(REF, confirm=REF, by=OWNER)
            with pytest.raises(NotFound) as caught:
                house.vault.bundle(REF, OWNER)
            assert caught.value.code == "weights.shredded"
            consistent(house)
            tidied(house)
            assert house.objects() == {}
            house.close()
            ground.clear(folder)
            if not outcome["killed"]:
                break
        assert states["active"] > 0
        assert states["shredded"] > 2

    def test_nothing_opens_it_afterwards(self, house, tmp_path):
        objects = house.objects()
        (record,) = house.sql("SELECT record FROM versions")[0]
        house.vault.shred(REF, confirm=REF, by=OWNER)
        for name, data in objects.items():  # the store never forgot
            (house.store / name).parent.mkdir(parents=True, exist_ok=True)
            (house.store / name).write_bytes(data)
        with pytest.raises(NotFound):
            house.vault.bundle(REF, OWNER)
        with pytest.raises(NotFound):
            house.vault.verify(REF, deep=True)
        # The sealed key is gone from the database's files themselves, while they are still open, too.
        for path in house.folder.glob("room.db*"):
            assert record not in path.read_bytes()
            assert record[100:132] not in path.read_bytes()

    def test_with_an_interrupted_rotation(self, doom, ground):
        """Its journal holds keys, its packs the weights: both go."""
        folder = ground.fresh()
        interrupted(doom, folder, do="rotate", ref=REF)
        house = House(folder)
        ((record,),) = house.sql("SELECT record FROM puts")
        assert len(house.objects()) > 4
        house.vault.shred(REF, confirm=REF, by=OWNER)
        assert house.sql("SELECT * FROM puts") == []
        assert house.sql("SELECT * FROM put_packs") == []
        for path in house.folder.glob("room.db*"):
            assert record not in path.read_bytes()
        tidied(house)
        assert house.objects() == {}
        house.close()

    @pytest.mark.parametrize("kind", ["manifest", "index", "packs"])
    def test_of_a_damaged_version(self, house, kind):
        """What is damaged must be shreddable all the more."""
        for name in house.objects():
            if kind in name:
                (house.store / name).unlink()
        house.vault.shred(REF, confirm=REF, by=OWNER)
        tidied(house)
        assert house.objects() == {}

    def test_given_again_after_the_first_could_not_clean_up(self, house, monkeypatch):
        """The keys are gone at once; what a busy database or a failing store kept goes the next time."""

        def fails(*_args):
            raise BackendError("db.busy", "another process has the database open")

        with monkeypatch.context() as patch:
            patch.setattr(house.vault.db, "scrub", fails)
            patch.setattr(house.vault.blobs, "delete", fails)
            said = house.vault.shred(REF, confirm=REF, by=OWNER)
        assert f"strongroom shred {REF} --confirm {REF}" in said["means"][0]
        assert said["objects_deleted"] == 0
        record = house.sql("SELECT record FROM versions")
        assert record == [(None,)]
        again = house.vault.shred(REF, confirm=REF, by=OWNER)
        assert not any("log still holds" in line for line in again["means"])
        assert "fsck --repair" in again["means"][0]
        tidied(house)
        assert house.objects() == {}

    def test_what_remains(self, house, tmp_path, source):
        """Copies made before do open: of the room with its key, or of a bundle with the ciphertext. Rotating the key
        store and destroying the old key makes the copy of the room useless, too."""
        before = clone(house, tmp_path / "copy")
        bundle, right = house.vault.bundle(REF, OWNER), house.read()
        house.vault.shred(REF, confirm=REF, by=OWNER)
        assert ImageReader(before.vault.blobs, bundle).read_all() == right
        assert before.read() == right
        before.close()
        house.vault.keys.rotate()
        old_key = next((house.folder / "keys").glob("*")).read_bytes()
        for key in (before.folder / "keys").glob("*"):
            key.write_bytes(old_key)  # the copy has the database, not the destroyed key
        with pytest.raises(StrongroomError):
            Vault(before.folder).bundle(REF, OWNER)


class TestKeystoreRotateKilled:
    def test_at_every_step(self, doom, ground, pristine):
        """Either key opens the room, whichever it is; and the rotation can be made again."""
        read = pristine.read()
        epochs = Counter()
        for kill_at in range(1, 100):
            folder = ground.fresh()
            outcome = doom(do="keystore_rotate", room=folder, kill_at=kill_at)
            house = House(folder)
            epochs[house.sql("SELECT key_epoch FROM room")[0][0]] += 1
            assert house.read() == read
            house.vault.keys.rotate()
            house.close()
            house = House(folder)
            assert house.read() == read
            house.close()
            ground.clear(folder)
            if not outcome["killed"]:
                break
        assert set(epochs) == {1, 2}

    def test_onto_another_kind_of_key_store_that_can_not_be_made(self, house):
        read = house.read()
        with pytest.raises(StrongroomError):
            house.vault.keys.rotate("file:nowhere/at/all/room.key")
        assert House(house.folder).read() == read


class TestInitKilled:
    def test_at_every_step(self, doom, tmp_path, source):
        """What is left is a whole room, which its owner can use, or is not taken for one."""
        states = Counter()
        for kill_at in range(1, 200):
            folder = tmp_path / f"new{kill_at}"
            outcome = doom(do="init", room=folder, kill_at=kill_at)
            try:
                house = House(folder)
            except NotFound as error:
                assert error.code == "room.missing"
                states["none"] += 1
            else:
                consistent(house)
                states["room"] += 1
                self.owned(house, source)
                house.close()
            shutil.rmtree(folder, ignore_errors=True)
            if not outcome["killed"]:
                break
        assert states["none"] > 30
        assert states["room"] > 0

    def owned(self, house: House, source: Path) -> None:
        with house.vault.custodian.ledger.view() as state:
            (owner,) = state.principals.values()
            assert (state.room, state.custody) == (house.vault.id.hex(), "solo")
        assert house.vault.identities.ls() == [owner.path] == [OWNER]
        assert house.vault.identities.signer(OWNER).public_key.hex() == owner.key
        assert state.signer == house.vault.keys.signer.public_key.hex()
        assert house.vault.custodian._documents.policies(state.policy).digest == state.policy
        with Room(house.folder) as room:
            assert room.put(source, NAME).ref == REF
            room.load(REF)
        consistent(house)

    @pytest.mark.parametrize("name", ["open", "mkdir", "fsync", "link", "rename"])
    def test_which_failed_can_be_made_again(self, tmp_path, monkeypatch, name):
        """Whatever can't be written: it is an error of ours, nothing is left, and nothing is in the way."""
        folder, failed, made = tmp_path / "room", 0, 0
        for fails_at in range(1, 100):
            with monkeypatch.context() as patch:
                calls = self.breaks(patch, name, fails_at)
                try:
                    vault, _ = Vault.init(folder, owner=OWNER)
                except StrongroomError:
                    failed += 1
                    assert not folder.exists() or list(folder.iterdir()) == []
                    continue
            # What is published of the log may be late: it is made anew.
            house = House(folder)
            consistent(house)
            house.close()
            vault.close()
            shutil.rmtree(folder)
            made += 1
            if len(calls) < fails_at:
                break
        assert failed
        assert made

    def breaks(self, patch: pytest.MonkeyPatch, name: str, fails_at: int) -> list[str]:
        """`os.NAME` fails when it is called for that time, if it would make something; the calls."""
        call, calls = getattr(os, name), []

        def failing(*arguments, **more):
            if name != "open" or arguments[1] & os.O_CREAT:
                calls.append(name)
                if len(calls) == fails_at:
                    raise OSError(28, "No space left on device")
            return call(*arguments, **more)

        patch.setattr(os, name, failing)
        return calls


class TestReleaseKilled:
    def test_at_every_step(self, doom, ground, pristine, tmp_path, monkeypatch):
        """What was recorded stays recorded, and the next release extends what was seen."""
        right = hashlib.sha256(pristine.read()).hexdigest()
        entries = Counter()
        for kill_at in range(1, 200):
            folder, state = ground.fresh(), tmp_path / f"state{kill_at}"
            outcome = doom(do="load", room=folder, ref=REF, state=state, kill_at=kill_at)
            monkeypatch.setenv("STRONGROOM_STATE", str(state))
            house = House(folder)
            consistent(house)
            entries[house.sql("SELECT size FROM log_state")[0][0]] += 1
            for _ in range(2):
                with Room(folder) as room:
                    assert hashlib.sha256(room.reader(REF).read_all()).hexdigest() == right
            consistent(house)
            house.close()
            ground.clear(folder)
            if not outcome["killed"]:
                assert outcome["result"] == right
                break
        first, second = sorted(entries)
        assert second == first + 1
        assert min(entries.values()) > 2


class TestPrincipalAddKilled:
    def test_at_every_step(self, doom, ground):
        """It is registered with the key that this machine has, or it can be added again."""
        states = Counter()
        for kill_at in range(1, 200):
            folder = ground.fresh()
            outcome = doom(do="principal_add", room=folder, path="user/ben", kill_at=kill_at)
            house = House(folder)
            consistent(house)
            with Room(folder, OWNER) as room:
                try:
                    room.principal_add("user/ben")
                    states["added"] += 1
                except Conflict as error:
                    assert error.code == "principal.exists"
                    states["there"] += 1
                key = room.principal_show("user/ben")["key"]
            assert house.vault.identities.signer("user/ben").public_key.hex() == key
            consistent(house)
            house.close()
            ground.clear(folder)
            if not outcome["killed"]:
                break
        assert states["added"] > 5
        assert states["there"] > 2

    def test_a_refusal_leaves_no_key(self, house):
        with Room(house.folder, OWNER) as room:
            room.principal_add("user/ben")
        with Room(house.folder, "user/ben") as room, pytest.raises(Denied):
            room.principal_add("user/cy")
        assert house.vault.identities.ls() == [OWNER, "user/ben"]

    def test_what_may_be_recorded_keeps_its_key(self, house, monkeypatch):
        """The database fails when it commits: nobody knows on which side of it."""
        with Room(house.folder, OWNER) as room:
            sequencing = room._vault.db.sequencing

            @contextmanager
            def uncertain():
                with sequencing() as tx:
                    yield tx
                raise BackendError("db.failed", "the database failed")

            with monkeypatch.context() as patch:
                patch.setattr(room._vault.db, "sequencing", uncertain)
                with pytest.raises(BackendError):
                    room.principal_add("user/ben")
            key = room.principal_show("user/ben")["key"]
        assert house.vault.identities.signer("user/ben").public_key.hex() == key


class TestOriginals:
    def test_are_not_touched(self, doom, ground, other_source):
        files = sorted(path for path in other_source.rglob("*") if path.is_file())
        before = [(path.stat(), path.read_bytes()) for path in files]
        folder = ground.fresh()
        outcome = doom(do="put", room=folder, source=other_source, audit=str(other_source))
        assert outcome["result"]["ref"] == NEXT
        opened = [(path, flags) for path, flags in outcome["opened"] if Path(path).is_file()]
        assert {Path(path).name for path, _ in opened} == {path.name for path in files}
        forbidden = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
        assert [path for path, flags in opened if flags & forbidden] == []
        for path, (stat, data) in zip(files, before, strict=True):
            now = path.stat()
            assert path.read_bytes() == data
            assert (now.st_mtime_ns, now.st_ctime_ns, now.st_ino, now.st_mode, now.st_nlink) == (
                stat.st_mtime_ns,
                stat.st_ctime_ns,
                stat.st_ino,
                stat.st_mode,
                stat.st_nlink,
            )
        assert sorted(path for path in other_source.rglob("*") if path.is_file()) == files

    def test_nor_left_open(self, house, other_source):
        house.put(other_source)
        found = []
        for link in Path("/proc/self/fd").iterdir():
            with suppress(FileNotFoundError):  # of the listing itself, or closed meanwhile
                found.append(link.readlink())
        assert len(found) > 2
        assert not [path for path in found if path.is_relative_to(other_source)]
