"""A version that somebody rotates, or shreds, between its release and the last of its bytes that is read."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest

import strongroom
import strongroom.vault.rotate as rotating
from strongroom.client import reading
from strongroom.errors import IntegrityError, NotFound, Tampered, Truncated
from strongroom.storage.reader import ImageReader
from vault.test_opened import between
from vault.test_release import REF, hall, template  # noqa: F401 - fixtures

GONE = ("manifest.missing", "pack.missing")


@pytest.fixture
def ana(hall):  # noqa: F811
    with hall.room("user/ana") as room:
        yield room


def rotate(hall):  # noqa: F811
    """As another process does."""
    with hall.room("user/olga") as olga:
        olga.rotate(REF)


def leased(hall, *, only=True, **how):  # noqa: F811
    """The one lease that Ana has to load it from now on, or one more of them, asked for so."""
    with hall.room("user/ana") as ana, hall.room("user/ben") as ben, hall.room("user/eva") as eva:
        for each in ana.principal_show("user/ana")["leases"]:
            if only and (each["action"], each["ref"]) == ("load", REF):
                ben.revoke(each["id"], reason="another one")
        asked = ana.request(REF, reason="evaluation", **how)
        ben.approve(asked["id"])
        eva.approve(asked["id"])
        return asked["id"]


def released(hall):  # noqa: F811
    """The revisions whose keys were released, in order; nobody was refused any."""
    entries = hall.entries()
    assert not [each for each in entries if each.type == "refused"]
    return [each.body["revision"] for each in entries if each.type == "release"]


class TestRotated:
    def test_before_it_is_opened(self, hall, ana, monkeypatch):  # noqa: F811
        """Once, and a second time as it is released again."""
        right = bytes(ana.reader(REF).read_all())
        with between(monkeypatch, reading, "receive", lambda: rotate(hall)):
            reader = ana.reader(REF)
        assert bytes(reader.read_all()) == right
        assert reader.bundle.revision == 2
        twice = iter([True, True])

        def late(*args):
            found = real(*args)
            if next(twice, False):
                rotate(hall)
            return found

        real = reading.receive
        monkeypatch.setattr(reading, "receive", late)
        assert bytes(ana.reader(REF).read_all()) == right
        assert released(hall) == [1, 1, 2, 2, 3, 4]

    def test_while_it_is_read(self, hall, ana):  # noqa: F811
        """By several at one time, who need one further release, and no more."""
        with hall.room("user/ana") as other:  # what was opened of a store in a folder is read on, gone or not
            right = bytes(other.reader(REF).read_all())
        reader = ana.reader(REF)
        assert bytes(reader.read(0, 64)) == right[:64]
        rotate(hall)
        found, start = {}, threading.Barrier(4)

        def read(number):
            start.wait(60)
            found[number] = bytes(reader.read_all())

        threads = [threading.Thread(target=read, args=(number,)) for number in range(4)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        assert [found[number] == right for number in range(4)] == [True] * 4
        assert released(hall) == [1, 1, 2]
        hall.verify()

    def test_where_no_room_is_open_any_more(self, hall, monkeypatch):  # noqa: F811
        monkeypatch.setenv("STRONGROOM_AS", "user/ana")
        with strongroom.safe_open(REF, "np", room=hall.folder / "room") as opened:
            right = opened.get_tensors()
        with strongroom.safe_open(REF, "np", room=hall.folder / "room") as opened:
            opened.keys()
            rotate(hall)
            for name, tensor in opened.get_tensors().items():
                assert np.array_equal(tensor.view(np.uint8), right[name].view(np.uint8))
        assert released(hall) == [1, 1, 2]

    def test_under_a_lease_that_counts_each_release(self, hall, ana):  # noqa: F811
        lease = leased(hall, uses=2)
        reader = ana.reader(REF)
        rotate(hall)
        assert len(bytes(reader.read_all())) == reader.layout.image
        assert ana.show_request(lease)["state"] == "used"

    @pytest.mark.parametrize("over", ["used", "revoked", "frozen"])
    def test_where_the_lease_is_over(self, hall, ana, over):  # noqa: F811
        """What would be refused is not asked for, and an approval for one use is of one."""
        lease = leased(hall, uses=1 if over == "used" else None)
        reader = ana.reader(REF)
        if over != "used":
            with hall.room("user/ben") as ben:
                ben.revoke(lease if over == "revoked" else REF, reason="stop")
        rotate(hall)
        with pytest.raises(Truncated) as caught:
            reader.read_all()
        assert caught.value.code in GONE
        assert released(hall) == [1]

    def test_while_another_lease_is_there_that_a_release_would_be_under(self, hall, ana):  # noqa: F811
        """An approval for one use, of something else maybe, is not used up by what was begun before it."""
        leased(hall, duration=3600)
        reader = ana.reader(REF)
        once = leased(hall, only=False, duration=7200, uses=1)
        rotate(hall)
        with pytest.raises(Truncated) as caught:
            reader.read_all()
        assert caught.value.code in GONE
        assert ana.show_request(once)["state"] != "used"
        assert released(hall) == [1]

    def test_of_an_emergency_is_not_another_one(self, hall):  # noqa: F811
        with hall.room("user/eva") as eva:
            reader = eva.reader(REF, break_glass="the cluster burns")
            rotate(hall)
            with pytest.raises(Truncated):
                reader.read_all()
        assert released(hall) == [1]

    def test_again_and_again(self, hall, ana, monkeypatch):  # noqa: F811
        """It ends, whatever the room does."""
        real = reading.receive

        def late(*args):
            found = real(*args)
            rotate(hall)
            return found

        monkeypatch.setattr(reading, "receive", late)
        with pytest.raises(Truncated):
            ana.reader(REF)

    def test_and_released_as_what_it_is_not(self, hall):  # noqa: F811
        """Half of it would be one holder's, and half another's."""
        vault = hall.vault
        reader = ImageReader(
            vault.blobs,
            vault.bundle(REF, "user/ana"),
            again=lambda _: (vault.blobs, vault.bundle(REF, "user/amy")),
        )
        rotate(hall)
        with pytest.raises(Tampered) as caught:
            reader.read_all()
        assert caught.value.code == "read.other"

    def test_and_released_with_other_files(self, hall, ana, monkeypatch):  # noqa: F811
        """Of the same layout, but not of the same bytes by what the index says of them."""
        reader = ana.reader(REF)
        store = rotating.store_index

        def other(blobs, index, *more):
            return store(blobs, replace(index, sha256=tuple("0" * 64 for _ in index.sha256)), *more)

        monkeypatch.setattr(rotating, "store_index", other)
        rotate(hall)
        with pytest.raises(Tampered) as caught:
            reader.read_all()
        assert caught.value.code == "read.other"


def test_shredded_is_said_to_be_so(hall, ana):  # noqa: F811
    reader = ana.reader(REF)
    with hall.room("user/olga") as olga:
        olga.shred(REF, confirm=REF)
    with pytest.raises(NotFound) as caught:
        reader.read_all()
    assert caught.value.code == "weights.shredded"


def test_what_the_store_has_lost_is_not_asked_for_again(hall, ana):  # noqa: F811
    reader = ana.reader(REF)
    for each in (hall.folder / "room" / "store").rglob("*"):
        if each.is_file():
            each.unlink()
    with pytest.raises(IntegrityError) as caught:
        reader.read_all()
    assert caught.value.code == "pack.missing"
    assert released(hall) == [1]


def test_a_room_that_is_somewhere_else_by_then_is_the_same_one(hall, monkeypatch, tmp_path):  # noqa: F811
    """It was named by a relative path."""
    monkeypatch.setenv("STRONGROOM_AS", "user/ana")
    monkeypatch.chdir(hall.folder)
    reader = strongroom.client.read_once(REF, "room")
    monkeypatch.chdir(tmp_path)
    rotate(hall)
    assert len(bytes(reader.read_all())) == reader.layout.image
    assert released(hall) == [1, 2]
