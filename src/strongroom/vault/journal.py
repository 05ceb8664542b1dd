"""The journal of a put or a rotation: what is already durable, so that a job that was killed goes on where it was."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from sqlalchemy import delete, insert, select
from sqlalchemy.engine import Connection

from strongroom.core.clock import now
from strongroom.core.ids import random_id
from strongroom.errors import BackendError, NotFound
from strongroom.formats.manifest import PackEntry, pack_name
from strongroom.storage.blobs import Blobs
from strongroom.storage.db import Database, put_packs, puts
from strongroom.vault.record import VersionRecord


class Journal:
    """Packs that are durable but belong to no version yet, and the secrets (sealed like a version's) they were made
    with."""

    def __init__(self, db: Database, blobs: Blobs, put_id: str, record: VersionRecord) -> None:
        self._db, self._blobs, self.put_id, self.record = db, blobs, put_id, record
        self.packs: dict[tuple[int, int], tuple[PackEntry, str]] = {}

    @classmethod
    @contextlib.contextmanager
    def held(
        cls,
        db: Database,
        blobs: Blobs,
        room_key: bytes,
        locks: Path,
        *,
        fingerprint: str,
        name: str,
        by: str,
        start: VersionRecord | None,
    ) -> Iterator[Journal]:
        """The journal of the job that `fingerprint` names: an interrupted one's if nobody is at it, else a new one,
        which
        begins with the secrets `start` (default: fresh ones). A file lock holds it, which dies with its process."""
        with db.reading() as tx:
            waiting = [row.put_id for row in tx.execute(select(puts).where(puts.c.fingerprint == fingerprint))]
        for put_id in waiting:
            with locked(locks / put_id) as mine:
                journal = cls._reopen(db, blobs, room_key, put_id) if mine else None
                if journal is not None:
                    yield journal
                    (locks / put_id).unlink(missing_ok=True)
                    return
        put_id = random_id().hex()
        with locked(locks / put_id):
            yield cls._begin(db, blobs, room_key, put_id, fingerprint, name, by, start)
            (locks / put_id).unlink(missing_ok=True)

    @classmethod
    def _begin(
        cls,
        db: Database,
        blobs: Blobs,
        room_key: bytes,
        put_id: str,
        fingerprint: str,
        name: str,
        by: str,
        start: VersionRecord | None,
    ) -> Journal:
        record = start or VersionRecord.fresh(random_id())
        with db.transaction() as tx:
            tx.execute(
                insert(puts).values(
                    put_id=put_id,
                    name=name,
                    fingerprint=fingerprint,
                    version_id=record.version.hex(),
                    revision=record.revision,
                    record=record.seal(room_key),
                    created_at=now(),
                    created_by=by,
                )
            )
        return cls(db, blobs, put_id, record)

    @classmethod
    def _reopen(cls, db: Database, blobs: Blobs, room_key: bytes, put_id: str) -> Journal | None:
        """None when its job was finished by somebody else meanwhile."""
        with db.reading() as tx:
            row = tx.execute(select(puts).where(puts.c.put_id == put_id)).one_or_none()
            packs = tx.execute(select(put_packs).where(put_packs.c.put_id == put_id)).mappings().all()
        if row is None:
            return None
        journal = cls(db, blobs, put_id, VersionRecord.unseal(room_key, row.record, bytes.fromhex(row.version_id)))
        for pack in packs:
            pack_id, digest = bytes.fromhex(pack["pack_id"]), bytes.fromhex(pack["digest"])
            entry = PackEntry(pack_id, pack["kind"], pack["first"], pack["count"], digest)
            try:
                blobs.size(entry.name)
            except NotFound:  # somebody tidied the store: that pack is made again
                with db.transaction() as tx:
                    tx.execute(delete(put_packs).where(put_packs.c.pack_id == pack["pack_id"]))
                continue
            journal.packs[pack["kind"], pack["ordinal"]] = (entry, pack["progress"])
        return journal

    def add(self, pack: PackEntry, ordinal: int, progress: str) -> None:
        """Remember a pack that has just become durable."""
        with self._db.transaction() as tx:
            tx.execute(
                insert(put_packs).values(
                    put_id=self.put_id,
                    kind=pack.kind,
                    ordinal=ordinal,
                    first=pack.first,
                    count=pack.count,
                    pack_id=pack.id.hex(),
                    digest=pack.digest.hex(),
                    progress=progress,
                )
            )

    def close(self, tx: Connection) -> None:
        """Drop the journal, in the transaction that publishes what it led to."""
        tx.execute(delete(put_packs).where(put_packs.c.put_id == self.put_id))
        tx.execute(delete(puts).where(puts.c.put_id == self.put_id))

    def forget(self) -> None:
        """Drop the journal and the packs that it remembers, this run's included: nothing of them can be used."""
        with self._db.transaction() as tx:
            found = tx.execute(select(put_packs.c.pack_id).where(put_packs.c.put_id == self.put_id)).scalars().all()
            self.close(tx)
        for pack_id in found:
            self._blobs.delete(pack_name(bytes.fromhex(pack_id)))


def forget_all(tx: Connection, version_id: str) -> Sequence[str]:
    """Drop every journal that holds secrets of a version; returns the identifiers of their packs."""
    jobs = select(puts.c.put_id).where(puts.c.version_id == version_id)
    packs = tx.execute(select(put_packs.c.pack_id).where(put_packs.c.put_id.in_(jobs))).scalars().all()
    tx.execute(delete(put_packs).where(put_packs.c.put_id.in_(jobs)))
    tx.execute(delete(puts).where(puts.c.version_id == version_id))
    return packs


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Hold an exclusive lock on `path` if nobody else does; it ends with the process, however that ends.

    BackendError ("room.unwritable") when the file can't be made.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise BackendError(
            "room.unwritable",
            f"can't make the lock file {path}: {error.strerror}",
            hint="free space, and make the room's folder writable for this user",
        ) from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)
