"""The way back into a room that one person has emptied: recovery shares reinstate somebody, loudly."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from strongroom.client import Room
from strongroom.crypto.signatures import Signer
from strongroom.errors import AuthRequired, Conflict, Denied, StrongroomError, UsageError
from strongroom.vault.status import doctor


class Emptied:
    """A team of three, all but Ben suspended by him; `be` opens it as one of them."""

    def __init__(self, folder, stack):
        self.folder, self.stack = folder, stack
        olga, self.shares = Room.init(folder / "room", owner="user/olga", recovery=(2, 3))
        with olga:
            olga.principal_add("user/ben", roles=["officer"])
            olga.principal_add("user/eva", roles=["executive"])
        self.host, self.ben = self.be("user/olga"), self.be("user/ben")
        for path in ("user/olga", "user/eva"):
            self.ben.principal_change(path, state="suspended")

    def be(self, path):
        return self.stack.enter_context(Room(self.folder / "room", path))

    def reinstate(self, path="user/olga", role="officer", *, shares=None, **more):
        shares = self.shares[:2] if shares is None else shares
        return self.host.reinstate(shares, path, role, reason="Ben has suspended us all", **more)

    def state(self, path):
        return self.ben.principal_show(path)


@pytest.fixture
def emptied(tmp_path):
    with ExitStack() as stack:
        yield Emptied(tmp_path, stack)


def test_one_alone_can_let_nobody_in_and_the_shares_can(emptied):
    assert emptied.ben.principal_change("user/eva", state="active")["state"] == "pending"
    assert emptied.state("user/eva")["state"] == "suspended"
    done = emptied.reinstate()
    assert done == {"principal": "user/olga", "role": "officer", "state": "active", "entry": done["entry"]}
    emptied.reinstate("user/eva", "executive", shares=emptied.shares[1:])
    olga, eva = emptied.be("user/olga"), emptied.be("user/eva")
    olga.revoke("user/ben", reason="he has locked us out")
    asked = olga.principal_add("user/kim", roles=["officer"])
    eva.approve(asked["id"])
    assert olga.principal_show("user/kim")["state"] == "active"
    found = olga.principal_show("user/olga")
    assert (found["roles"], found["person"], found["teams"]) == (["officer", "operator"], "user/olga", [])
    assert olga.log.verify()["ok"]


def test_it_is_open_until_another_person_has_reviewed_it(emptied):
    first = emptied.reinstate()["entry"]
    second = emptied.reinstate("user/eva", "executive")["entry"]
    assert emptied.host.status()["emergencies"] == [first, second]
    (check,) = [each for each in doctor(emptied.host._vault) if each.name == "emergencies"]
    assert check.level == "fail"
    assert f"{first} by user/olga" in check.message
    olga = emptied.be("user/olga")
    found = [(each["severity"], each["about"]) for each in olga.review()["findings"] if each["kind"] == "reinstated"]
    assert found == [("high", "user/eva"), ("high", "user/olga")]
    (told,) = olga.log.tail(1)
    assert told["index"] == second
    assert olga.log.show(first)["private"] == {"reason": "Ben has suspended us all"}
    olga.review(apply=True)
    assert emptied.host.status()["emergencies"] == [first]  # nobody reviews their own
    emptied.ben.review(apply=True)
    assert emptied.host.status()["emergencies"] == []


def test_with_another_key_the_old_one_is_worth_nothing(emptied):
    lost = emptied.be("user/olga")
    fresh = Signer(b"n" * 32)
    emptied.reinstate(public_key=fresh.public_key.hex())
    assert emptied.state("user/olga")["key"] == fresh.public_key.hex()
    with pytest.raises(AuthRequired):
        lost.revoke("user/ben", reason="x")
    assert emptied.ben.log.verify()["ok"]


def test_somebody_new_gets_a_key_on_this_machine(emptied):
    emptied.reinstate("user/new", "officer")
    new = emptied.be("user/new")
    new.revoke("user/ben", reason="he has locked us out")
    assert new.log.verify()["ok"]


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"shares": 1}, "share.too_few"),
        ({"shares": "other"}, "recovery.other_key"),
        ({"path": "user/ben"}, "reinstate.not_needed"),
        ({"path": "team/all"}, "reinstate.team"),
        ({"path": "olga"}, "principal.malformed"),
        ({"public_key": "5" * 63}, "principal.public_key"),
        ({"public_key": "ben"}, "principal.key"),
    ],
)
def test_is_refused_and_leaves_nothing(emptied, tmp_path, change, code):
    if change.get("shares") == 1:
        change = {**change, "shares": emptied.shares[:1]}
    if change.get("shares") == "other":
        other, shares = Room.init(tmp_path / "other", owner="user/olga", recovery=(2, 3))
        other.close()
        change = {**change, "shares": shares[:2]}
    if change.get("public_key") == "ben":
        change = {**change, "public_key": emptied.state("user/ben")["key"]}
    before = emptied.ben.log.tail(1)[0]["index"]
    path = change.pop("path", "user/olga") if "path" in change else "user/olga"
    with pytest.raises((UsageError, Conflict, Denied)) as caught:
        emptied.reinstate(path, **change)
    assert caught.value.code == code
    assert emptied.ben.log.tail(1)[0]["index"] == before


def test_a_key_that_was_made_for_nothing_is_taken_back(emptied):
    with pytest.raises(StrongroomError):
        emptied.reinstate("user/new", "officer", shares=emptied.shares[:1])
    emptied.reinstate("user/new", "officer")


def test_in_a_room_without_shares(tmp_path, emptied):
    room, shares = Room.init(tmp_path / "plain", owner="user/olga")
    assert not shares
    with room, pytest.raises(UsageError) as caught:
        room.reinstate(emptied.shares[:2], "user/new", "officer", reason="x")
    assert caught.value.code == "recovery.none"
    assert "strongroom" in caught.value.hint
