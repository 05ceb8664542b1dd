"""The database: which versions there are, where their packs lie, the room's wrapped keys, and the log. SQLite or
PostgreSQL.

The database is trusted with no plaintext and no unwrapped key: whatever is secret in a column (wrapped_room_key,
secrets, recovery_sealed, record) is sealed, and bound to its row by its own associated data. Numbers of bytes are
BIGINT, times are RFC 3339 UTC text, identifiers are lower-case hexadecimal text.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, NoSuchModuleError, SQLAlchemyError

from strongroom.core.files import sync_folder
from strongroom.errors import BackendError, Conflict, Tampered, UsageError

SCHEMA = 3
_BUSY_MS = 30_000
_ROWS = 64  # of a statement, twice as many parameters: any SQLite takes 999
_SEQUENCER = 0x5374726F6E67  # the key of PostgreSQL's advisory lock: one room to a database

metadata = sa.MetaData()

_schema = sa.Table(
    "strongroom_schema", metadata, sa.Column("version", sa.Integer, primary_key=True, autoincrement=False)
)

room = sa.Table(
    "room",
    metadata,
    sa.Column("room_id", sa.Text, primary_key=True),
    sa.Column("created_at", sa.Text, nullable=False),
    sa.Column("keystore_uri", sa.Text, nullable=False),
    sa.Column("wrapped_room_key", sa.LargeBinary, nullable=False),
    sa.Column("secrets", sa.LargeBinary, nullable=False),  # sealed under the room key
    sa.Column("recovery_sealed", sa.LargeBinary),
    sa.Column("recovery_threshold", sa.Integer),
    sa.Column("recovery_shares", sa.Integer),
    sa.Column("recovery_proven_at", sa.Text),
    sa.Column("key_epoch", sa.Integer, nullable=False),
)

versions = sa.Table(
    "versions",
    metadata,
    sa.Column("version_id", sa.Text, primary_key=True),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("number", sa.Integer, sa.CheckConstraint("number >= 1", name="versions_number"), nullable=False),
    sa.Column(
        "state", sa.Text, sa.CheckConstraint("state IN ('active', 'shredded')", name="versions_state"), nullable=False
    ),
    sa.Column("revision", sa.Integer, nullable=False),
    sa.Column("manifest_sha256", sa.Text, nullable=False),
    sa.Column("record", sa.LargeBinary),  # sealed under the room key; null once shredded
    sa.Column("bytes", sa.BigInteger, nullable=False),
    sa.Column("stored_bytes", sa.BigInteger, nullable=False),
    sa.Column("segments", sa.BigInteger, nullable=False),
    sa.Column("positions", sa.BigInteger, nullable=False),
    sa.Column("created_at", sa.Text, nullable=False),
    sa.Column("created_by", sa.Text, nullable=False),
    sa.Column("shredded_at", sa.Text),
    sa.UniqueConstraint("name", "number", name="versions_name_number"),
    # A shredded version has no key left, an active one has: a half-done shred can't be recorded.
    sa.CheckConstraint("(state = 'shredded') = (record IS NULL)", name="versions_record"),
)

puts = sa.Table(
    "puts",
    metadata,
    sa.Column("put_id", sa.Text, primary_key=True),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("fingerprint", sa.Text, nullable=False, index=True),
    sa.Column("version_id", sa.Text, nullable=False),
    sa.Column("revision", sa.Integer, nullable=False),
    sa.Column("record", sa.LargeBinary, nullable=False),  # sealed under the room key
    sa.Column("created_at", sa.Text, nullable=False),
    sa.Column("created_by", sa.Text, nullable=False),
)

put_packs = sa.Table(
    "put_packs",
    metadata,
    sa.Column("put_id", sa.Text, sa.ForeignKey("puts.put_id", ondelete="CASCADE"), primary_key=True),
    sa.Column("kind", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("ordinal", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("first", sa.BigInteger, nullable=False),
    sa.Column("count", sa.BigInteger, nullable=False),
    sa.Column("pack_id", sa.Text, nullable=False),
    sa.Column("digest", sa.Text, nullable=False),
    sa.Column("progress", sa.Text, nullable=False),
    sa.Column("mac", sa.Text, nullable=False),
)


# The log (spec/ledger.md). Nothing in these tables is believed: entries and nodes are checked against the signed
# checkpoint, documents against their digest, private values against their commitment, the snapshot by its signature.
log_state = sa.Table(
    "log_state",
    metadata,
    sa.Column(
        "id", sa.Integer, sa.CheckConstraint("id = 1", name="log_state_one"), primary_key=True, autoincrement=False
    ),
    sa.Column("size", sa.BigInteger, nullable=False),
    sa.Column("checkpoint", sa.LargeBinary, nullable=False),
)

log_entries = sa.Table(
    "log_entries",
    metadata,
    sa.Column("position", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("entry", sa.LargeBinary, nullable=False),
)

# Hashes of complete subtrees of every eighth level from 8 on, as in tiles; the leaves are those of the entries.
log_nodes = sa.Table(
    "log_nodes",
    metadata,
    sa.Column("level", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("position", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("hash", sa.LargeBinary, nullable=False),
)

log_private = sa.Table(
    "log_private",
    metadata,
    sa.Column("position", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("value", sa.Text, nullable=False),
    sa.Column("salt", sa.LargeBinary, nullable=False),
)

log_snapshot = sa.Table(
    "log_snapshot",
    metadata,
    sa.Column(
        "id", sa.Integer, sa.CheckConstraint("id = 1", name="log_snapshot_one"), primary_key=True, autoincrement=False
    ),
    sa.Column("data", sa.LargeBinary, nullable=False),
)

documents = sa.Table(
    "documents",
    metadata,
    sa.Column("digest", sa.Text, primary_key=True),
    sa.Column("data", sa.LargeBinary, nullable=False),
)

# Bits that left (spec/gateway.md, section 5): what each scope has used in each window. `start`: the window's first
# second, Unix time. The row of scope "clock" has the newest time that any worker has seen, as its `used`.
egress = sa.Table(
    "egress",
    metadata,
    sa.Column("scope", sa.Text, primary_key=True),
    sa.Column("period", sa.Text, primary_key=True),
    sa.Column("start", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("who", sa.Text, primary_key=True),
    sa.Column("ref", sa.Text, primary_key=True),
    sa.Column("used", sa.BigInteger, sa.CheckConstraint("used >= 0", name="egress_used"), nullable=False),
)


class Database:
    """One room's database. Thread-safe; every transaction has a connection of its own.

    Transactions that write run one after another, also across processes: on SQLite each takes the write lock when it
    begins (so that no check in it is ever outdated when it commits), on PostgreSQL they are SERIALIZABLE.
    """

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        self._inside = threading.local()

    @classmethod
    def open(cls, url: str, *, create: bool = False) -> Database:
        """The database at ``sqlite:///path``, ``sqlite:path`` or ``postgresql://user@host/name``.

        With `create`, file and tables are made where they are missing.

        UsageError for a URL that names no database we know or whose driver is not installed; BackendError for one that
        is missing ("db.missing"), damaged, unreachable, or written by a newer Strongroom ("db.newer_schema").
        """
        path = _sqlite_path(url)
        database = cls(_server_engine(url) if path is None else _sqlite_engine(path, create=create))
        try:
            if create:
                database.create_all()
            database._check_schema()
        except BaseException:
            database.close()
            raise
        return database

    @classmethod
    def migrate(cls, url: str) -> int:
        """Bring the database at `url` to this release's schema, all of it or nothing; the schema that it had. A SQLite
        file is copied first, beside it. Errors as `open`; Conflict ``db.backup_exists``."""
        path = _sqlite_path(url)
        database = cls(_server_engine(url) if path is None else _sqlite_engine(path, create=False))
        try:
            with database.reading() as tx:
                found = database._schema_of(tx)
            if found is not None and found < SCHEMA:
                if path is not None:
                    _copy(path, path.with_name(f"{path.name}.schema-{found}"))
                with database.transaction() as tx:
                    _run_migrations(tx, found)
            database._check_schema()
        finally:
            database.close()
        return found or 0

    @property
    def url(self) -> str:
        """Where the database is, without its password."""
        return self._engine.url.render_as_string(hide_password=True)

    def create_all(self) -> None:
        """Make the tables that are missing; no change where all are there."""
        with self.transaction() as tx:
            if not sa.inspect(tx).has_table(_schema.name):
                metadata.create_all(tx)
                tx.execute(sa.insert(_schema).values(version=SCHEMA))

    @contextmanager
    def transaction(self) -> Iterator[sa.Connection]:
        """Read and write: committed and durable when the block ends, undone when it raises. Does not nest.

        Conflict ("db.conflict") when a constraint refuses what was written, BackendError for all else that a database
        may answer: db.busy (another writer for 30 s, or a lost race: try again), db.full, db.read_only, db.damaged,
        db.unreachable, db.failed.
        """
        with self._session("BEGIN IMMEDIATE") as connection:
            yield connection

    @contextmanager
    def sequencing(self) -> Iterator[sa.Connection]:
        """As `transaction`, and no other process is in one of these until it ends; what was committed before it began
        is seen. `savepoint` undoes a part of it. Errors as `transaction`."""
        if self._engine.dialect.name != "postgresql":
            with self.transaction() as connection:
                yield connection
            return
        # Not SERIALIZABLE: its snapshot is taken before the lock is had, and would be outdated once it is.
        with self._session("", isolation_level="READ COMMITTED") as connection:
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_SEQUENCER)))
            yield connection

    @contextmanager
    def counting(self) -> Iterator[sa.Connection]:
        """As `transaction`, for counters that many processes move: a row that one has written in it waits for no retry,
        but for that one's end, and is then seen as it was left. Errors as `transaction`."""
        if self._engine.dialect.name != "postgresql":
            with self.transaction() as connection:
                yield connection
            return
        with self._session("", isolation_level="READ COMMITTED") as connection:
            yield connection

    @contextmanager
    def savepoint(self, tx: sa.Connection) -> Iterator[None]:
        """A part of a transaction that is undone alone when it raises. Errors as `transaction`."""
        with _mapped(), tx.begin_nested():
            yield

    def add_entries(self, tx: sa.Connection, first: int, entries: Sequence[bytes]) -> None:
        """Store entries of the log at the positions from `first` on; Conflict where there is one. Few statements, and
        past SQLAlchemy, which would spend longer on each entry than all else that appends it."""
        if self._engine.dialect.name == "sqlite":
            for begin in range(0, len(entries), _ROWS):
                rows = entries[begin : begin + _ROWS]
                values: list[Any] = []
                for row in enumerate(rows, first + begin):
                    values += row
                tx.exec_driver_sql(_insert_of(len(rows)), tuple(values))
            return
        tx.exec_driver_sql(
            "INSERT INTO log_entries (position, entry)"
            " SELECT %s + n - 1, entry FROM unnest(%b::bytea[]) WITH ORDINALITY AS given (entry, n)",
            (first, list(entries)),
        )

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """Read only, from one consistent state, without waiting for writers. Errors as `transaction`."""
        # Not SERIALIZABLE, either: who only reads would be undone, or undo a writer, whose changes it has not seen.
        options = {"isolation_level": "REPEATABLE READ"} if self._engine.dialect.name == "postgresql" else {}
        with self._session("BEGIN", **options) as connection:
            yield connection

    def scrub(self) -> None:
        """Overwrite what was deleted, as far as a database can: after shredding a key.

        SQLite zeroes deleted rows in the file itself (secure_delete); here the write-ahead log, which still holds their
        pages, is emptied into the file and truncated. Other readers may keep that from completing: BackendError
        ("db.busy"). PostgreSQL keeps old rows until its own vacuum and its own log retention. Neither reaches backups,
        nor blocks that a file system or flash drive has moved away.
        """
        if self._engine.dialect.name != "sqlite":
            return
        with _mapped(), self._engine.connect().execution_options(strongroom_begin="") as connection:
            busy, *_ = connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)").one()
        if busy:
            raise BackendError(
                "db.busy",
                "the write-ahead log could not be emptied: another process is reading the database",
                hint="end other strongroom processes on this room and run the command again",
            )

    def check(self) -> list[str]:
        """What ``doctor`` and ``fsck`` show: one text for each fault that the database finds in itself."""
        with self.reading() as tx:
            if self._engine.dialect.name != "sqlite":
                return []
            found = [str(row[0]) for row in tx.exec_driver_sql("PRAGMA integrity_check(20)")]
            orphans = tx.exec_driver_sql("PRAGMA foreign_key_check").all()
        faults = [text for text in found if text != "ok"]
        return faults + [f"a row of {row[0]} refers to nothing in {row[2]}" for row in orphans]

    def close(self) -> None:
        """Close idle connections; they come back when the database is used again."""
        self._engine.dispose()

    @contextmanager
    def _session(self, begin: str, **options: Any) -> Iterator[sa.Connection]:
        if getattr(self._inside, "yes", False):
            # A second connection would wait for the first one's lock until it times out.
            raise RuntimeError("transactions don't nest")
        self._inside.yes = True
        try:
            with _mapped(), self._engine.connect().execution_options(strongroom_begin=begin, **options) as connection:
                if begin == "BEGIN" and self._engine.dialect.name == "postgresql":
                    connection = connection.execution_options(postgresql_readonly=True)  # noqa: PLW2901
                with connection.begin():
                    yield connection
        finally:
            self._inside.yes = False

    @staticmethod
    def _schema_of(tx: sa.Connection) -> int | None:
        if tx.dialect.name == "sqlite":  # SQLAlchemy asks each database that is attached, and in several ways
            named = "SELECT 1 FROM sqlite_master WHERE type IN ('table', 'view') AND name = ?"
            there = tx.exec_driver_sql(named, (_schema.name,)).first() is not None
        else:
            there = sa.inspect(tx).has_table(_schema.name)
        if not there:
            return None
        found: int | None = tx.exec_driver_sql(f"SELECT max(version) FROM {_schema.name}").scalar()  # noqa: S608 - ours
        return found

    def _check_schema(self) -> None:
        with self.reading() as tx:
            found = self._schema_of(tx)
        if found is None:
            raise BackendError(
                "db.missing", f"{self.url} holds no room", hint="strongroom init, or correct the database's URL"
            )
        if found < SCHEMA:
            raise BackendError(
                "db.older_schema",
                f"the database was written by an older Strongroom (schema {found}; this one needs {SCHEMA})",
                hint="strongroom upgrade --owner PRINCIPAL, on the room's host; it copies the database first",
                schema=found,
                known=SCHEMA,
            )
        if found > SCHEMA:
            raise BackendError(
                "db.newer_schema",
                f"the database was written by a newer Strongroom (schema {found}; this one knows {SCHEMA})",
                hint="install a newer Strongroom, as docs/how-to/install.md says",
                schema=found,
                known=SCHEMA,
            )


@cache
def _insert_of(rows: int) -> str:
    return f"INSERT INTO log_entries (position, entry) VALUES {', '.join(['(?, ?)'] * rows)}"  # noqa: S608 - no text


def _sqlite_path(url: str) -> Path | None:
    """The file of a SQLite URL, taken literally: a path may hold '?', '#' and '%'."""
    scheme, colon, rest = url.partition(":")
    if not colon or scheme.lower() not in ("sqlite", "sqlite+pysqlite"):
        return None
    if rest.startswith("//"):
        if not rest.startswith("///"):
            raise UsageError("db.malformed_url", "a SQLite database is sqlite:///path, with three slashes and no host")
        rest = rest[3:]
    if not rest or rest == ":memory:" or "\0" in rest:
        raise UsageError("db.malformed_url", "a room's database is a file: sqlite:///path")
    return Path(rest).absolute()


def _sqlite_engine(path: Path, *, create: bool) -> sa.Engine:
    if create:
        _make_file(path)
    elif not path.is_file():
        raise BackendError(
            "db.missing", f"there is no database {path}", hint="restore room.db from a backup, or correct the path"
        )
    engine = sa.create_engine(
        sa.URL.create("sqlite", database=str(path)),
        hide_parameters=True,
        connect_args={"timeout": _BUSY_MS / 1000, "check_same_thread": False},
    )
    sa.event.listen(engine, "connect", _configure)
    sa.event.listen(engine, "begin", _begin)
    return engine


def _run_migrations(tx: sa.Connection, found: int) -> None:
    """Every revision after schema `found`, in the transaction `tx`."""
    from alembic import command
    from alembic.config import Config

    if not 0 < found < SCHEMA:  # whoever writes to the database may have put anything there
        raise Tampered(
            "db.schema",
            f"the database says to be of schema {found}, which no release has made",
            hint="restore the database from a backup",
        )
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).with_name("migrations")))
    config.attributes["connection"] = tx
    command.stamp(config, f"{found:04}")
    command.upgrade(config, f"{SCHEMA:04}")


def _copy(path: Path, backup: Path) -> None:
    """A copy of a SQLite database as it is now, for its owner only; what is there already is kept."""
    try:
        os.close(os.open(backup, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        raise Conflict(
            "db.backup_exists",
            f"{backup} is there already: an upgrade was begun before",
            hint=f"see that {path} is what you want to upgrade, then move {backup.name} away",
        ) from None
    except OSError as error:
        raise BackendError("db.read_only", f"can't write {backup}: {error.strerror}", hint="free disk space") from None
    with (
        _mapped(),
        contextlib.closing(sqlite3.connect(path)) as source,
        contextlib.closing(sqlite3.connect(backup)) as target,
    ):
        source.backup(target)


def _make_file(path: Path) -> None:
    """An empty file that only its owner may read (SQLite gives its log the same mode), durable in its folder."""
    try:
        with contextlib.suppress(FileExistsError):
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            sync_folder(path.parent)
    except OSError as error:
        raise BackendError(
            "db.unreachable",
            f"can't make the database {path}: {error.strerror}",
            hint="check the folder and its rights",
        ) from None


def _configure(connection: sqlite3.Connection, _record: object) -> None:
    # Autocommit: SQLAlchemy's "begin" event says BEGIN, so that it is we who say which kind.
    connection.isolation_level = None
    for pragma in (
        f"busy_timeout={_BUSY_MS}",  # first: switching to WAL needs the lock, too
        "journal_mode=WAL",
        "synchronous=FULL",  # in WAL mode NORMAL could lose a committed transaction in a power cut
        "foreign_keys=ON",
        "secure_delete=ON",  # a shredded key is overwritten, not only unlinked
        "trusted_schema=OFF",  # a planted view or trigger must not run functions with side effects
        "cell_size_check=ON",
    ):
        connection.execute(f"PRAGMA {pragma}").close()


def _begin(connection: sa.Connection) -> None:
    statement = connection.get_execution_options().get("strongroom_begin", "BEGIN IMMEDIATE")
    if statement:  # past SQLAlchemy, which would make a result of it: every transaction begins with one
        connection.connection.cursor().execute(statement)


def _server_engine(url: str) -> sa.Engine:
    try:
        parsed = sa.make_url(url)
        if parsed.get_backend_name() != "postgresql":
            raise UsageError(
                "db.unknown_scheme",
                f"no database speaks {parsed.drivername}://",
                hint="use sqlite:///path or postgresql://",
            )
        if parsed.drivername == "postgresql":
            parsed = parsed.set(drivername="postgresql+psycopg")
        return sa.create_engine(parsed, hide_parameters=True, isolation_level="SERIALIZABLE", pool_pre_ping=True)
    except (ImportError, NoSuchModuleError):
        raise UsageError(
            "db.no_driver", "the driver for this database is not installed", hint="pip install 'strongroom[postgres]'"
        ) from None
    except (ArgumentError, ValueError):  # not shown: the URL may hold a password
        raise UsageError(
            "db.malformed_url",
            "the database's URL is not understood",
            hint="use sqlite:///path or postgresql://user@host/name",
        ) from None


@contextmanager
def _mapped() -> Iterator[None]:
    try:
        yield
    except (SQLAlchemyError, sqlite3.Error) as error:
        _fail(error)


# Primary result codes of SQLite and SQLSTATE classes of PostgreSQL, and what they mean to the caller.
_SQLITE = {
    sqlite3.SQLITE_BUSY: "db.busy",
    sqlite3.SQLITE_LOCKED: "db.busy",
    sqlite3.SQLITE_FULL: "db.full",
    sqlite3.SQLITE_READONLY: "db.read_only",
    sqlite3.SQLITE_PERM: "db.read_only",
    sqlite3.SQLITE_CORRUPT: "db.damaged",
    sqlite3.SQLITE_NOTADB: "db.damaged",
    sqlite3.SQLITE_CANTOPEN: "db.unreachable",
    sqlite3.SQLITE_IOERR: "db.failed",
}
_POSTGRESQL = {
    "40": "db.busy",
    "55": "db.busy",
    "53": "db.full",
    "25": "db.read_only",
    "42501": "db.read_only",
    "XX": "db.damaged",
    "08": "db.unreachable",
    "57": "db.unreachable",
}
_MEANINGS = {
    "db.busy": ("the database is in use by another writer", "run the command again"),
    "db.full": ("the database can't grow", "free disk space and run the command again"),
    "db.read_only": ("the database can't be written", "make the database and its folder writable for this user"),
    "db.damaged": ("the database is damaged, or is no database", "restore it from a backup; strongroom doctor"),
    "db.unreachable": (
        "the database can't be opened",
        "see that it is there and, if it is a file, that its folder is writable: reading, too, keeps a log there",
    ),
    "db.failed": ("the database failed", "strongroom doctor"),
}


def _fail(error: SQLAlchemyError | sqlite3.Error) -> NoReturn:
    """Raise what a database's error means. Its text is not passed on: it may quote values, and those may be keys."""
    original: Any = error.orig if isinstance(error, DBAPIError) else error
    reason = (
        getattr(original, "sqlite_errorname", None) or getattr(original, "sqlstate", None) or type(original).__name__
    )
    if isinstance(error, IntegrityError) or isinstance(original, sqlite3.IntegrityError):
        raise Conflict(
            "db.conflict", "the database refuses the change: it contradicts what is recorded already", reason=reason
        ) from None
    code = getattr(original, "sqlite_errorcode", None)
    if code is not None:
        meaning = _SQLITE.get(code & 0xFF, "db.failed")
    else:
        state = getattr(original, "sqlstate", None) or ""
        meaning = (
            _POSTGRESQL.get(state) or _POSTGRESQL.get(state[:2]) or ("db.failed" if state else _without_code(error))
        )
    what, hint = _MEANINGS[meaning]
    raise BackendError(meaning, f"{what} ({reason})", hint=hint, reason=reason) from None


def _without_code(error: SQLAlchemyError | sqlite3.Error) -> str:
    """Neither database gives a code when there is no connection, nor for what SQLAlchemy itself finds."""
    return (
        "db.unreachable"
        if isinstance(error, DBAPIError) and isinstance(error, sa.exc.OperationalError)
        else "db.failed"
    )
