"""The vault: one deep module over store, database and keys. Everything that changes or releases weights goes through
it."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sqlalchemy import Row, func, insert, or_, select, update

from strongroom.core.clock import now
from strongroom.core.ids import Ref, parse_id, parse_principal, random_id
from strongroom.core.limits import LIMITS
from strongroom.core.settings import Settings
from strongroom.crypto.keystores import PassphraseSource
from strongroom.crypto.segments import VersionKeys
from strongroom.crypto.shamir import Share
from strongroom.errors import (
    AuthRequired,
    BackendError,
    CannotVerify,
    Conflict,
    IntegrityError,
    NotFound,
    Rollback,
    Sealed,
    StrongroomError,
    Tampered,
    UsageError,
)
from strongroom.formats.bundle import KeyBundle
from strongroom.formats.dsse import Envelope, pre_authentication_encoding
from strongroom.formats.index import Index
from strongroom.formats.manifest import PAYLOAD_TYPE, Manifest
from strongroom.formats.suites import Suite
from strongroom.storage.blobs import Blobs, open_blobs
from strongroom.storage.db import Database, principals, versions
from strongroom.storage.image import SealedImage, read_manifest
from strongroom.vault import packing
from strongroom.vault.config import NAME as CONFIG
from strongroom.vault.config import RoomConfig
from strongroom.vault.journal import Journal, forget_all, locked
from strongroom.vault.put import Plan, Progress, parse_share, put
from strongroom.vault.record import VersionRecord
from strongroom.vault.release import bundle_for
from strongroom.vault.roomkeys import RoomKeys
from strongroom.vault.rotate import next_revision, reencrypt
from strongroom.vault.source import ModelSource
from strongroom.vault.verify import VerifyReport, problem_of, verify_image
from strongroom.vault.versions import VersionInfo, check_row, measured, object_names

_REST = "`strongroom fsck --repair` removes what the store may still have of it"


def silent(done: int, total: int) -> None:
    """A progress callback that says nothing."""


@dataclass(frozen=True)
class PutResult:
    """A version that is in the room; `files` are paths, `unmarked` counts bytes of tensors without a mark by reason."""

    ref: str
    digest: str
    bytes: int
    stored_bytes: int
    segments: int
    positions: int
    files: tuple[str, ...]
    unmarked: dict[str, int]
    resumed_packs: int

    def as_json(self) -> dict[str, Any]:
        return {**vars(self), "files": list(self.files)}


class Vault:
    """An embedded room: a folder with a database, a key store and a store. Open with `Vault.open` or make with
    `Vault.init`."""

    def __init__(self, folder: Path, *, passphrase: PassphraseSource | None = None) -> None:
        self.folder = folder = folder.absolute()
        config = RoomConfig.read(folder)
        self.id = config.room
        self.db = Database.open(config.db_url(folder))
        self.blobs: Blobs = open_blobs(config.store_url(folder), create=False)
        self.keys = RoomKeys(self.db, folder, self.id, passphrase)
        self.workers = Settings.from_environment().workers

    @classmethod
    def init(
        cls,
        folder: Path,
        *,
        store: str = "store",
        db: str = "sqlite:room.db",
        keystore: str = "file:keys/room.key",
        recovery: tuple[int, int] | None = None,
        owner: str,
        passphrase: PassphraseSource | None = None,
    ) -> tuple[Vault, list[Share]]:
        """Make a room in a new or empty folder, with `owner` as its first principal; returns it and the recovery
        shares."""
        parse_principal(owner)
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if any(folder.iterdir()):
                if (folder / CONFIG).exists():
                    raise Conflict("room.exists", f"{folder} is a room", hint=f"strongroom --room {folder} status")
                raise Conflict(
                    "room.not_empty",
                    f"{folder} holds other files; a room is made in a new or empty folder",
                    hint="strongroom --room NEW-FOLDER init",
                )
        except OSError as error:
            raise UsageError("room.folder", f"can't make a room in {folder}: {error.strerror}") from None
        config = RoomConfig(random_id(), store, db, (keystore,))
        try:
            shares = cls._furnish(folder.absolute(), config, recovery, owner, passphrase)
        except BaseException:
            # The folder was empty, so all that is in it now is ours; else the same command could not be given again.
            for left in folder.iterdir():
                shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
            raise
        return cls(folder, passphrase=passphrase), shares

    @staticmethod
    def _furnish(
        folder: Path,
        config: RoomConfig,
        recovery: tuple[int, int] | None,
        owner: str,
        passphrase: PassphraseSource | None,
    ) -> list[Share]:
        for part in ("keys", "locks"):
            (folder / part).mkdir(mode=0o700)
        blobs = open_blobs(config.store_url(folder))
        blobs.check()
        if next(iter(blobs.list("")), None) is not None:
            # One room to a store: fsck could not tell another room's objects from its own orphans.
            raise Conflict(
                "store.not_empty", f"the store {blobs.url} is not empty", hint="--store with a new folder or prefix"
            )
        database = Database.open(config.db_url(folder), create=True)
        try:
            uri, shares = RoomKeys(database, folder, config.room, passphrase).create(config.keystores[0], recovery)
            with database.transaction() as tx:
                tx.execute(insert(principals).values(path=owner, created_at=now()))
            # Last: a folder without this file is no room, so an interrupted init leaves nothing that looks like one.
            config.pin(folder, [uri])
        finally:
            database.close()
            blobs.close()
        return shares

    def close(self) -> None:
        self.db.close()
        self.blobs.close()

    # -- principals ----------------------------------------------------------------------------------------------

    def principal_add(self, path: str) -> None:
        """Register somebody who may hold weights. Conflict when already registered."""
        with self.db.transaction() as tx:
            if tx.execute(select(principals).where(principals.c.path == parse_principal(path))).first():
                raise Conflict("principal.exists", f"{path} is already registered", hint="strongroom principal ls")
            tx.execute(insert(principals).values(path=path, created_at=now()))

    def principal_ls(self) -> list[dict[str, Any]]:
        with self.db.reading() as tx:
            found = [dict(row._mapping) for row in tx.execute(select(principals).order_by(principals.c.path))]
        for row in found:
            texts = all(isinstance(row[column], str) for column in ("path", "created_at"))
            if not texts or not isinstance(row["suspended_at"], str | None):
                raise Tampered("principal.malformed", "the database's row of a principal does not hold together")
        return found

    def principal(self, path: str | None) -> str:
        """The principal to act as: `path`, else the only one there is."""
        known = [item["path"] for item in self.principal_ls() if not item["suspended_at"]]
        if path is None:
            if len(known) == 1:
                return str(known[0])
            raise AuthRequired(
                "principal.ambiguous",
                f"the room knows {', '.join(known) or 'no principal'}; say which one you are",
                hint=f"--as {known[0]} or STRONGROOM_AS={known[0]}" if known else "strongroom principal add user/NAME",
            )
        if parse_principal(path) not in known:
            raise AuthRequired(
                "principal.unknown", f"{path} is not registered in this room", hint=f"strongroom principal add {path}"
            )
        return path

    # -- versions ------------------------------------------------------------------------------------------------

    def ls(self, name: str | None = None) -> list[VersionInfo]:
        """All versions, or those of one name, oldest first. Needs no key. NotFound for a name that nothing has."""
        query = select(versions).order_by(versions.c.name, versions.c.number)
        if name is not None:
            query = query.where(versions.c.name == Ref.parse(name).name)
        with self.db.reading() as tx:
            found = [VersionInfo.of(row) for row in tx.execute(query)]
        if name is not None and not found:
            raise NotFound("weights.missing", f"the room has no weights {name}", hint="strongroom ls")
        return found

    def find(self, ref: str) -> Row[Any]:
        """The database row of a version that can be read; NotFound otherwise, Tampered if it does not hold together."""
        return self._readable(self._row(ref))

    def _readable(self, row: Row[Any]) -> Row[Any]:
        if check_row(row).state != "active":
            raise NotFound(
                "weights.shredded", f"{row.name}@{row.number} was shredded at {row.shredded_at}", hint="strongroom ls"
            )
        return row

    def _row(self, ref: str) -> Row[Any]:
        """The row, unchecked, of a numbered version, whatever its state, or of the newest that is active."""
        parsed = Ref.parse(ref)
        query = select(versions).where(versions.c.name == parsed.name)
        if parsed.number is not None:
            query = query.where(versions.c.number == parsed.number)
        else:
            query = query.where(versions.c.state == "active")
        with self.db.reading() as tx:
            row = tx.execute(query.order_by(versions.c.number.desc())).first()
        if row is None:
            raise NotFound("weights.missing", f"the room has no weights {ref}", hint="strongroom ls")
        return row

    def record(self, row: Row[Any]) -> VersionRecord:
        """The secrets of a version; Tampered or Rollback when the database says something else than the sealed
        record."""
        version = parse_id(row.version_id)
        record = VersionRecord.unseal(self.keys.room_key, row.record, version)
        if (record.name, record.number, record.version) != (row.name, row.number, version):
            raise Tampered(
                "record.swapped", f"the database calls this version {row.name}@{row.number}, its sealed record does not"
            )
        if (record.revision, record.manifest_digest.hex()) != (row.revision, row.manifest_sha256):
            raise Rollback(
                "record.rollback", f"database and sealed record of {row.name}@{row.number} disagree on the revision"
            )
        return record

    def manifest(self, record: VersionRecord) -> Manifest:
        """The verified manifest of a version's current revision."""
        return read_manifest(
            self.blobs, self.id, record.version, record.revision, self.keys.signer.public_key, record.manifest_digest
        )

    def image(self, record: VersionRecord) -> SealedImage:
        """The custodian's own access to a version's segments."""
        manifest = self.manifest(record)
        return SealedImage(self.blobs, manifest, VersionKeys.of(record.version_key, 0).common)

    def show(self, ref: str) -> dict[str, Any]:
        """Everything about a version, files and geometry included. Needs the room key."""
        row = self.find(ref)
        image = self.image(self.record(row))
        layout, report = image.layout, image.index.report
        return {
            **VersionInfo.of(row).as_json(),
            "version": row.version_id,
            "suite": image.manifest.suite.name,
            "signed_by": self.keys.signer.key_id,
            "files": [
                {"path": entry.path, "kind": entry.kind, "bytes": entry.bytes, "sha256": digest}
                for entry, digest in zip(layout.files, image.index.sha256, strict=True)
            ],
            "marked_bytes": layout.positions * layout.marked,
            "markable_bytes": sum(run.end - run.begin for run in layout.runs),
            "common_segment": layout.common,
            "marked_segment": layout.marked,
            "packs": len(image.manifest.packs),
            **report,
        }

    def bundle(self, ref: str, holder: str) -> KeyBundle:
        """The key bundle of `holder` for a version: what opens exactly one variant of each marked segment."""
        record = self.record(self.find(ref))
        return bundle_for(record, self.manifest(record), self.keys.signer.public_key, self.principal(holder))

    # -- put -----------------------------------------------------------------------------------------------------

    def put(
        self,
        source: ModelSource,
        name: str,
        *,
        by: str,
        share: str = "1/8",
        positions: int = 16384,
        suite: Suite = Suite.BLAKE3,
        progress: Progress = silent,
    ) -> PutResult:
        """Store `source` as the next version of `name`. Killed at any point, the same call goes on where it was."""
        if Ref.parse(name).number is not None:
            raise UsageError("put.numbered", f"put chooses the version's number itself; give {Ref.parse(name).name}")
        if not 0 <= positions <= LIMITS.positions:
            raise UsageError(
                "put.positions", f"the number of positions is from 0 to {LIMITS.positions}", hint="--positions 16384"
            )
        plan = Plan.of(source, share=parse_share(share), positions=positions, suite=suite)
        signer = self.keys.signer
        with self._journal(plan.fingerprint(name), name, by) as journal:
            resumed = len(journal.packs)
            try:
                manifest, index = put(plan, journal, self.blobs, self.id, workers=self.workers, progress=progress)
            except Conflict as error:
                if error.code == "source.changed":
                    journal.forget()
                raise
            self._sign(manifest, signer)
            row = self._publish(journal, manifest, index, name, by)
        return PutResult(
            ref=f"{row.name}@{row.number}",
            digest=f"sha256:{row.manifest_sha256}",
            bytes=row.bytes,
            stored_bytes=row.stored_bytes,
            segments=row.segments,
            positions=row.positions,
            files=tuple(entry.path for entry in index.layout.files),
            unmarked=plan.unmarked,
            resumed_packs=resumed,
        )

    def _sign(self, manifest: Manifest, signer: Any) -> None:
        payload = manifest.encode()
        signature = signer.sign(pre_authentication_encoding(PAYLOAD_TYPE, payload))
        envelope = Envelope(PAYLOAD_TYPE, payload, ((signer.key_id, signature),))
        self.blobs.delete(manifest.name)  # an interrupted attempt may have left one that nothing refers to
        self.blobs.write(manifest.name, [envelope.encode()])

    def _publish(self, journal: Journal, manifest: Manifest, index: Index, name: str, by: str) -> Row[Any]:
        """One transaction: the version appears, and its journal goes."""
        digest = manifest.digest()
        with self.db.transaction() as tx:
            newest = tx.execute(select(func.max(versions.c.number)).where(versions.c.name == name)).scalar()
            if not isinstance(newest, int | None):
                raise Tampered("record.malformed", f"the database numbers a version of {name} {newest!r:.40}")
            number = (newest or 0) + 1
            record = replace(journal.record, name=name, number=number, manifest_digest=digest)
            tx.execute(
                insert(versions).values(
                    version_id=record.version.hex(),
                    name=name,
                    number=number,
                    state="active",
                    record=record.seal(self.keys.current(tx)),
                    bytes=sum(entry.bytes for entry in index.layout.files),
                    created_at=now(),
                    created_by=by,
                    **measured(manifest),
                )
            )
            journal.close(tx)
            return tx.execute(select(versions).where(versions.c.version_id == record.version.hex())).one()

    # -- rotate and shred ----------------------------------------------------------------------------------------

    def rotate(self, ref: str, *, by: str, progress: Progress = silent) -> dict[str, Any]:
        """Re-encrypt a version under a new version key. Bundles of the old revision stop opening anything."""
        row = self.find(ref)
        # One at a time: two would write their manifests to the same name, and the slower one over the faster one's.
        with locked(self.folder / "locks" / f"rotate-{parse_id(row.version_id).hex()}") as mine:
            if not mine:
                raise Conflict("rotate.busy", f"{row.name}@{row.number} is being rotated", hint="wait for it to end")
            return self._rotate(f"{row.name}@{row.number}", by, progress)

    def _rotate(self, ref: str, by: str, progress: Progress) -> dict[str, Any]:
        row = self.find(ref)
        old_record = self.record(row)
        with self._or_raced(row):
            old = self.image(old_record)
        fingerprint = f"rotate {row.version_id} {row.revision} {packing.PACK_BODY}"
        job = self._journal(fingerprint, row.name, by, start=next_revision(old_record))
        with job as journal, self._or_raced(row, journal):
            manifest = reencrypt(old, old_record, journal, workers=self.workers, progress=progress)
            self._sign(manifest, self.keys.signer)
            record = replace(journal.record, manifest_digest=manifest.digest())
            with self.db.transaction() as tx:
                changed = tx.execute(
                    update(versions)
                    .where(
                        versions.c.version_id == row.version_id,
                        versions.c.revision == row.revision,
                        versions.c.state == "active",
                    )
                    .values(record=record.seal(self.keys.current(tx)), **measured(manifest))
                )
                if changed.rowcount != 1:
                    raise _raced(row)
                # With other rotations of it that were left unfinished: their keys open what this one replaced.
                forget_all(tx, row.version_id)
        # Never what the new revision needs as well, whatever the journal was made to say.
        for name in object_names(old.manifest) - object_names(manifest):
            self.blobs.delete(name)
        return {"ref": ref, "revision": record.revision, "digest": f"sha256:{manifest.digest().hex()}"}

    @contextlib.contextmanager
    def _or_raced(self, row: Row[Any], journal: Journal | None = None) -> Iterator[None]:
        """An error is Conflict ``rotate.raced`` if the version of `row` was rotated or shredded meanwhile. The journal
        goes then: its keys open the same weights, which must not outlive a shred."""
        try:
            yield
        except StrongroomError as error:
            if self._is_current(row):
                raise
            with contextlib.suppress(BackendError):  # what is left of it goes with the next shred or fsck
                if journal is not None:
                    journal.forget()
            raise _raced(row) from error

    def _is_current(self, row: Row[Any]) -> bool:
        """Whether the version of `row` is active in that revision still, as far as the database can say."""
        query = select(versions.c.state, versions.c.revision).where(versions.c.version_id == row.version_id)
        try:
            with self.db.reading() as tx:
                return bool(tx.execute(query).one_or_none() == ("active", row.revision))
        except BackendError:
            return True

    def shred(self, ref: str, *, confirm: str) -> dict[str, Any]:
        """Destroy a version's keys, then its ciphertext. There is no way back, except through copies made elsewhere.

        Whatever else the database or the store says of the version, its keys go. Given again for a shredded version, it
        destroys what unfinished jobs may hold, and clears the database's log.
        """
        row = self._row(ref)  # unchecked: a damaged version must be shreddable, too
        name = f"{row.name}@{row.number}"
        if confirm != name:
            raise UsageError(
                "shred.confirm",
                f"shredding {name} can't be undone; confirm it by its full name",
                hint=f"strongroom shred {name} --confirm {name}",
            )
        # Not by its state: in a database that somebody wrote to, any row that has a record has keys.
        again = row.state == "shredded" and row.record is None
        names, remains = (set[str](), []) if again else self._objects_of(row)
        with self.db.transaction() as tx:
            if not again:
                changed = tx.execute(
                    update(versions)
                    .where(
                        versions.c.version_id == row.version_id,
                        or_(versions.c.state != "shredded", versions.c.record.is_not(None)),
                    )
                    .values(state="shredded", record=None, shredded_at=now())
                )
                if changed.rowcount != 1:
                    raise Conflict("shred.raced", f"{name} was shredded by somebody else meanwhile")
            # An interrupted rotation holds the same weights under its own keys. What its packs are is not proven
            # without them: deleting by these names could hit another version, so fsck does it, which looks at all.
            if forget_all(tx, row.version_id) or again:
                remains.append(_REST)
        try:
            self.db.scrub()
        except BackendError as error:
            remains.append(
                "the database's log still holds the wrapped key until its next checkpoint, or until "
                f"`strongroom shred {name} --confirm {name}` is given again: {error.message}"
            )
        deleted = 0
        for item in sorted(names):
            try:
                self.blobs.delete(item)
                deleted += 1
            except BackendError as error:
                remains.append(f"the store still has {item} (`strongroom fsck --repair` removes it): {error.message}")
        return {
            "ref": name,
            "objects_deleted": deleted,
            "means": [
                *remains,
                "the version key and the mark secrets are destroyed here: nobody can open this ciphertext through this "
                "room",
                "key bundles already released still open copies of the ciphertext that were made elsewhere",
                "marked copies that left stay with their holders, and can no longer be traced to them",
                "backups of the room's database hold the wrapped key until they expire; `strongroom keystore rotate` "
                "makes them useless where the old key-encryption key is destroyed",
            ],
        }

    def _objects_of(self, row: Row[Any]) -> tuple[set[str], list[str]]:
        """What the store has of a version, as far as the store and the record still say so, and else what is left."""
        names: set[str] = set()
        try:
            parse_id(row.version_id)
            names |= {name for name, _ in self.blobs.list(f"versions/{row.version_id}")}
            names |= object_names(self.manifest(self.record(check_row(row))))
        # A store that is down, or a release that is too old for it, must not keep the keys alive.
        except (IntegrityError, CannotVerify, Sealed, BackendError) as error:
            return names, [f"{_REST}: {error.message}"]
        return names, []

    # -- verify --------------------------------------------------------------------------------------------------

    def verify(self, ref: str, *, deep: bool = False, progress: Progress = silent) -> VerifyReport:
        """Check every byte of a version; what is wrong is in the report, not raised. CannotVerify, Sealed and
        BackendError are raised: they say nothing about the bytes."""
        row = self._row(ref)
        report = VerifyReport(f"{row.name}@{row.number}", deep)
        try:
            self._readable(row)  # its NotFound is raised: that a version was shredded is no problem of its bytes
        except IntegrityError as error:
            report.problems.append(problem_of(error))
            return report
        try:
            record = self.record(row)
            image = self.image(record)
        except (IntegrityError, NotFound) as error:
            report.problems.append(problem_of(error))
            return report
        verify_image(image, report, record if deep else None, workers=self.workers, progress=progress)
        return report

    # -- inside --------------------------------------------------------------------------------------------------

    def _journal(
        self, fingerprint: str, name: str, by: str, start: VersionRecord | None = None
    ) -> contextlib.AbstractContextManager[Journal]:
        return Journal.held(
            self.db,
            self.blobs,
            self.keys,
            self.folder / "locks",
            fingerprint=fingerprint,
            name=name,
            by=by,
            start=start,
        )


def _raced(row: Row[Any]) -> Conflict:
    ref = f"{row.name}@{row.number}"
    return Conflict("rotate.raced", f"{ref} was rotated or shredded by somebody else meanwhile", hint="strongroom ls")
