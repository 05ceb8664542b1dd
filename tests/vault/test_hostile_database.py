"""Somebody who can write to the room's database, but has no key (threat model, G4): what they change is refused. What
they do to the log, which is where principals and leases are, is in test_hostile_log.py."""

import base64
import json
import sqlite3

import pytest

import strongroom
from strongroom.core import canonical
from strongroom.errors import CannotVerify, Conflict, StrongroomError, Tampered
from strongroom.formats.dsse import Envelope
from strongroom.formats.manifest import PAYLOAD_TYPE
from vault.rooms import write_model


def change(folder, statement, *values):
    connection = sqlite3.connect(folder / "room.db")
    with connection:
        connection.execute("PRAGMA foreign_keys=OFF")
        connection.execute("PRAGMA ignore_check_constraints=ON")
        connection.execute(statement, values)
    connection.close()


def query(folder, statement):
    connection = sqlite3.connect(folder / "room.db")
    try:
        return connection.execute(statement).fetchall()
    finally:
        connection.close()


@pytest.fixture
def room(tmp_path):
    made, _ = strongroom.Room.init(tmp_path / "room", owner="user/ana", custody="solo")
    made.put(write_model(tmp_path / "model", seed=3), "acme/tiny")
    made.close()
    return tmp_path / "room"


def test_it_can_not_choose_the_server_that_is_given_the_token(room, monkeypatch):
    monkeypatch.setenv("BAO_TOKEN", "s.secret")
    change(room, "UPDATE room SET keystore_uri = ?", "openbao:http://127.0.0.1:1/transit/k")
    with strongroom.open(room) as opened:
        with pytest.raises(Tampered, match="names a key store"):
            opened.show("acme/tiny@1")
        assert "names a key store" in opened.status()["sealed_because"]


@pytest.mark.parametrize("put_id", ["../room.json", "/etc/hostname", "..", "", "A" * 32, "a" * 31, "a" * 33])
def test_it_can_not_name_a_file_to_be_made_or_deleted(room, put_id):
    before = (room / "room.json").read_bytes()
    columns = "put_id, name, fingerprint, version_id, revision, record, created_at, created_by"
    change(room, f"INSERT INTO puts ({columns}) VALUES (?, 'n', 'f', ?, 1, x'00', 't', 'user/ana')", put_id, "0" * 32)
    with strongroom.open(room) as opened:
        for repair in (False, True):
            with pytest.raises(Tampered):
                opened.fsck(repair=repair)
    assert (room / "room.json").read_bytes() == before
    assert list((room / "locks").iterdir()) == []


def test_a_job_moved_to_another_source_is_not_resumed(room, tmp_path, monkeypatch):
    """Its packs would become part of a version that the room signs."""
    _interrupt(room, write_model(tmp_path / "one", seed=4), monkeypatch)
    ours = query(room, "SELECT fingerprint FROM puts")[0][0]
    _interrupt(room, write_model(tmp_path / "two", seed=5), monkeypatch)
    change(room, "DELETE FROM puts WHERE fingerprint <> ?", ours)
    change(room, "UPDATE puts SET fingerprint = ?", "moved")
    with strongroom.open(room) as opened:
        opened.keystore_rotate()
        assert query(room, "SELECT count(*) FROM puts") == [(0,)]  # it no longer opens, and is dropped


def _interrupt(room, source, monkeypatch):
    """A put that dies after its first pack is journalled."""
    from strongroom.vault import journal as module
    from strongroom.vault import packing

    add = module.Journal.add

    def once(self, pack, ordinal, progress):
        add(self, pack, ordinal, progress)
        raise OSError(5, "died")

    with monkeypatch.context() as patch:
        patch.setattr(packing, "PACK_BODY", 40_000)
        patch.setattr(module.Journal, "add", once)
        with strongroom.open(room) as opened, pytest.raises(OSError, match="died"):
            opened.put(source, "acme/next")


@pytest.mark.parametrize("column", ["pack_id", "digest", "progress", "mac"])
def test_a_changed_journal_row_is_made_again(room, tmp_path, monkeypatch, column):
    from strongroom.vault import packing

    source = write_model(tmp_path / "one", seed=6)
    _interrupt(room, source, monkeypatch)
    assert query(room, "SELECT count(*) FROM put_packs")[0][0] >= 1
    change(room, f"UPDATE put_packs SET {column} = ?", "0" * 64)
    monkeypatch.setattr(packing, "PACK_BODY", 40_000)
    with strongroom.open(room) as opened:
        result = opened.put(source, "acme/next")
        assert result.resumed_packs == 0
        assert opened.verify(result.ref, deep=True).ok


def test_a_journalled_pack_that_was_cut_short_is_made_again(room, tmp_path, monkeypatch):
    from strongroom.vault import packing

    source = write_model(tmp_path / "one", seed=7)
    _interrupt(room, source, monkeypatch)
    (pack_id,) = query(room, "SELECT pack_id FROM put_packs LIMIT 1")[0]
    path = room / "store" / "packs" / pack_id[:2] / pack_id
    path.chmod(0o600)
    path.write_bytes(path.read_bytes()[:100])
    monkeypatch.setattr(packing, "PACK_BODY", 40_000)
    with strongroom.open(room) as opened:
        result = opened.put(source, "acme/next")
        assert opened.verify(result.ref, deep=True).ok


def test_a_progress_mark_does_not_confirm_a_guess(room, tmp_path, monkeypatch):
    """Two jobs over the same source have different marks: they are keyed."""
    source = write_model(tmp_path / "one", seed=8)
    marks = []
    for _ in range(2):
        _interrupt(room, source, monkeypatch)
        marks.append({mark for (mark,) in query(room, "SELECT progress FROM put_packs")})
        change(room, "DELETE FROM put_packs")
        change(room, "DELETE FROM puts")
    assert marks[0]
    assert not marks[0] & marks[1]


def test_a_key_rotated_by_somebody_else_meanwhile_seals_nothing(room, tmp_path):
    """Sealed under a room key that is gone, a version could never be opened again."""
    first, second = strongroom.open(room), strongroom.open(room)
    first.show("acme/tiny@1")  # has the room key in memory
    second.keystore_rotate()
    put = first.put(write_model(tmp_path / "one", seed=9), "acme/next")
    first.rotate("acme/tiny@1")
    first.close()
    second.close()
    with strongroom.open(room) as opened:
        assert opened.verify(put.ref, deep=True).ok
        assert opened.verify("acme/tiny@1", deep=True).ok
        opened.keystore_rotate()


def test_fsck_leaves_alone_what_is_not_a_rooms(room):
    (room / "store" / "photos").mkdir()
    (room / "store" / "photos" / "cat.jpg").write_bytes(b"meow")
    with strongroom.open(room) as opened:
        report = opened.fsck(repair=True)
    assert (room / "store" / "photos" / "cat.jpg").read_bytes() == b"meow"
    assert report.foreign == 1
    assert report.orphans == []


def test_a_store_that_is_in_use_is_not_taken_for_a_new_room(room, tmp_path):
    with pytest.raises(Conflict, match="not empty"):
        strongroom.Room.init(tmp_path / "second", store=str(room / "store"))
    assert not list((tmp_path / "second").iterdir())


def test_fsck_does_not_delete_another_rooms_versions(room, tmp_path):
    second, _ = strongroom.Room.init(tmp_path / "second", owner="user/ben", custody="solo")
    second.close()
    config = (tmp_path / "second" / "room.json").read_text().replace('"store":"store"', f'"store":"{room / "store"}"')
    (tmp_path / "second" / "room.json").write_text(config)
    with strongroom.open(tmp_path / "second") as opened, pytest.raises(Conflict, match="another room"):
        opened.fsck(repair=True)
    with strongroom.open(room) as opened:
        assert opened.verify("acme/tiny@1", deep=True).ok


@pytest.mark.parametrize("value", [1, "text", None, b""])
def test_a_room_row_of_other_types_is_one_of_our_errors(room, value):
    change(room, "UPDATE room SET secrets = ?", value if value is not None else b"x")
    with strongroom.open(room) as opened, pytest.raises(StrongroomError):
        opened.show("acme/tiny@1")


def test_an_init_that_failed_can_be_given_again(tmp_path):
    with pytest.raises(StrongroomError):
        strongroom.Room.init(tmp_path / "room", recovery=(5, 3))
    made, _ = strongroom.Room.init(tmp_path / "room", recovery=(2, 3), custody="solo")
    made.close()


# SQLite turns a number into text where a column's type is text, and the other way round where it can.
STRANGE = [
    ("name", b"acme/tiny"),
    ("name", "../../etc"),
    ("version_id", "../x"),
    ("number", "one"),
    ("revision", 1.5),
    ("manifest_sha256", b"\x00"),
    ("record", "text"),
    ("record", 7),
    ("bytes", "many"),
    ("stored_bytes", -1),
    ("positions", 1.5),
    ("state", "lost"),
    ("created_at", b"5"),
    ("created_by", b"ana"),
    ("shredded_at", b"3"),
]


def refusals(*acts):
    """That each of `acts` ends, if it fails, in an error of ours; returns whether each failed."""
    failed = []
    for act in acts:
        try:
            act()
        except StrongroomError:
            failed.append(True)
        else:
            failed.append(False)
    return failed


@pytest.mark.parametrize(("column", "value"), STRANGE)
def test_a_version_row_of_other_types_is_one_of_our_errors(room, tmp_path, column, value):
    change(room, f"UPDATE versions SET {column} = ?", value)
    with strongroom.open(room) as opened:
        assert all(refusals(opened.ls, opened.status))
        assert not opened.fsck().ok
        refusals(
            lambda: opened.show("acme/tiny@1"),
            lambda: opened.load("acme/tiny@1").read(),
            lambda: opened.verify("acme/tiny@1"),
            lambda: opened.rotate("acme/tiny@1"),
            lambda: opened.put(write_model(tmp_path / "next", seed=4), "acme/tiny"),
            opened.keystore_rotate,
        )


@pytest.mark.parametrize(
    ("column", "value"), [item for item in STRANGE if item[0] not in ("name", "number", "version_id")]
)
def test_a_version_row_of_other_types_can_be_shredded(room, column, value):
    change(room, f"UPDATE versions SET {column} = ?", value)
    with strongroom.open(room) as opened:
        opened.shred("acme/tiny@1", confirm="acme/tiny@1")
    assert query(room, "SELECT state, record FROM versions") == [("shredded", None)]


@pytest.mark.parametrize("pack_id", ["x", None, "of another version"])
def test_a_forged_job_saves_no_key_from_being_shredded_and_takes_no_other_pack(room, tmp_path, pack_id):
    with strongroom.open(room) as opened:
        opened.put(write_model(tmp_path / "other", seed=8), "acme/other")
    if pack_id == "of another version":
        (number,) = query(room, "SELECT version_id FROM versions WHERE name = 'acme/other'")[0]
        manifest = (room / "store" / "versions" / number / "1.manifest").read_bytes()
        payload = json.loads(base64.b64decode(json.loads(manifest)["payload"]))
        pack_id = payload["common"]["packs"][0]["id"]
    version = query(room, "SELECT version_id FROM versions WHERE name = 'acme/tiny'")[0][0]
    columns = "put_id, name, fingerprint, version_id, revision, record, created_at, created_by"
    change(room, f"INSERT INTO puts ({columns}) VALUES (?, 'n', 'f', ?, 1, x'00', 't', 'user/ana')", "0" * 32, version)
    columns = "put_id, kind, ordinal, first, count, pack_id, digest, progress, mac"
    if pack_id is not None:
        change(room, f"INSERT INTO put_packs ({columns}) VALUES (?, 0, 0, 0, 1, ?, 'd', '', '')", "0" * 32, pack_id)
    with strongroom.open(room) as opened:
        opened.shred("acme/tiny@1", confirm="acme/tiny@1")
        assert opened.verify("acme/other@1", deep=True).ok
    assert query(room, "SELECT state, record FROM versions WHERE name = 'acme/tiny'") == [("shredded", None)]
    assert query(room, "SELECT * FROM puts") == []


def later(room):
    """A manifest of format 2, as of a later release, which no version of this room refers to."""
    payload = canonical.encode({"format": 2, "what": "this release can not know"})
    place = room / "store" / "versions" / ("0" * 32)
    place.mkdir(parents=True)
    (place / "1.manifest").write_bytes(Envelope(PAYLOAD_TYPE, payload, (("a" * 64, bytes(64)),)).encode())
    return place / "1.manifest"


def test_fsck_deletes_nothing_of_a_later_release(room):
    manifest = later(room)
    with strongroom.open(room) as opened, pytest.raises(CannotVerify):
        opened.fsck(repair=True)
    assert manifest.exists()


def test_what_a_later_release_wrote_can_be_shredded(room, monkeypatch):
    with strongroom.open(room) as opened:

        def later_format(_record):
            raise CannotVerify("format.unknown", "the manifest is of format 2")

        monkeypatch.setattr(opened._vault, "manifest", later_format)
        said = opened.shred("acme/tiny@1", confirm="acme/tiny@1")
    assert "fsck --repair" in said["means"][0]
    assert query(room, "SELECT state, record FROM versions") == [("shredded", None)]


def test_what_a_raced_rotation_left_goes_with_the_next_shred(room):
    """A rotation that began its job right after a shred had looked for jobs."""
    version = query(room, "SELECT version_id FROM versions")[0][0]
    with strongroom.open(room) as opened:
        opened.shred("acme/tiny@1", confirm="acme/tiny@1")
        columns = "put_id, name, fingerprint, version_id, revision, record, created_at, created_by"
        change(
            room, f"INSERT INTO puts ({columns}) VALUES (?, 'n', 'f', ?, 2, x'00', 't', 'user/ana')", "0" * 32, version
        )
        said = opened.shred("acme/tiny@1", confirm="acme/tiny@1")
    assert "fsck --repair" in said["means"][0]
    assert query(room, "SELECT * FROM puts") == []
