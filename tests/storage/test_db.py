"""The database: what it guarantees across processes, kills, full and damaged disks, and what it refuses."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import sqlite3
import stat
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateTable

from strongroom.errors import BackendError, Conflict, StrongroomError, UsageError
from strongroom.storage import db as module
from strongroom.storage.db import SCHEMA, Database, documents, log_entries, metadata, put_packs, puts, room, versions
from strongroom.storage.prepared import Prepared

NOW = "2026-01-02T03:04:05Z"
A_PACK = {
    "put_id": "p1",
    "kind": 0,
    "ordinal": 0,
    "first": 0,
    "count": 1,
    "pack_id": "aa",
    "digest": "bb",
    "progress": "{}",
    "mac": "{}",
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "room.db"


@pytest.fixture
def database(path):
    opened = Database.open(f"sqlite:///{path}", create=True)
    yield opened
    opened.close()


def a_version(**changes: object) -> dict[str, object]:
    row = {
        "version_id": os.urandom(16).hex(),
        "name": "acme/tiny",
        "number": 1,
        "state": "active",
        "revision": 1,
        "manifest_sha256": "00" * 32,
        "record": b"sealed",
        "bytes": 1 << 50,
        "stored_bytes": 1 << 51,
        "segments": 1 << 40,
        "positions": 16384,
        "created_at": NOW,
        "created_by": "user/ana",
    }
    return {**row, **changes}


def a_put(**changes: object) -> dict[str, object]:
    row = {
        "put_id": "p1",
        "name": "acme/tiny",
        "fingerprint": "f",
        "version_id": "v",
        "revision": 1,
        "record": b"sealed",
        "created_at": NOW,
        "created_by": "user/ana",
    }
    return {**row, **changes}


def add(database: Database, table: sa.Table, **values: object) -> None:
    add_all(database, (table, values))


def add_all(database: Database, *rows: tuple[sa.Table, dict[str, object]], error: Exception | None = None) -> None:
    """All the rows in one transaction, which then raises `error` if there is one."""
    with database.transaction() as tx:
        for table, values in rows:
            tx.execute(sa.insert(table).values(**values))
        if error:
            raise error


def count(database: Database, table: sa.Table) -> int:
    with database.reading() as tx:
        return tx.execute(sa.select(sa.func.count()).select_from(table)).scalar_one()


def _program(script: str, *arguments: str) -> subprocess.Popen:
    head = (
        "import sys\nimport sqlalchemy as sa\nfrom strongroom.storage.db import Database, documents, puts, versions\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", head + textwrap.dedent(script), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# -- settings ---------------------------------------------------------------------------------------------------------


def test_every_connection_is_durable_strict_and_forgetful(database):
    expected = {
        "journal_mode": "wal",
        "synchronous": 2,
        "foreign_keys": 1,
        "secure_delete": 1,
        "busy_timeout": 30_000,
        "trusted_schema": 0,
        "cell_size_check": 1,
    }
    found: list[dict[str, object]] = []

    def look() -> None:
        with database.reading() as tx:
            found.append({name: tx.exec_driver_sql(f"PRAGMA {name}").scalar() for name in expected})

    for _ in range(2):
        threads = [threading.Thread(target=look) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        database.close()
    assert found == [expected] * 6


def test_only_the_owner_may_look(path):
    old = os.umask(0)
    try:
        database = Database.open(f"sqlite:///{path}", create=True)
        add(database, documents, digest="ana", data=b"text")
        for file in (path, path.with_name("room.db-wal"), path.with_name("room.db-shm")):
            assert stat.S_IMODE(file.stat().st_mode) == 0o600
    finally:
        os.umask(old)
    database.close()


def test_rows_come_back_as_they_were(database):
    kept = {
        room: {
            "room_id": "ab" * 16,
            "created_at": NOW,
            "keystore_uri": "file:keys/room.key",
            "wrapped_room_key": bytes(range(256)),
            "secrets": b"\0",
            "recovery_threshold": 2,
            "recovery_shares": 3,
            "key_epoch": 1,
        },
        documents: {"digest": "ana", "data": bytes(range(256))},
        versions: a_version(),
        puts: a_put(),
        put_packs: {**A_PACK, "first": 1 << 40, "count": 1 << 41},
    }
    for table, values in kept.items():
        add(database, table, **values)
    with database.reading() as tx:
        for table, values in kept.items():
            row = tx.execute(sa.select(table)).mappings().one()
            assert {name: row[name] for name in values} == values
            assert all(row[name] is None for name in set(row) - set(values))


def test_the_tables_suit_postgresql():
    ddl = {
        table.name: str(CreateTable(table).compile(dialect=postgresql.dialect())) for table in metadata.sorted_tables
    }
    for name in ("bytes", "stored_bytes", "segments", "positions"):
        assert re.search(rf"\b{name} BIGINT NOT NULL", ddl["versions"])
    assert "wrapped_room_key BYTEA NOT NULL" in ddl["room"]
    assert "ON DELETE CASCADE" in ddl["put_packs"]
    assert not re.search(r"\bSERIAL\b", "".join(ddl.values()))


# -- transactions -----------------------------------------------------------------------------------------------------


def test_a_transaction_is_all_or_nothing(database):
    ana = (documents, {"digest": "ana", "data": b"text"})
    mine = ZeroDivisionError("mine")
    with pytest.raises(ZeroDivisionError) as caught:
        add_all(database, ana, error=mine)
    assert caught.value is mine
    with pytest.raises(Conflict):
        add_all(database, ana, ana)
    assert count(database, documents) == 0
    add_all(database, ana)


@pytest.mark.parametrize(
    ("table", "values"),
    [
        (versions, [a_version(), a_version()]),  # two versions of one number
        (versions, [a_version(number=0)]),
        (versions, [a_version(state="lost")]),
        (versions, [a_version(record=None)]),  # active, with no key
        (versions, [a_version(state="shredded")]),  # shredded, and the key still there
        (versions, [a_version(bytes=None)]),
        (puts, [a_put(), a_put()]),
        (put_packs, [{**A_PACK, "put_id": "none"}]),
    ],
)
def test_what_contradicts_the_schema_is_a_conflict(database, table, values):
    with pytest.raises(Conflict) as caught:
        add_all(database, *((table, row) for row in values))
    assert caught.value.code == "db.conflict"
    assert count(database, table) == 0


def test_entries_go_to_their_positions_or_none_does(database):
    def stored():
        with database.reading() as tx:
            return [tuple(row) for row in tx.execute(sa.select(log_entries).order_by(log_entries.c.position))]

    with database.transaction() as tx:
        database.add_entries(tx, 3, [b"\x00\xff'", b"", b"{}"])
    assert stored() == [(3, b"\x00\xff'"), (4, b""), (5, b"{}")]
    with pytest.raises(Conflict), database.transaction() as tx:
        database.add_entries(tx, 1, [b"a", b"b", b"c"])
    assert len(stored()) == 3
    many = [str(number).encode() for number in range(200)]  # of several statements
    with database.transaction() as tx:
        database.add_entries(tx, 6, many)
    assert stored()[3:] == list(enumerate(many, 6))
    with pytest.raises(Conflict), database.transaction() as tx:
        database.add_entries(tx, 205 - 150, [b"x"] * 160)
    assert len(stored()) == 203


def test_a_prepared_statement_is_compiled_once_for_all_rooms(tmp_path):
    class Counted:
        times = 0

        def compile(self, dialect):
            self.times += 1
            return kept.compile(dialect=dialect)

    kept = sa.select(documents).where(
        documents.c.digest >= sa.bindparam("begin"), documents.c.digest < sa.bindparam("end")
    )
    statement = Prepared(counted := Counted())
    for name in ("one", "two"):
        with contextlib.closing(Database.open(f"sqlite:///{tmp_path}/{name}.db", create=True)) as database:
            with database.transaction() as tx:
                for digest in ("a", "b", "c"):
                    tx.execute(sa.insert(documents).values(digest=f"{digest} of {name}", data=b"\0\xff'"))
                found = statement(tx, begin="b", end="c").all()
            assert [(row.digest, row.data) for row in found] == [(f"b of {name}", b"\0\xff'")]
            with database.transaction() as tx:
                tx.exec_driver_sql("DROP TABLE documents")
            with pytest.raises(BackendError), database.reading() as tx:
                statement(tx, begin="b", end="c")
    assert counted.times == 1
    assert "%(begin)s" in Prepared(kept).text_for(postgresql.psycopg.dialect())[0]


def test_packs_of_a_put_go_with_it(database):
    add(database, puts, **a_put())
    add(database, put_packs, **A_PACK)
    with database.transaction() as tx:
        tx.execute(sa.delete(puts))
    assert count(database, put_packs) == 0


def test_a_shredded_record_is_gone_from_the_files(database, path):
    secret = os.urandom(16).hex().encode() * 8
    add(database, versions, **a_version(record=secret))
    database.scrub()
    assert secret in path.read_bytes()
    with database.transaction() as tx:
        tx.execute(sa.update(versions).values(state="shredded", record=None, shredded_at=NOW))
    database.scrub()
    for file in path.parent.iterdir():
        assert secret not in file.read_bytes(), file.name


def test_scrub_says_so_when_it_cannot(database, path, monkeypatch):
    monkeypatch.setattr(module, "_BUSY_MS", 50)
    other = Database.open(f"sqlite:///{path}")
    with other.reading() as tx:
        tx.execute(sa.select(documents)).all()
        add(database, documents, digest="ana", data=b"text")
        with pytest.raises(BackendError) as caught:
            Database.open(f"sqlite:///{path}").scrub()
    assert caught.value.code == "db.busy"
    other.close()
    database.scrub()


def test_readers_do_not_wait_and_see_one_state(database, path):
    other = Database.open(f"sqlite:///{path}")
    with database.transaction() as writing:
        writing.execute(sa.insert(documents).values(digest="ana", data=b"text"))
        assert count(other, documents) == 0
    with other.reading() as tx:
        assert len(tx.execute(sa.select(documents)).all()) == 1
        add(database, documents, digest="bo", data=b"text")
        assert len(tx.execute(sa.select(documents)).all()) == 1
    assert count(other, documents) == 2
    other.close()


def test_two_processes_write_at_once(database, path):
    """Each reads the newest number and writes the next one: no number is lost or given twice."""
    script = """
        database = Database.open("sqlite:///" + sys.argv[1])
        sys.stdin.readline()
        for k in range(100):
            with database.transaction() as tx:
                newest = tx.execute(sa.select(sa.func.max(versions.c.number))).scalar() or 0
                tx.execute(sa.insert(versions).values(
                    version_id=f"{sys.argv[2]}-{k}", name="acme/tiny", number=newest + 1, state="active", revision=1,
                    manifest_sha256="", record=b"x", bytes=1, stored_bytes=1, segments=1, positions=1,
                    created_at="", created_by=""))
    """
    programs = [_program(script, str(path), name) for name in ("one", "two")]
    for program in programs:
        program.stdin.write("go\n")
        program.stdin.flush()
    for program in programs:
        _, errors = program.communicate(timeout=120)
        assert program.returncode == 0, errors
    with database.reading() as tx:
        numbers = tx.execute(sa.select(versions.c.number).order_by(versions.c.number)).scalars().all()
    assert numbers == list(range(1, 201))


def test_two_processes_make_the_database_at_once(path):
    programs = [
        _program("sys.stdin.readline(); Database.open('sqlite:///' + sys.argv[1], create=True)", str(path))
        for _ in range(3)
    ]
    for program in programs:
        program.stdin.write("go\n")
        program.stdin.flush()
    for program in programs:
        _, errors = program.communicate(timeout=120)
        assert program.returncode == 0, errors
    database = Database.open(f"sqlite:///{path}")
    assert database.check() == []
    database.close()


def test_another_writer_is_waited_for_and_then_told(database, path, monkeypatch):
    monkeypatch.setattr(module, "_BUSY_MS", 100)
    impatient = Database.open(f"sqlite:///{path}")
    with database.transaction(), pytest.raises(BackendError) as caught, impatient.transaction():
        pytest.fail("two writers at once")
    assert caught.value.code == "db.busy"
    impatient.close()


def test_a_transaction_within_a_transaction_is_a_mistake(database):
    with database.transaction(), pytest.raises(RuntimeError, match="nest"), database.transaction():
        pytest.fail("nested")
    add(database, documents, digest="ana", data=b"text")


@pytest.mark.parametrize("point", ["begun", "written", "many", "committed"])
def test_killed_within_a_transaction_the_database_is_as_before_or_after(database, path, point):
    add(database, documents, digest="before", data=b"text")
    script = """
        database = Database.open("sqlite:///" + sys.argv[1])
        def here(point):
            if point == sys.argv[2]:
                print("here", flush=True)
                sys.stdin.readline()
        with database.transaction() as tx:
            here("begun")
            tx.execute(sa.insert(documents).values(digest="during", data=b"text"))
            here("written")
            for k in range(3000):  # more than the page cache holds: pages reach the log before the commit
                tx.execute(sa.insert(puts).values(put_id=str(k), name="", fingerprint="", version_id="", revision=1,
                                                  record=bytes(4000), created_at="", created_by=""))
            here("many")
        here("committed")
    """
    program = _program(script, str(path), point)
    assert program.stdout.readline() == "here\n", program.stderr.read()
    program.send_signal(signal.SIGKILL)
    program.communicate()
    expected = (2, 3000) if point == "committed" else (1, 0)
    assert (count(database, documents), count(database, puts)) == expected
    assert database.check() == []
    add(database, documents, digest="after", data=b"text")
    database.close()
    again = Database.open(f"sqlite:///{path}")
    assert (count(again, documents), count(again, puts)) == (expected[0] + 1, expected[1])
    again.close()


# -- opening ----------------------------------------------------------------------------------------------------------


def test_opening_again_finds_what_was_written(path):
    for k in range(3):
        database = Database.open(f"sqlite:///{path}", create=True)
        add(database, documents, digest=f"{k}", data=b"text")
        assert count(database, documents) == k + 1
        database.close()


@pytest.mark.parametrize("name", ["a room?x=1#y.db", "100%.db", "naïve.db", "sqlite:.db"])
def test_the_path_is_taken_literally(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for url in (f"sqlite:///{tmp_path}/{name}", f"sqlite:{tmp_path}/{name}", f"sqlite:{name}", f"sqlite:///{name}"):
        database = Database.open(url, create=True)
        database.close()
    assert {file.name for file in tmp_path.iterdir()} == {name}


def test_a_database_that_is_not_there(path):
    with pytest.raises(BackendError) as caught:
        Database.open(f"sqlite:///{path}")
    assert caught.value.code == "db.missing"
    assert not path.exists()
    with pytest.raises(BackendError) as caught:
        Database.open(f"sqlite:///{path.parent}/none/room.db", create=True)
    assert caught.value.code == "db.unreachable"
    path.touch()
    with pytest.raises(BackendError) as caught:
        Database.open(f"sqlite:///{path}")
    assert caught.value.code == "db.missing"


@pytest.mark.parametrize("create", [False, True])
def test_a_newer_schema_is_refused_and_not_touched(database, path, create):
    with database.transaction() as tx:
        tx.execute(sa.update(metadata.tables["strongroom_schema"]).values(version=SCHEMA + 1))
    database.scrub()
    database.close()
    before = path.read_bytes()
    with pytest.raises(BackendError) as caught:
        Database.open(f"sqlite:///{path}", create=create)
    assert caught.value.code == "db.newer_schema"
    assert "newer Strongroom" in caught.value.hint
    assert caught.value.evidence == {"schema": SCHEMA + 1, "known": SCHEMA}
    assert path.read_bytes() == before


def test_a_damaged_database_is_said_to_be(database, path):
    for k in range(300):
        add(database, puts, **a_put(put_id=str(k), record=bytes(2000)))
    database.scrub()
    database.close()
    whole = path.read_bytes()
    codes = set()
    for start in range(0, len(whole), 4096 * 7):
        broken = bytearray(whole)
        broken[start : start + 4096] = os.urandom(4096)
        path.write_bytes(broken)
        try:
            opened = Database.open(f"sqlite:///{path}")
            faults = opened.check()
            with opened.reading() as tx:
                tx.execute(sa.select(puts)).all()
            opened.close()
            assert faults, start  # if not refused, then found
        except BackendError as error:
            codes.add(error.code)
    assert codes == {"db.damaged"}


@pytest.mark.parametrize("content", [b"x" * 4096, b"SQLite format 3\0" + b"\xff" * 4080])
def test_what_is_no_database(path, content):
    path.write_bytes(content)
    for create in (False, True):
        with pytest.raises(BackendError) as caught:
            Database.open(f"sqlite:///{path}", create=create)
        assert caught.value.code == "db.damaged"
    assert path.read_bytes() == content


def test_the_limit_on_file_sizes(database, path):
    """The kernel refuses the log's growth in the middle of a transaction; what was committed stays."""
    add(database, documents, digest="before", data=b"text")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
    try:
        with pytest.raises(BackendError) as caught:
            add_all(
                database,
                (documents, {"digest": "during", "data": b"text"}),
                (puts, a_put(record=bytes(4_000_000))),
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.code == "db.failed"  # SQLite takes it for an I/O error
    assert count(database, documents) == 1
    add(database, documents, digest="after", data=b"text")
    assert database.check() == []


def test_a_disk_that_is_full_and_then_read_only(tmp_path, in_namespace):
    found = in_namespace(
        """
        import sqlalchemy as sa
        from strongroom.errors import BackendError
        from strongroom.storage.db import Database, documents, puts
        folder = sys.argv[1]
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], check=True)
        database = Database.open(f"sqlite:///{folder}/room.db", create=True)

        def add(path, size):
            try:
                with database.transaction() as tx:
                    tx.execute(sa.insert(documents).values(digest=path, data=b"text"))
                    tx.execute(sa.insert(puts).values(put_id=path, name="", fingerprint="", version_id="", revision=1,
                                                      record=bytes(size), created_at="", created_by=""))
            except BackendError as error:
                return [error.code, error.hint]

        def names():
            with database.reading() as tx:
                return tx.execute(sa.select(documents.c.digest)).scalars().all()

        codes = [add("before", 10), add("during", 4_000_000), add("after", 10)]
        kept, faults = names(), database.check()
        subprocess.run(["mount", "-o", "remount,size=9m", folder], check=True)
        database.scrub()
        database.close()
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        codes.append(add("late", 10))
        print(json.dumps({"codes": codes, "names": sorted(kept), "faults": faults}))
        """,
        str(tmp_path),
    )
    first, full, after, late = found["codes"]
    assert first is after is None
    assert full[0] == "db.full"
    assert late[0] == "db.unreachable"  # SQLite can't even read where it may not keep its log
    assert "writable" in late[1]
    assert found["names"] == ["after", "before"]
    assert found["faults"] == []


def test_a_database_that_may_not_be_written(database):
    with database.reading() as tx:
        tx.exec_driver_sql("PRAGMA query_only=ON")
    with pytest.raises(BackendError) as caught:
        add(database, documents, digest="ana", data=b"text")
    assert caught.value.code == "db.read_only"


@pytest.mark.parametrize(
    ("url", "kind", "code"),
    [
        ("", UsageError, "db.malformed_url"),
        ("room.db", UsageError, "db.malformed_url"),
        ("sqlite:", UsageError, "db.malformed_url"),
        ("sqlite://", UsageError, "db.malformed_url"),
        ("sqlite://host/x", UsageError, "db.malformed_url"),
        ("sqlite::memory:", UsageError, "db.malformed_url"),
        ("sqlite:///:memory:", UsageError, "db.malformed_url"),
        ("mysql://host/x", UsageError, "db.unknown_scheme"),
        ("postgresql+nodriver://u:hunter2@127.0.0.1:1/x", UsageError, "db.no_driver"),
        ("postgresql://u:hunter2@127.0.0.1:nonsense/x", UsageError, "db.malformed_url"),
    ],
)
def test_urls_that_name_no_database(url, kind, code):
    with pytest.raises(kind) as caught:
        Database.open(url)
    assert caught.value.code == code
    assert "hunter2" not in str(caught.value)


@given(url=st.text(max_size=60).filter(lambda url: not url.lower().startswith(("sqlite:", "sqlite+", "postgresql"))))
def test_any_text_is_no_database_of_ours(url):
    with pytest.raises(UsageError):
        Database.open(url)


def test_errors_quote_no_values(database):
    """Rows hold sealed keys; a driver's message may quote what it was given."""
    secret = "never-in-a-message"
    for values in ({"digest": secret, "data": b"x"}, {"digest": secret, "data": None}, {"digest": secret}):
        for _ in range(2):
            try:
                add(database, documents, **values)
            except StrongroomError as error:
                assert secret not in str(error)
                assert secret not in str(error.as_json())
                assert error.__cause__ is None


def test_every_error_of_sqlite_is_one_of_ours(database):
    for number, code in [
        (sqlite3.SQLITE_BUSY, "db.busy"),
        (sqlite3.SQLITE_FULL, "db.full"),
        (sqlite3.SQLITE_IOERR_FSYNC, "db.failed"),
        (sqlite3.SQLITE_READONLY_DBMOVED, "db.read_only"),
        (sqlite3.SQLITE_CORRUPT_VTAB, "db.damaged"),
        (sqlite3.SQLITE_CANTOPEN_ISDIR, "db.unreachable"),
        (sqlite3.SQLITE_TOOBIG, "db.failed"),
    ]:
        error = sqlite3.OperationalError("text")
        error.sqlite_errorcode, error.sqlite_errorname = number, "NAME"
        with pytest.raises(BackendError) as caught, database.transaction():
            raise error
        assert caught.value.code == code
    with pytest.raises(BackendError) as caught, database.transaction() as tx:
        tx.exec_driver_sql("SELECT nonsense")
    assert caught.value.code == "db.failed"


def test_the_database_is_one_file_in_its_folder(database, path):
    assert database.url == f"sqlite:///{path}"
    database.close()
    assert [file.name for file in Path(path.parent).iterdir()] == ["room.db"]
