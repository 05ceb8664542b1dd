"""A room that release 0.1.0 made, byte for byte, becomes one of this release."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
import sqlalchemy as sa

from strongroom.client import Room
from strongroom.errors import BackendError, CannotVerify, Conflict, StrongroomError, UsageError
from strongroom.storage.db import SCHEMA, Database, metadata
from strongroom.vault import upgrade as module
from strongroom.vault.config import RoomConfig
from strongroom.vault.upgrade import upgrade
from strongroom.vault.vault import Vault

OWNER = "user/ana"


@pytest.fixture
def old(tmp_path, monkeypatch):
    monkeypatch.setenv("STRONGROOM_STATE", str(tmp_path / "state"))  # each test begins this room's log anew
    with tarfile.open(Path(__file__).with_name("room-0.1.0.tar.xz")) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "room"


def read(folder, ref):
    with Room(folder, OWNER) as room, room.load(ref) as weights:
        return {name: weights[name].tobytes() for name in weights}


def test_it_is_not_opened_as_it_is_and_says_what_helps(old):
    with pytest.raises(CannotVerify) as caught:
        Room(old)
    assert caught.value.code == "room.older"
    assert "strongroom upgrade" in caught.value.hint
    with pytest.raises(BackendError) as caught:
        Database.open(f"sqlite:///{old}/room.db")
    assert "strongroom upgrade" in caught.value.hint


def test_its_versions_are_in_the_log_and_read_as_before(old):
    done = upgrade(old, owner=OWNER, custody="solo")
    assert (done.schema, done.versions) == (1, 3)
    with Room(old, OWNER) as room:
        assert [(info.ref, info.state) for info in room.ls()] == [
            ("acme/gone@1", "shredded"),
            ("acme/tiny@1", "active"),
            ("acme/tiny@2", "active"),
        ]
        assert room.verify("acme/tiny@1", deep=True).ok
        assert room.log.verify()["ok"]
        kinds = [entry["type"] for entry in room.log.tail(10)]
        assert kinds == ["genesis", "principal", "put", "shred", "put", "put"]
        assert [check.name for check in room.doctor() if check.level == "fail"] == []
        assert room.fsck().ok
        assert room.principal_ls()[0]["path"] == OWNER
        next_one = room.put(old.parent / "m", "acme/tiny")
        assert next_one.ref == "acme/tiny@3"
    before, now = read(old, "acme/tiny@2"), read(old, "acme/tiny@3")
    assert before.keys() == now.keys()


def test_the_database_of_before_is_kept_beside_it(old):
    before = (old / "room.db").read_bytes()
    upgrade(old, owner=OWNER)
    backup = old / "room.db.schema-1"
    assert backup.stat().st_mode & 0o077 == 0
    with sa.create_engine(f"sqlite:///{backup}").connect() as was:
        assert was.exec_driver_sql("SELECT version FROM strongroom_schema").scalar() == 1
        assert was.exec_driver_sql("SELECT count(*) FROM principals").scalar() == 1
    assert len(before) <= backup.stat().st_size + 4096


def test_twice_is_once(old):
    upgrade(old, owner=OWNER)
    with pytest.raises(Conflict) as caught:
        upgrade(old, owner=OWNER)
    assert caught.value.code == "upgrade.not_needed"


@pytest.mark.parametrize("step", ["migrate", "begin", "first put", "room.json"])
def test_interrupted_it_goes_on(old, monkeypatch, step):
    class Killed(Exception):
        pass

    def die(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        match step:
            case "migrate":
                patch.setattr("strongroom.storage.db._run_migrations", die)
            case "begin":
                patch.setattr(module, "_record", die)
            case "first put":
                patch.setattr(module, "_put", lambda *_: die)
            case _:
                patch.setattr(RoomConfig, "write", die)
        with pytest.raises(Killed):
            upgrade(old, owner=OWNER)
    if step == "migrate":  # the copy was made, and nothing else
        with pytest.raises(Conflict) as caught:
            upgrade(old, owner=OWNER)
        assert caught.value.code == "db.backup_exists"
        (old / "room.db.schema-1").unlink()
    if step in ("first put", "room.json"):
        with pytest.raises(Conflict) as caught:
            upgrade(old, owner="user/eve")
        assert caught.value.code == "upgrade.owner"
    upgrade(old, owner=OWNER)
    with Room(old, OWNER) as room:
        assert room.log.verify()["ok"]
        assert [entry["type"] for entry in room.log.tail(10)].count("put") == 3


def test_a_row_that_does_not_hold_together_stops_it(old):
    with sa.create_engine(f"sqlite:///{old}/room.db").begin() as tx:
        tx.exec_driver_sql("UPDATE versions SET manifest_sha256 = 'x' WHERE number = 2")
    with pytest.raises(StrongroomError):
        upgrade(old, owner=OWNER)
    assert RoomConfig.read(old, older=True).log_key == b""


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_a_database_that_was_migrated_is_like_one_that_is_new(tmp_path, request, kind):
    if kind == "postgresql":
        server = request.getfixturevalue("postgresql_server")
        urls = []
        for name in ("older", "newer"):
            server.psql(f"CREATE DATABASE {name};")
            urls.append(server.get_uri(database=name))
    else:
        urls = [f"sqlite:///{tmp_path}/{name}.db" for name in ("older", "newer")]
    for url in urls:
        Database.open(url, create=True).close()
    made = Database.open(urls[0])
    with made.transaction() as tx:
        for table in ("log_state", "log_entries", "log_nodes", "log_private", "log_snapshot", "documents", "egress"):
            metadata.tables[table].drop(tx)
        tx.exec_driver_sql(
            "CREATE TABLE principals (path TEXT PRIMARY KEY, created_at TEXT NOT NULL, suspended_at TEXT)"
        )
        tx.exec_driver_sql("UPDATE strongroom_schema SET version = 1")
    made.close()
    with pytest.raises(BackendError) as caught:
        Database.open(urls[0])
    assert caught.value.code == "db.older_schema"
    assert Database.migrate(urls[0]) == 1
    assert Database.migrate(urls[0]) == SCHEMA  # nothing is left to do
    told = []
    for url in urls:
        database = Database.open(url)
        look = sa.inspect(database._engine)
        tables = {name for name in look.get_table_names() if name != "alembic_version"}
        told.append(
            {
                name: (
                    [(each["name"], str(each["type"]), each["nullable"]) for each in look.get_columns(name)],
                    look.get_pk_constraint(name)["constrained_columns"],
                    sorted(each["sqltext"] for each in look.get_check_constraints(name)),
                )
                for name in tables
            }
        )
        database.close()
    assert told[0] == told[1]


def test_a_team_owns_no_room(tmp_path):
    for make in (
        lambda: Vault.init(tmp_path / "new", owner="team/x"),
        lambda: upgrade(tmp_path / "old", owner="team/x"),
    ):
        with pytest.raises(UsageError) as caught:
            make()
        assert caught.value.code == "init.owner"


def test_what_was_begun_goes_on_as_it_was_begun(old, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(RoomConfig, "write", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            upgrade(old, owner=OWNER, custody="solo")
    with pytest.raises(Conflict) as caught:
        upgrade(old, owner=OWNER, custody="team")
    assert caught.value.code == "upgrade.custody"
    upgrade(old, owner=OWNER, custody="solo")


@pytest.mark.parametrize("schema", [0, -5])
def test_a_schema_that_no_release_has_made(old, schema):
    engine = sa.create_engine(f"sqlite:///{old}/room.db")
    with engine.begin() as tx:
        (name,) = [table for table in sa.inspect(tx).get_table_names() if "schema" in table]
        tx.execute(sa.text(f"UPDATE {name} SET version = {schema}"))
    engine.dispose()
    with pytest.raises(StrongroomError):
        upgrade(old, owner=OWNER)


def test_a_room_with_a_log_and_an_older_database(tmp_path, monkeypatch):
    """One of schema 2, before egress was counted: nothing but the table is missing, and its owner stays who it is."""
    monkeypatch.setenv("STRONGROOM_STATE", str(tmp_path / "state"))
    folder = tmp_path / "room"
    Room.init(folder, owner=OWNER, custody="solo")[0].close()
    with sa.create_engine(f"sqlite:///{folder}/room.db").begin() as tx:
        tx.exec_driver_sql("DROP TABLE egress")
        tx.exec_driver_sql("UPDATE strongroom_schema SET version = 2")
    with pytest.raises(BackendError) as caught:
        Room(folder)
    assert caught.value.code == "db.older_schema"
    assert (folder / "log").is_dir()
    done = upgrade(folder, owner="user/somebody")
    assert (done.schema, done.versions) == (2, 0)
    assert (folder / "room.db.schema-2").is_file()
    with Room(folder, OWNER) as room:
        assert [each["path"] for each in room.principal_ls()] == [OWNER]
        assert room.log.verify()["ok"]
        assert room.fsck().ok
    with pytest.raises(Conflict) as caught:
        upgrade(folder, owner=OWNER)
    assert caught.value.code == "upgrade.not_needed"
