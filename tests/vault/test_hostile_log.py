"""Somebody who can write to the room's database, but has no key, and wants rights: to be somebody, to have a lease, to
have had one all along. Nothing in the log's tables is believed that the log key has not signed."""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from strongroom.client import Room
from strongroom.core import canonical
from strongroom.crypto.signatures import Signer
from strongroom.errors import (
    AuthRequired,
    CannotVerify,
    Conflict,
    Denied,
    Forked,
    IntegrityError,
    NotFound,
    Pending,
    Rollback,
    StrongroomError,
    Tampered,
    Truncated,
)
from strongroom.formats.dsse import Envelope, pre_authentication_encoding
from strongroom.formats.entry import Entry
from strongroom.ledger import log as log_module
from strongroom.ledger.log import Draft
from strongroom.policy.engine import Policies
from strongroom.vault.vault import Vault
from vault.rooms import write_model

REF = "acme/tiny@1"
OLGA, ANA, BEN, EVA = "user/olga", "user/ana", "user/ben", "user/eva"


def refusals(*acts: Callable[[], object]) -> list[bool]:
    """Whether each of `acts` fails, which has to be in an error of ours."""
    failed = []
    for act in acts:
        try:
            act()
        except StrongroomError:
            failed.append(True)
        else:
            failed.append(False)
    return failed


def came(_: object, __: object, now: int) -> Draft:
    """An entry that changes nothing."""
    return Draft(Entry("refused", now, OLGA, "", {"action": "x", "code": "x.y", "rule": ""}))


class House:
    """A team room, closed, in a folder: who attacks it has its database, and whoever comes next finds what is left."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def be(self, principal: str) -> Room:
        return Room(self.folder, principal)

    def sql(self, statement: str, *values: object) -> list[tuple[object, ...]]:
        with closing(sqlite3.connect(self.folder / "room.db")) as connection, connection:
            connection.execute("PRAGMA ignore_check_constraints=ON")
            return connection.execute(statement, values).fetchall()

    def entries(self) -> list[dict[str, object]]:
        return [json.loads(entry) for (entry,) in self.sql("SELECT entry FROM log_entries ORDER BY position")]

    def find(self, kind: str, by: str | None = None, last: bool = True) -> int:
        """The position of an entry of that type."""
        found = [n for n, each in enumerate(self.entries()) if each["type"] == kind and by in (None, each["by"])]
        return found[-1 if last else 0]

    def rewrite(self, position: int, change: Callable[[dict[str, object]], object]) -> None:
        entry = self.entries()[position]
        change(entry)
        self.sql("UPDATE log_entries SET entry = ? WHERE position = ?", canonical.encode(entry), position)

    def copy(self, to: Path) -> House:
        shutil.copytree(self.folder, to)
        return House(to)


@pytest.fixture(scope="module")
def furnished(tmp_path_factory: pytest.TempPathFactory) -> House:
    """Olga owns it; Ana had a lease to load, which Ben has revoked; Eva is suspended, her approval counts no more."""
    folder = tmp_path_factory.mktemp("house") / "room"
    room, _ = Room.init(folder, owner=OLGA)
    with room:
        room.put(write_model(folder.parent / "model", seed=7), "acme/tiny")
        room.principal_add(ANA, roles=["researcher"])
        room.principal_add(BEN, roles=["officer"])
        room.principal_add(EVA, roles=["executive"])
    house = House(folder)
    with house.be(ANA) as ana, house.be(BEN) as ben, house.be(EVA) as eva:
        asked = ana.request("acme/tiny", reason="evaluation")["id"]
        ben.approve(asked)
        eva.approve(asked)
        ana.load(REF)
        ben.revoke(asked, reason="done")
        ben.principal_change(EVA, state="suspended")
        ana.request("acme/tiny", reason="once more")
        with pytest.raises(Pending):
            ana.load(REF)
    return house


@pytest.fixture
def house(furnished: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> House:
    monkeypatch.setenv("STRONGROOM_STATE", str(tmp_path / "state"))
    return furnished.copy(tmp_path / "room")


def acts(house: House, tmp_path: Path) -> list[tuple[str, Callable[[Room], object], str]]:
    """What people do in the room, and as whom."""
    return [
        ("load", lambda room: room.load(REF), ANA),
        ("principal_ls", lambda room: room.principal_ls(), OLGA),
        ("requests", lambda room: room.requests(), OLGA),
        ("who", lambda room: room.who(REF), OLGA),
        ("approve", lambda room: room.approve(room.requests()[-1]["id"]), BEN),
        ("request", lambda room: room.request(REF, reason="please"), ANA),
        ("revoke", lambda room: room.revoke(ANA, reason="out"), BEN),
        ("principal_add", lambda room: room.principal_add("user/mal", roles=["officer"]), OLGA),
        ("put", lambda room: room.put(write_model(tmp_path / "next", seed=8), "acme/next"), OLGA),
        ("rotate", lambda room: room.rotate(REF), OLGA),
        ("tail", lambda room: room.log.tail(), OLGA),
        ("export", lambda room: list(room.log.export()), OLGA),
        ("review", lambda room: room.review(), OLGA),
        ("policy", lambda room: room.policy(), OLGA),
        ("status", lambda room: room.status(), OLGA),
    ]


def refused(house: House, tmp_path: Path) -> set[type[StrongroomError]]:
    """Nobody can do anything, by processes that start anew; and nothing is recorded. The kinds of error."""
    size, kinds = house.sql("SELECT size FROM log_state"), set()
    for name, act, principal in acts(house, tmp_path):
        with house.be(principal) as room:
            try:
                act(room)
            except IntegrityError as error:
                kinds.add(type(error))
            else:
                pytest.fail(f"{name} was done")
    assert house.sql("SELECT size FROM log_state") == size
    assert not (house.folder / "identities" / "user" / "mal.key").exists()
    return kinds


def swap(house: House, first: int, second: int) -> None:
    for old, new in ((first, -1), (second, first), (-1, second)):
        house.sql("UPDATE log_entries SET position = ? WHERE position = ?", new, old)


def drop(house: House, position: int) -> None:
    """Without a hole: those behind it move up."""
    house.sql("DELETE FROM log_entries WHERE position = ?", position)
    for behind in range(position + 1, len(house.entries()) + 1):
        house.sql("UPDATE log_entries SET position = ? WHERE position = ?", behind - 1, behind)
    house.sql("UPDATE log_state SET size = size - 1")


def weaker_policy(house: House) -> None:
    text = Policies.shipped("solo").text.encode()
    digest = hashlib.sha256(text).hexdigest()
    house.sql("INSERT INTO documents (digest, data) VALUES (?, ?)", digest, text)
    house.rewrite(0, lambda entry: entry["body"].update(policy=digest, custody="solo"))


def forged_approval(house: House) -> None:
    """Ben's approval of the first request, once more, for the second."""
    entry = house.entries()[house.find("approve")]
    house.sql("INSERT INTO log_entries (position, entry) VALUES (?, ?)", len(house.entries()), canonical.encode(entry))
    house.sql("UPDATE log_state SET size = size + 1")


def attacker_key(house: House) -> None:
    key = Signer(bytes(32)).public_key.hex()
    house.rewrite(house.find("principal", last=False), lambda entry: entry["body"].update(key=key))


ATTACKS: dict[str, Callable[[House], object]] = {
    "a role more": lambda house: house.rewrite(
        house.find("principal", by=OLGA, last=False), lambda entry: entry["body"].update(roles=["executive", "officer"])
    ),
    "the owner's key is mine": attacker_key,
    "no longer suspended": lambda house: house.rewrite(
        house.find("principal"), lambda entry: entry["body"].update(state="active")
    ),
    "the same person no longer": lambda house: house.rewrite(
        house.find("principal"), lambda entry: entry["body"].update(person=OLGA)
    ),
    "a lease for longer": lambda house: house.rewrite(
        house.find("approve"), lambda entry: entry["body"]["lease"].update(expires_at=1 << 40)
    ),
    "a lease for somebody else": lambda house: house.rewrite(
        house.find("approve"), lambda entry: entry["body"]["lease"].update(holder=BEN)
    ),
    "a lease to copy": lambda house: house.rewrite(
        house.find("approve"), lambda entry: entry["body"]["lease"].update(action="copy")
    ),
    "a revocation taken out": lambda house: drop(house, house.find("revoke")),
    "a revocation with a hole left": lambda house: house.sql(
        "DELETE FROM log_entries WHERE position = ?", house.find("revoke")
    ),
    "a revocation of something else": lambda house: house.rewrite(
        house.find("revoke"), lambda entry: entry["body"].update(target=EVA)
    ),
    "a revocation after the fact": lambda house: swap(house, house.find("revoke"), house.find("release")),
    "a release unrecorded": lambda house: drop(house, house.find("release")),
    "a release by somebody else": lambda house: house.rewrite(
        house.find("release"), lambda entry: entry.update(by=EVA)
    ),
    "an entry of the clock": lambda house: house.rewrite(house.find("release"), lambda entry: entry.update(at=0)),
    "an approval more": forged_approval,
    "a weaker policy": weaker_policy,
    "another manifest": lambda house: house.rewrite(
        house.find("put"), lambda entry: entry["body"].update(manifest="0" * 64)
    ),
    "no log": lambda house: [house.sql(f"DELETE FROM {table}") for table in ("log_state", "log_entries")],
    "a log that begins now": lambda house: [
        house.sql("DELETE FROM log_entries"),
        house.sql("UPDATE log_state SET size = 0"),
    ],
    "an empty checkpoint": lambda house: house.sql("UPDATE log_state SET checkpoint = x''"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_nobody_gains_a_right_or_loses_a_record(house: House, tmp_path: Path, attack: str) -> None:
    ATTACKS[attack](house)
    assert refused(house, tmp_path) <= {Tampered, Truncated, Rollback}


@pytest.mark.parametrize("attack", ATTACKS)
def test_who_has_the_log_open_already_is_not_fooled_either(house: House, attack: str) -> None:
    """What was read when it was whole stays as it was; what is read anew is refused."""
    with house.be(ANA) as ana, house.be(OLGA) as olga:
        before = olga.principal_ls(), olga.requests()
        ATTACKS[attack](house)
        for _ in range(2):
            with pytest.raises((Denied, Pending, IntegrityError)):
                ana.load(REF)
            with pytest.raises(IntegrityError):
                olga.log.export("jsonl").__next__()
        try:
            after = olga.principal_ls(), olga.requests()
        except IntegrityError:
            return
        assert after == before


# SQLite keeps what it is given, whatever type the column was declared to have.
STRANGE = [
    *(("log_state", "size", value) for value in ("many", 1.5, -1, 0, 1 << 62, b"9", "7")),
    *(("log_state", "checkpoint", value) for value in ("text", 7, b"\xff" * 200, b"strongroom/\n", b"\0" * 70_000)),
    *(("log_entries", "entry", value) for value in ("text", 7, b"", b"{}", b"null", b"[" * 60_000, b"\xff" * 100_000)),
]


@pytest.mark.parametrize(("table", "column", "value"), STRANGE)
def test_rows_of_other_types_are_errors_of_ours(house: House, tmp_path: Path, table, column, value) -> None:
    which = "WHERE position = 4" if table == "log_entries" else ""
    house.sql(f"UPDATE {table} SET {column} = ? {which}", value)
    for name, act, principal in acts(house, tmp_path):
        with house.be(principal) as room:
            failed = refusals(lambda act=act, room=room: act(room))
        assert failed == [True], name


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO log_state (id, size, checkpoint) VALUES (2, 1, x'00')",
        "UPDATE log_entries SET position = 'four' WHERE position = 4",
        "UPDATE log_entries SET position = 4.5 WHERE position = 4",
        "DELETE FROM log_entries",
        "DROP TABLE log_entries",
        "ALTER TABLE log_state RENAME COLUMN size TO length",
    ],
)
def test_tables_of_another_form_are_errors_of_ours(house: House, tmp_path: Path, statement: str) -> None:
    try:
        house.sql(statement)
    except sqlite3.IntegrityError:
        pytest.skip("this SQLite keeps the column's type")
    for name, act, principal in acts(house, tmp_path):
        with house.be(principal) as room:
            failed = refusals(lambda act=act, room=room: act(room))
        assert failed == [True], name


def test_every_byte_of_it_counts(house: House) -> None:
    """One bit of an entry or of the checkpoint is the other way round, and whatever that makes of it is refused."""
    places = [
        ("log_state", "checkpoint", "1 = 1"),
        *(("log_entries", "entry", f"position = {n}") for n in (0, 3, 8, 9)),
    ]
    for number, (table, column, which) in enumerate(places):
        ((whole,),) = house.sql(f"SELECT {column} FROM {table} WHERE {which}")
        for at in range(number, len(whole), 13):
            broken = bytearray(whole)
            broken[at] ^= 1 << at % 8
            house.sql(f"UPDATE {table} SET {column} = ? WHERE {which}", bytes(broken))
            with house.be(OLGA) as olga, pytest.raises((IntegrityError, CannotVerify)):
                olga.principal_ls()
        house.sql(f"UPDATE {table} SET {column} = ? WHERE {which}", whole)
    with house.be(OLGA) as olga:
        assert len(olga.principal_ls()) == 4


@pytest.mark.parametrize("value", ["text", 7, b"", b"{}", b"\xff" * 1000])
def test_a_snapshot_that_is_none_is_passed_over(house: House, value: object) -> None:
    house.sql("INSERT INTO log_snapshot (id, data) VALUES (1, ?)", value)
    with house.be(ANA) as ana, pytest.raises((Denied, Pending)):
        ana.load(REF)
    with house.be(OLGA) as olga:
        assert olga.log.verify()["ok"]


def test_a_snapshot_by_another_key_is_passed_over(house: House) -> None:
    """The state as it is, but Ana's lease holds on; signed, but not by the log."""
    with house.be(OLGA) as olga:
        ledger = olga._vault.custodian.ledger
        with ledger.view() as state:
            value = state.as_json()
        frontier = ledger._loaded.frontier.encode().hex()
        origin = olga._vault.log_key.origin
    for lease in value["leases"].values():
        lease.update(ended="", expires_at=1 << 40)
    payload = canonical.encode({"frontier": frontier, "origin": origin, "state": value})
    thief = Signer(bytes(32))
    signature = thief.sign(pre_authentication_encoding(log_module.SNAPSHOT_TYPE, payload))
    data = Envelope(log_module.SNAPSHOT_TYPE, payload, ((thief.key_id, signature),)).encode()
    house.sql("INSERT INTO log_snapshot (id, data) VALUES (1, ?)", data)
    with house.be(ANA) as ana, pytest.raises((Denied, Pending)):
        ana.load(REF)


def test_entries_before_a_snapshot_are_shown_as_signed_or_not_at_all(house: House, monkeypatch) -> None:
    """Nobody reads them again to decide something; whoever looks at the log does."""
    monkeypatch.setattr(log_module, "_SNAPSHOT_EVERY", 4)
    with house.be(OLGA) as olga:
        for _ in range(8):
            olga._vault.custodian.ledger.append(came)
    assert house.sql("SELECT count(*) FROM log_snapshot") == [(1,)]
    put, size = house.find("put"), len(house.entries())
    house.rewrite(put, lambda entry: entry.update(by=EVA))
    with house.be(OLGA) as olga:
        assert len(olga.principal_ls()) == 4
        for look in (
            lambda: olga.log.show(put),
            lambda: olga.log.tail(size),
            lambda: olga.log.prove(put),
            lambda: list(olga.log.export()),
            olga.review,
        ):
            with pytest.raises(Tampered) as caught:
                look()
            assert caught.value.code == "log.tampered"


def test_so_are_those_of_a_log_of_many_tiles(house: House) -> None:
    with house.be(OLGA) as olga:
        for _ in range(300):
            olga._vault.custodian.ledger.append(came)
        size = len(house.entries())
        for index in (0, 1, 255, 256, size - 1):
            assert olga.log.show(index)["index"] == index
        house.rewrite(3, lambda entry: entry.update(by=EVA))
        for index in (0, 3, 255):
            with pytest.raises(Tampered):
                olga.log.show(index)
        assert olga.log.show(256)["by"] == OLGA
        assert [item["index"] for item in olga.log.tail(3)] == [size - 3, size - 2, size - 1]
        lines = olga.log.export()
        with pytest.raises(Tampered):
            next(lines)
        house.sql("UPDATE log_nodes SET hash = zeroblob(32)")
        with pytest.raises(Tampered):
            olga.log.show(256)
        house.sql("DELETE FROM log_nodes")
        with pytest.raises(CannotVerify):
            olga.log.show(256)


class TestSetBack:
    """The whole database, to an older state that the log key did sign."""

    def back(self, house: House, older: House) -> None:
        for path in house.folder.glob("room.db*"):
            path.unlink()
        shutil.copy(older.folder / "room.db", house.folder / "room.db")

    @pytest.fixture
    def older(self, house: House, tmp_path: Path) -> House:
        """Before Ana is shut out."""
        return house.copy(tmp_path / "older")

    def test_is_seen_by_what_was_published(self, house: House, older: House, tmp_path: Path) -> None:
        with house.be(BEN) as ben:
            ben.revoke(ANA, reason="out")
            ben.log.verify()
        self.back(house, older)
        assert refused(house, tmp_path) == {Rollback}

    def test_is_seen_by_who_has_it_open_and_stays_seen(self, house: House, older: House) -> None:
        """Also where nothing was published, and not only the first time that it is asked."""
        with house.be(BEN) as ben:
            ben.revoke(ANA, reason="out")
            ben._vault.db.close()
            self.back(house, older)
            shutil.rmtree(house.folder / "log")
            for _ in range(3):
                with pytest.raises(Rollback):
                    ben.principal_ls()
                with pytest.raises(Rollback):
                    ben.revoke(ANA, reason="out")

    def test_and_gone_on_with_is_a_fork(self, house: House, older: House) -> None:
        """Another custodian, which had not seen it, has appended to what is left."""
        with house.be(BEN) as ben:
            ben.revoke(ANA, reason="out")
            ben._vault.db.close()
            self.back(house, older)
            shutil.rmtree(house.folder / "log")
            with house.be(OLGA) as olga:
                for _ in range(4):
                    olga._vault.custodian.ledger.append(came)
            for _ in range(3):
                with pytest.raises(Forked):
                    ben.principal_ls()
                with pytest.raises(Forked):
                    ben.revoke(ANA, reason="out")


class TestBeside:
    """What is kept beside the log is what was committed to, or is missing."""

    def test_a_reason_that_was_replaced(self, house: House) -> None:
        request = house.find("request")
        house.sql("UPDATE log_private SET value = ? WHERE position = ?", "the board agreed", request)
        with house.be(BEN) as ben:
            with pytest.raises(Tampered):
                ben.log.show(request)
            assert len(ben.requests()) == 2

    @pytest.mark.parametrize(("column", "value"), [("value", b"blob"), ("value", 7), ("salt", "text"), ("salt", 7)])
    def test_of_another_type(self, house: House, column: str, value: object) -> None:
        house.sql(f"UPDATE log_private SET {column} = ?", value)
        with house.be(BEN) as ben, pytest.raises(Tampered):
            ben.log.show(house.find("request"))

    def test_of_another_name(self, house: House) -> None:
        house.sql("UPDATE log_private SET name = 'contact'")
        with house.be(BEN) as ben, pytest.raises(Tampered):
            ben.log.show(house.find("request"))

    @pytest.mark.parametrize("data", [b"permit(principal, action, resource);", b"", "text", 7, b"\xff"])
    def test_a_policy_that_was_replaced(self, house: House, data: object) -> None:
        house.sql("UPDATE documents SET data = ?", data)
        size = len(house.entries())
        with house.be(ANA) as ana, house.be(BEN) as ben:
            for act in (
                lambda: ana.load(REF),
                lambda: ben.approve(ben.requests()[-1]["id"]),
                lambda: ben.revoke(ANA, reason="x"),
                ben.policy,
                lambda: ben.who(REF),
            ):
                with pytest.raises(Tampered):
                    act()
            assert ben.log.verify()["ok"]
        assert len(house.entries()) == size

    def test_a_policy_that_is_gone(self, house: House) -> None:
        house.sql("DELETE FROM documents")
        with house.be(ANA) as ana, pytest.raises(NotFound) as caught:
            ana.load(REF)
        assert caught.value.code == "document.missing"


class TestVersions:
    """The table of versions is what a room lists; what may be released is what the log says."""

    @pytest.fixture
    def solo(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> House:
        monkeypatch.setenv("STRONGROOM_STATE", str(tmp_path / "state"))
        room, _ = Room.init(tmp_path / "solo", owner=OLGA, custody="solo")
        with room:
            room.put(write_model(tmp_path / "model", seed=7), "acme/tiny")
            room.load(REF)
        return House(tmp_path / "solo")

    def row(self, house: House) -> tuple[object, ...]:
        (row,) = house.sql("SELECT * FROM versions")
        return row

    def restore(self, house: House, row: tuple[object, ...], store: Path) -> None:
        house.sql("DELETE FROM versions")
        house.sql(f"INSERT INTO versions VALUES ({', '.join('?' * len(row))})", *row)
        shutil.copytree(store, house.folder / "store", dirs_exist_ok=True)

    def test_an_older_revision_is_not_released(self, solo: House, tmp_path: Path) -> None:
        """Its row and its objects are back, and all of it is the room's own."""
        row = self.row(solo)
        shutil.copytree(solo.folder / "store", tmp_path / "store")
        with solo.be(OLGA) as olga:
            olga.rotate(REF)
        self.restore(solo, row, tmp_path / "store")
        with solo.be(OLGA) as olga, pytest.raises(Conflict) as caught:
            olga.load(REF)
        assert caught.value.code == "release.revision"

    def test_nor_is_one_that_was_shredded(self, solo: House, tmp_path: Path) -> None:
        row = self.row(solo)
        shutil.copytree(solo.folder / "store", tmp_path / "store")
        with solo.be(OLGA) as olga:
            olga.shred(REF, confirm=REF)
        self.restore(solo, row, tmp_path / "store")
        with solo.be(OLGA) as olga, pytest.raises(NotFound) as caught:
            olga.load(REF)
        assert caught.value.code == "version.missing"

    def test_a_number_is_given_once(self, solo: House, tmp_path: Path) -> None:
        solo.sql("DELETE FROM versions")
        with solo.be(OLGA) as olga:
            assert olga.put(write_model(tmp_path / "next", seed=8), "acme/tiny").ref == "acme/tiny@2"

    def test_a_version_that_the_log_does_not_know_can_be_shredded(self, solo: House) -> None:
        solo.sql("UPDATE versions SET number = 9")
        with solo.be(OLGA) as olga:
            with pytest.raises(StrongroomError):
                olga.load("acme/tiny@9")
            olga.shred("acme/tiny@9", confirm="acme/tiny@9")
        assert solo.sql("SELECT state, record FROM versions") == [("shredded", None)]


def test_a_room_that_names_another_log_key_is_another_log(house: House) -> None:
    config = json.loads((house.folder / "room.json").read_bytes())
    config["log"] = Signer(bytes(32)).public_key.hex()
    (house.folder / "room.json").write_bytes(canonical.encode(config))
    with house.be(OLGA) as olga, pytest.raises(Tampered):
        olga.principal_ls()


def test_a_principal_without_its_key_is_nobody(house: House) -> None:
    """The folder of another machine has other identities, or none."""
    shutil.rmtree(house.folder / "identities")
    with house.be(ANA) as ana, pytest.raises(AuthRequired):
        ana.load(REF)
    with closing(Vault(house.folder)) as vault, pytest.raises(AuthRequired):
        vault.identities.signer(ANA)


def test_a_damaged_log_keeps_no_keys_alive(house: House) -> None:
    """Whoever wants weights to stay could else damage the log: they are shredded all the same, by their owner's key."""
    house.rewrite(house.find("put"), lambda entry: entry.update(by=EVA))
    house.sql("DELETE FROM log_snapshot")
    with house.be(OLGA) as olga:
        done = olga.shred(REF, confirm=REF)
    assert done["entry"] is None
    assert any("log" in each for each in done["means"])
    assert house.sql("SELECT count(*) FROM versions WHERE record IS NOT NULL") == [(0,)]
