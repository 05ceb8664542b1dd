"""A version that is read while somebody else rotates it, shreds it, or rotates the room's key: what an older row of the
database names is gone by then, and nothing is damaged."""

from __future__ import annotations

import contextlib
import threading
from contextlib import contextmanager

import pytest

from strongroom.client import Room
from strongroom.client.receive import receive
from strongroom.crypto.keystores.file import FileKeystore
from strongroom.crypto.release import ReleaseKey
from strongroom.errors import Denied, NotFound, Sealed, StrongroomError
from strongroom.vault import fsck as fsck_module
from strongroom.vault import shred as shred_module
from strongroom.vault import trace
from strongroom.vault.callers import Callers
from strongroom.vault.copies import Copies
from strongroom.vault.fsck import fsck
from strongroom.vault.roomkeys import RoomKeys
from strongroom.vault.vault import Vault
from vault.rooms import OWNER, REF, House


@pytest.fixture
def other(house):
    """The same room, as another process has it."""
    made = House(house.folder)
    yield made
    made.close()


@contextmanager
def between(patch, owner, name, *acts):
    """One of `acts` after each of the first calls of `owner.name`, before its answer is looked at."""
    called, left, acting = getattr(owner, name), list(acts), []

    def late(*args, **named):
        found = called(*args, **named)
        if left and not acting:  # which may call it, too
            acting.append(True)
            left.pop(0)()
            acting.clear()
        return found

    with patch.context() as context:
        context.setattr(owner, name, late)
        yield
    assert not left  # it came to that


READ = {
    "show": lambda house: house.vault.show(REF)["ref"] == REF,
    "bundle": lambda house: len(house.read()) > 0,
    "verify": lambda house: house.vault.verify(REF, deep=True).ok,
    "fsck": lambda house: fsck(house.vault).problems == [],
    "model": lambda house: Callers(house.vault).model(REF).ref == REF,
    "release": lambda house: len(bytes(Room(house.folder, OWNER).reader(REF).read_all())) > 0,
}


@pytest.mark.parametrize("read", READ.values(), ids=READ)
@pytest.mark.parametrize("what", ["rotated", "under another room key", "both"])
def test_is_read_as_it_is_now(house, other, monkeypatch, tmp_path, read, what):
    """Right after its row was read, and once more."""
    monkeypatch.setenv("STRONGROOM_STATE", str(tmp_path / "state"))
    house.vault.keys.room_key  # noqa: B018 - in memory from here on

    def change():
        if what != "rotated":
            other.vault.keys.rotate()
        if what != "under another room key":
            other.vault.rotate(REF, by=OWNER)

    with between(monkeypatch, Vault, "readable", change, change):
        assert read(house)


@pytest.mark.parametrize("read", ["show", "verify", "bundle"])
def test_that_was_shredded_is_said_to_be_so(house, other, monkeypatch, read):
    with (
        pytest.raises(NotFound) as caught,
        between(monkeypatch, Vault, "readable", lambda: other.vault.shred(REF, confirm=REF, by=OWNER)),
    ):
        READ[read](house)
    assert caught.value.code == "weights.shredded"
    assert fsck(house.vault).problems == []


def test_that_is_shredded_as_all_are_checked_is_no_problem(house, other, monkeypatch):
    with between(monkeypatch, Vault, "row", lambda: other.vault.shred(REF, confirm=REF, by=OWNER)):
        report = fsck(house.vault)
    assert report.problems == []


def test_that_is_rotated_as_its_bytes_are_checked_is_checked_anew(packs_house):
    other = House(packs_house.folder)
    done = []

    def progress(_done, _total):
        if not done:
            done.append(other.vault.rotate(REF, by=OWNER))

    report = packs_house.vault.verify(REF, progress=progress)
    other.close()
    assert done
    assert report.problems == []


def test_that_is_shredded_as_all_are_searched_is_left_out(house, other, other_source, monkeypatch):
    house.put(other_source, "acme/other")
    with between(monkeypatch, Vault, "ls", lambda: other.vault.shred(REF, confirm=REF, by=OWNER)):
        assert [each.name for each in trace._records(house.vault, None)] == ["acme/other"]


def test_versions_that_change_as_all_are_checked_are_as_the_log_has_them(house, other, other_source, monkeypatch):
    """Those in the database and those in the log are of one moment."""
    acts = [
        lambda: other.put(other_source, "acme/other"),
        lambda: other.vault.rotate(REF, by=OWNER),
        lambda: other.vault.shred(REF, confirm=REF, by=OWNER),
    ]
    with between(monkeypatch, fsck_module, "_logged", *acts):
        report = fsck(house.vault)
    assert report.problems == []
    assert report.versions == 1


def test_a_job_that_ends_as_the_jobs_are_looked_at_is_none_that_waits(house, other, other_source, monkeypatch):
    begun, go = threading.Event(), threading.Event()

    def progress(_done, _total):
        begun.set()
        assert go.wait(60)

    putting = threading.Thread(target=lambda: other.put(other_source, "acme/other", progress=progress))
    putting.start()
    assert begun.wait(60)
    locked = fsck_module.locked

    def late(path):
        go.set()
        putting.join(60)
        return locked(path)

    monkeypatch.setattr(fsck_module, "locked", late)
    report = fsck(house.vault)
    assert not putting.is_alive()
    assert (report.pending, report.problems) == ([], [])
    assert not any((house.folder / "locks").iterdir())


class TestTheRoomKey:
    def test_that_is_rotated_after_the_room_was_looked_up(self, house, other, monkeypatch):
        """A process that has just begun, and has no key in memory: the key store that it was told of is left by the
        time that it asks there."""
        with between(monkeypatch, house.vault.keys, "_row", lambda: other.vault.keys.rotate("file:keys/next.key")):
            assert house.vault.keys.room_key == other.vault.keys.room_key

    def test_that_two_rotate_at_the_same_time_is_rotated_twice(self, house, other, monkeypatch):
        """Neither is pinned in the place of the other, and no key store is left behind."""
        install, inside = RoomKeys._install, threading.Barrier(2)

        def together(*args):
            with contextlib.suppress(threading.BrokenBarrierError):
                inside.wait(0.5)
            return install(*args)

        monkeypatch.setattr(RoomKeys, "_install", together)
        done = []
        threads = [
            threading.Thread(target=lambda each=each: done.append(each.vault.keys.rotate())) for each in (house, other)
        ]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        assert sorted(each["key_epoch"] for each in done) == [2, 3]
        last = max(done, key=lambda each: each["key_epoch"])
        (key,) = (house.folder / "keys").iterdir()
        assert last["keystore"] == f"file:keys/{key.name}"
        assert House(house.folder).vault.verify(REF, deep=True).ok

    def test_that_nobody_has_rotated_is_not_asked_for_without_end(self, house):
        for key in (house.folder / "keys").iterdir():
            key.unlink()
        house.vault.keys._cached = None
        with pytest.raises(Sealed):
            house.vault.keys.room_key  # noqa: B018


@pytest.mark.parametrize("form", [None, "int4"])
@pytest.mark.parametrize(("what", "code"), [("rotated", "copy.revision"), ("shredded", "copy.ended")])
def test_a_copy_of_what_is_rotated_or_shredded_as_it_is_read(house, other, monkeypatch, tmp_path, form, what, code):
    """Whoever takes it is told so, and not that the store had lost something."""
    monkeypatch.setenv("STRONGROOM_STATE", str(tmp_path / "state"))
    with Room(house.folder, OWNER) as room:
        taken = receive(house.vault, room._say, OWNER, REF, "copy", form=form)

    def change():
        if what == "rotated":
            other.vault.rotate(REF, by=OWNER)
        else:
            other.vault.shred(REF, confirm=REF, by=OWNER)

    with between(monkeypatch, Copies, "_check", change), pytest.raises(StrongroomError) as caught:
        house.vault.copies.read(f"copies/{taken.index}/0")
    assert caught.value.code == code


def test_a_job_that_is_gone_on_with_as_the_room_key_is_rotated_is_opened_as_it_is_now(house, other):
    """Its secrets were read under the old key, which nobody has any more."""
    vault, fresh = house.vault, House(house.folder)
    with contextlib.suppress(ValueError), vault.journal("put this", "acme/tiny", OWNER) as begun:
        raise ValueError("interrupted")
    row, left = RoomKeys._row, [other.vault.keys.rotate]

    def late(keys, tx=None, *given):
        found = row(keys, tx, *given)
        if keys is fresh.vault.keys and left:
            left.pop()()
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RoomKeys, "_row", late)
        with fresh.vault.journal("put this", "acme/tiny", OWNER) as again:
            assert again.record == begun.record
    assert not left
    fresh.close()


def test_that_is_rotated_as_it_is_shredded_leaves_nothing_in_the_store(house, other, monkeypatch):
    """What the rotation has written is looked up, too."""

    def rotate():
        other.vault.rotate(REF, by=OWNER)

    with between(monkeypatch, shred_module, "_objects_of", rotate):
        done = house.vault.shred(REF, confirm=REF, by=OWNER)
    assert done["objects_deleted"] > 2
    assert list(house.vault.blobs.list("")) == []
    assert "fsck" not in "".join(done["means"])


def test_that_is_rotated_each_time_is_shredded_all_the_same(house, other, monkeypatch):
    def rotate():
        other.vault.rotate(REF, by=OWNER)

    with between(monkeypatch, shred_module, "_objects_of", rotate, rotate, rotate):
        done = house.vault.shred(REF, confirm=REF, by=OWNER)
    assert "fsck --repair" in done["means"][0]
    with pytest.raises(NotFound):
        house.read()
    fsck(house.vault, repair=True)
    assert list(house.vault.blobs.list("")) == []


def test_nobody_waits_in_the_database_for_a_key_store(house, other, monkeypatch):
    """Where it is slow, or away, everything else in the room goes on."""
    wrap = FileKeystore.wrap

    def slow(store, *given):
        other.register("user/somebody")
        return wrap(store, *given)

    with monkeypatch.context() as patch:
        patch.setattr(FileKeystore, "wrap", slow)
        house.vault.keys.rotate()
    assert House(house.folder).vault.verify(REF, deep=True).ok


@pytest.mark.parametrize("act", ["put", "rotate"])
def test_nobody_waits_in_the_database_for_a_key_store_that_unwraps(house, other, other_source, monkeypatch, act):
    """Another process has rotated the room's key before the job is begun, and before it ends."""
    unwrap, asked = FileKeystore.unwrap, []
    other.vault.keys.room_key  # noqa: B018 - in memory from here on

    def slow(store, *given):
        asked.append(store)
        other.register(f"user/somebody{len(asked)}")
        return unwrap(store, *given)

    done = []

    def progress(_done, _total):
        if not done:
            done.append(other.vault.keys.rotate())

    monkeypatch.setattr(FileKeystore, "unwrap", slow)
    house.vault.keys.signer  # noqa: B018 - as of a process that has been running
    other.vault.keys.rotate()
    if act == "put":
        house.put(other_source, "acme/other", progress=progress)
    else:
        house.vault.rotate(REF, by=OWNER, progress=progress)
    assert done
    assert len(asked) == 3
    for each in house.vault.ls():
        assert House(house.folder).vault.verify(each.ref, deep=True).ok


def test_nobody_waits_in_the_database_for_whoever_asks_a_key_store(house, other, other_source, monkeypatch):
    """Another thread of this process is at it."""
    unwrap, begun, go = FileKeystore.unwrap, threading.Event(), threading.Event()
    house.vault.keys.signer  # noqa: B018 - as of a process that has been running
    other.vault.keys.rotate()
    current, tried = RoomKeys.current, threading.Event()

    def slow(store, *given):
        begun.set()
        assert go.wait(60)
        return unwrap(store, *given)

    def trying(keys, tx):
        tried.set()
        return current(keys, tx)

    monkeypatch.setattr(FileKeystore, "unwrap", slow)
    monkeypatch.setattr(RoomKeys, "current", trying)
    asking = threading.Thread(target=lambda: house.vault.keys.room_key)
    putting = threading.Thread(target=lambda: house.put(other_source, "acme/other"))
    asking.start()
    assert begun.wait(60)
    putting.start()
    assert tried.wait(60)
    other.register("user/somebody")
    go.set()
    asking.join(60)
    putting.join(60)
    assert House(house.folder).vault.verify("acme/other@1", deep=True).ok


class TestKept:
    """What a process keeps opened of a version, to give out its keys."""

    def test_of_what_is_shredded_as_it_is_released_is_nothing(self, house, other, monkeypatch, tmp_path):
        """The keys were read before, and are kept after."""
        monkeypatch.setenv("STRONGROOM_STATE", str(tmp_path / "state"))
        vault = house.vault
        with (
            Room(house.folder, OWNER) as room,
            between(monkeypatch, vault.custodian, "decide", lambda: vault.shred(REF, confirm=REF, by=OWNER)),
        ):
            receive(vault, room._say, OWNER, REF, "load")
        assert not vault.custodian._opened._kept

    @pytest.mark.parametrize("by", ["this process", "another"])
    def test_of_a_copy_that_is_shredded_as_it_is_opened_is_nothing(self, house, other, monkeypatch, tmp_path, by):
        monkeypatch.setenv("STRONGROOM_STATE", str(tmp_path / "state"))
        vault = house.vault if by == "this process" else other.vault
        with Room(house.folder, OWNER) as room:
            taken = receive(vault, room._say, OWNER, REF, "copy")
        house.vault.copies.forget()

        def shred():
            vault.shred(REF, confirm=REF, by=OWNER)

        with between(monkeypatch, Copies, "_written", shred), pytest.raises(StrongroomError) as caught:
            house.vault.copies.read(f"copies/{taken.index}/0")
        assert caught.value.code == "copy.ended"
        assert not house.vault.copies._open._kept

    def test_goes_as_soon_as_another_process_is_known_to_have_shredded_it(self, house, other, monkeypatch, tmp_path):
        monkeypatch.setenv("STRONGROOM_STATE", str(tmp_path / "state"))
        vault = house.vault
        with Room(house.folder, OWNER) as room:
            receive(vault, room._say, OWNER, REF, "load")
            receive(vault, room._say, OWNER, REF, "copy")
        assert vault.custodian._opened._kept
        assert vault.copies._open._kept
        other.vault.shred(REF, confirm=REF, by=OWNER)
        with vault.custodian.ledger.view():
            pass
        assert not vault.custodian._opened._kept
        assert not vault.copies._open._kept

    @pytest.mark.parametrize("form", [None, "int4"])
    @pytest.mark.parametrize("first", ["load", "copy", "piece"])
    def test_opens_nothing_after_a_shred_that_could_not_be_recorded(
        self, house, other, monkeypatch, tmp_path, form, first
    ):
        """The process that shreds has no key to sign the log with; this one has. Whatever it is asked first, it lets go
        of all then."""
        monkeypatch.setenv("STRONGROOM_STATE", str(tmp_path / "state"))
        vault = house.vault
        with Room(house.folder, OWNER) as room:
            receive(vault, room._say, OWNER, REF, "load")
            taken = receive(vault, room._say, OWNER, REF, "copy", form=form)

            def sealed(*_):
                raise Sealed("keystore.down", "the key store is away")

            with monkeypatch.context() as patch:
                patch.setattr(other.vault.keys, "_unwrapped", sealed)
                assert other.vault.shred(REF, confirm=REF, by=OWNER)["entry"] is None
            assert vault.custodian._opened._kept
            assert vault.copies._open._kept
            assert bool(vault.copies._plans._kept) == bool(form)
            body = {"ref": REF, "holder": OWNER, "break_glass": False, "reason": ""}

            def ask(what):
                if what == "piece":
                    return vault.copies.read(f"copies/{taken.index}/0")
                key, challenge = ReleaseKey().public_key.hex(), vault.custodian.challenge().hex()
                asked = {**body, "action": what, "public_key": key, "challenge": challenge}
                return vault.custodian.release(room._say("release", asked))

            for turn, what in enumerate((first, "load", "copy", "piece")):
                with pytest.raises((NotFound, Denied)) as caught:
                    ask(what)
                assert caught.value.code == ("copy.ended" if (turn, what) == (0, "piece") else "weights.shredded")
                assert not vault.custodian._opened._kept
                assert not vault.copies._open._kept
                assert not vault.copies._plans._kept


@pytest.mark.parametrize("all_of_them", [False, True])
def test_that_is_shredded_while_others_are_searched_is_left_out(
    house, other, other_source, source, monkeypatch, all_of_them
):
    house.put(other_source, "acme/other")

    def shred():
        for ref in (REF, "acme/other@1") if all_of_them else (REF,):
            other.vault.shred(ref, confirm=ref, by=OWNER)

    with between(monkeypatch, trace, "_records", shred):
        if all_of_them:
            with pytest.raises(NotFound) as caught:
                house.search(source)
            assert caught.value.code == "weights.missing"
        else:
            assert [each["ref"] for each in house.search(source)["versions"]] == ["acme/other@1"]


def test_that_is_shredded_as_it_is_looked_at_is_no_problem(house, other, monkeypatch):
    with between(monkeypatch, fsck_module, "_of_one_moment", lambda: other.vault.shred(REF, confirm=REF, by=OWNER)):
        assert fsck(house.vault).problems == []
