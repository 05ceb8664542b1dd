"""The journal of a put or a rotation: what is already durable, so that a job that was killed goes on where it was."""

from __future__ import annotations

import contextlib
import hmac
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import Row, RowMapping, delete, insert, select
from sqlalchemy.engine import Connection

from strongroom.core import canonical, files
from strongroom.core.clock import now
from strongroom.core.ids import parse_id, random_id
from strongroom.errors import BackendError, Conflict, IntegrityError, NotFound
from strongroom.formats.manifest import PackEntry
from strongroom.formats.pack import Trailer, trailer_bytes
from strongroom.storage.blobs import Blobs
from strongroom.storage.db import Database, put_packs, puts
from strongroom.vault.record import VersionRecord, job_context

if TYPE_CHECKING:
    from strongroom.vault.roomkeys import RoomKeys


class Journal:
    """Packs that are durable but belong to no version yet, and the secrets (sealed like a version's) they were made
    with."""

    def __init__(self, db: Database, blobs: Blobs, put_id: str, record: VersionRecord) -> None:
        self._db, self._blobs, self.put_id, self.record = db, blobs, put_id, record
        self.packs: dict[tuple[int, int], tuple[PackEntry, str]] = {}
        self._added: list[PackEntry] = []

    @classmethod
    @contextlib.contextmanager
    def held(
        cls,
        db: Database,
        blobs: Blobs,
        keys: RoomKeys,
        locks: Path,
        *,
        fingerprint: str,
        name: str,
        by: str,
        start: VersionRecord | None,
    ) -> Iterator[Journal]:
        """The journal of the job that `fingerprint` names: an interrupted one's if nobody is at it, else a new one,
        which begins with the secrets `start` (default: fresh ones). A file lock holds it, which dies with its
        process."""
        with db.reading() as tx:
            waiting = [row.put_id for row in tx.execute(select(puts).where(puts.c.fingerprint == fingerprint))]
        for put_id in waiting:
            with locked(lock_path(locks, put_id)) as mine:
                journal = cls._reopen(db, blobs, keys, put_id) if mine else None
                if journal is not None:
                    yield journal
                if mine:  # or its job has ended since it was looked for, and the file is of this lock only
                    lock_path(locks, put_id).unlink(missing_ok=True)
            if journal is not None:
                return
        put_id = random_id().hex()
        with locked(lock_path(locks, put_id)):
            yield cls._begin(db, blobs, keys, put_id, fingerprint, name, by, start)
            lock_path(locks, put_id).unlink(missing_ok=True)

    @classmethod
    def _begin(
        cls,
        db: Database,
        blobs: Blobs,
        keys: RoomKeys,
        put_id: str,
        fingerprint: str,
        name: str,
        by: str,
        start: VersionRecord | None,
    ) -> Journal:
        record = start or VersionRecord.fresh(random_id())

        def begin() -> None:
            # One row, under a key that is held: who waits for a new room key goes on with that one, and is not refused.
            with db.counting() as tx:
                tx.execute(
                    insert(puts).values(
                        put_id=put_id,
                        name=name,
                        fingerprint=fingerprint,
                        version_id=record.version.hex(),
                        revision=record.revision,
                        record=record.seal(keys.current(tx), job_context(put_id, fingerprint)),
                        created_at=now(),
                        created_by=by,
                    )
                )

        keys.sealing(begin)
        return cls(db, blobs, put_id, record)

    @classmethod
    def _reopen(cls, db: Database, blobs: Blobs, keys: RoomKeys, put_id: str) -> Journal | None:
        """None when its job was finished by somebody else meanwhile. What is not provably ours is made again."""

        def read(tx: Connection) -> tuple[Row[Any] | None, Sequence[RowMapping]]:
            row = tx.execute(select(puts).where(puts.c.put_id == put_id)).one_or_none()
            return row, tx.execute(select(put_packs).where(put_packs.c.put_id == put_id)).mappings().all()

        (row, packs), key = keys.with_key(read)
        if row is None:
            return None
        # The fingerprint is bound in: a row that somebody moved to another job, or kept from an older one, stays shut.
        context = job_context(put_id, row.fingerprint)
        journal = cls(db, blobs, put_id, VersionRecord.unseal(key, row.record, parse_id(row.version_id), context))
        for pack in packs:
            entry = journal._proven(pack)
            if entry is not None and _whole(blobs, entry):
                journal.packs[pack["kind"], pack["ordinal"]] = (entry, pack["progress"])
            else:
                with db.transaction() as tx:
                    same = (put_packs.c.kind == pack["kind"]) & (put_packs.c.ordinal == pack["ordinal"])
                    tx.execute(delete(put_packs).where(put_packs.c.put_id == put_id, same))
        return journal

    def add(self, pack: PackEntry, ordinal: int, progress: str) -> None:
        """Remember a pack that has just become durable."""
        values: dict[str, Any] = {
            "put_id": self.put_id,
            "kind": pack.kind,
            "ordinal": ordinal,
            "first": pack.first,
            "count": pack.count,
            "pack_id": pack.id.hex(),
            "digest": pack.digest.hex(),
            "progress": progress,
        }
        self._added.append(pack)
        with self._db.transaction() as tx:
            tx.execute(insert(put_packs).values(**values, mac=self._mac(values)))

    def mark(self, read: bytes) -> str:
        """A progress mark for the digest of everything read so far. Keyed: it must not confirm a guess of the
        source."""
        return hmac.new(self.record.journal_key, b"mark" + read, "sha256").hexdigest()

    def _mac(self, row: Mapping[str, Any]) -> str:
        text = canonical.encode({key: value for key, value in row.items() if key != "mac"})
        return hmac.new(self.record.journal_key, b"pack" + text, "sha256").hexdigest()

    def _proven(self, row: RowMapping) -> PackEntry | None:
        """The pack of a row that this job wrote; None for one that somebody else wrote or changed."""
        try:
            mac = self._mac(dict(row))
        except (TypeError, ValueError):  # a type that we never write
            return None
        if not isinstance(row["mac"], str) or not hmac.compare_digest(mac, row["mac"]):
            return None
        return PackEntry(
            parse_id(row["pack_id"], 32), row["kind"], row["first"], row["count"], parse_id(row["digest"], 32)
        )

    def close(self, tx: Connection) -> None:
        """Drop the journal, in the transaction that publishes what it led to. Conflict ``put.raced`` if it has gone:
        the locks of jobs are one host's, and on another one it was finished, or taken for one that nobody is at."""
        tx.execute(delete(put_packs).where(put_packs.c.put_id == self.put_id))
        if tx.execute(delete(puts).where(puts.c.put_id == self.put_id)).rowcount != 1:
            raise Conflict(
                "put.raced",
                "this job was finished or dropped by another process meanwhile",
                hint="strongroom ls; if it is not there, put it again",
            )

    def forget(self, *, shredded: bool = False) -> None:
        """Drop the journal and its packs, this run's included: nothing of them can be used. Only packs that are
        provably its own: a row that somebody else wrote could name those of any version. If the journal has gone
        already they may be a version's by now, unless that is `shredded`: fsck deletes what is nobody's."""
        try:
            with self._db.transaction() as tx:
                self.close(tx)
        except Conflict:
            if not shredded:
                return
        for pack in [*(entry for entry, _ in self.packs.values()), *self._added]:
            self._blobs.delete(pack.name)


def forget_all(tx: Connection, version_id: str) -> int:
    """Drop every journal that holds secrets of a version; returns how many packs they remembered."""
    jobs = select(puts.c.put_id).where(puts.c.version_id == version_id)
    packs = tx.execute(delete(put_packs).where(put_packs.c.put_id.in_(jobs))).rowcount
    tx.execute(delete(puts).where(puts.c.version_id == version_id))
    return packs


def lock_path(locks: Path, put_id: str) -> Path:
    """The lock file of a job. Its name comes from the database, so it must be nothing but an identifier: else whoever
    writes there could have any file made or deleted."""
    return locks / parse_id(put_id).hex()


def _whole(blobs: Blobs, entry: PackEntry) -> bool:
    """Whether the store has all of a pack that was durable once: its size, and the trailer that was noted."""
    try:
        size, tail = blobs.size(entry.name), trailer_bytes(entry.kind, entry.count)
        data = bytearray(min(size, tail))
        blobs.read_into(entry.name, size - len(data), memoryview(data))
        trailer = Trailer.decode(bytes(data))
    except (NotFound, IntegrityError):
        return False
    return trailer.suite.digest(data) == entry.digest and size == trailer.body_bytes + tail


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Hold an exclusive lock on `path` if nobody else does; it ends with the process, however that ends.

    BackendError ("room.unwritable") when the file can't be made.
    """
    with contextlib.ExitStack() as stack:
        try:
            mine = stack.enter_context(files.locked(path, wait=False))
        except OSError as error:
            raise BackendError(
                "room.unwritable",
                f"can't make the lock file {path}: {error.strerror}",
                hint="free space, and make the room's folder writable for this user",
            ) from None
        yield mine
