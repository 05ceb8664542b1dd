"""The vault: one deep module over store, database and keys. Everything that changes or releases weights goes through
it."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from sqlalchemy import Row, bindparam, func, insert, literal_column, select
from sqlalchemy.engine import Connection

from strongroom.core.clock import now, text, unix
from strongroom.core.ids import Ref, parse_id, parse_principal, random_id
from strongroom.core.limits import LIMITS
from strongroom.core.progress import Progress, silent
from strongroom.core.settings import Settings
from strongroom.crypto.identity import Identities
from strongroom.crypto.keystores import PassphraseSource
from strongroom.crypto.recovery import signer_of as recovery_signer
from strongroom.crypto.segments import VersionKeys
from strongroom.crypto.session_key import SessionKeys, signer_of
from strongroom.crypto.shamir import Share
from strongroom.errors import (
    AuthRequired,
    Conflict,
    NotFound,
    Rollback,
    Tampered,
    UsageError,
)
from strongroom.formats.bundle import KeyBundle
from strongroom.formats.dsse import Envelope, pre_authentication_encoding
from strongroom.formats.entry import Entry
from strongroom.formats.index import Index
from strongroom.formats.layout import markable_bytes
from strongroom.formats.manifest import PAYLOAD_TYPE, Manifest
from strongroom.formats.statement import Voice
from strongroom.formats.suites import Suite
from strongroom.formats.upload import files_digest
from strongroom.ledger.key import LogKey
from strongroom.ledger.log import Draft, Ledger
from strongroom.ledger.published import Published, read_from
from strongroom.policy import acts
from strongroom.policy.query import ROOM
from strongroom.policy.state import State
from strongroom.storage.blobs import Blobs, open_blobs
from strongroom.storage.db import Database, versions
from strongroom.storage.image import SealedImage, read_manifest
from strongroom.storage.prepared import Prepared
from strongroom.vault import same
from strongroom.vault.config import NAME as CONFIG
from strongroom.vault.config import RoomConfig
from strongroom.vault.copies import Copies
from strongroom.vault.custodian import Custodian
from strongroom.vault.founding import FIRST_ROLES
from strongroom.vault.journal import Journal
from strongroom.vault.opened import opened
from strongroom.vault.put import Plan, parse_share, put
from strongroom.vault.record import VersionRecord
from strongroom.vault.release import Bundles
from strongroom.vault.roomkeys import RoomKeys
from strongroom.vault.rotate import rotate
from strongroom.vault.sent import Sent
from strongroom.vault.shred import shred
from strongroom.vault.source import ModelSource
from strongroom.vault.verify import VerifyReport, verify
from strongroom.vault.versions import VersionInfo, as_logged, check_row, measured

_NAMED = select(versions).where(versions.c.name == bindparam("name"))
_NUMBERED = Prepared(_NAMED.where(versions.c.number == bindparam("number")))
_NEWEST = Prepared(_NAMED.where(versions.c.state == literal_column("'active'")).order_by(versions.c.number.desc()))


@dataclass(frozen=True)
class PutResult:
    """A version that is in the room; `files` are paths, `unmarked` counts bytes of tensors without a mark by reason,
    `same_as` are versions of the very same files."""

    ref: str
    digest: str
    bytes: int
    stored_bytes: int
    segments: int
    positions: int
    files: tuple[str, ...]
    unmarked: dict[str, int]
    resumed_packs: int
    entry: int
    same_as: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        return {**vars(self), "files": list(self.files), "same_as": list(self.same_as)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> PutResult:
        """The reverse, of an answer that has these members."""
        found = {each.name: value[each.name] for each in fields(cls)}
        return cls(**found | {name: tuple(found[name]) for name in ("files", "same_as")})


class Vault:
    """An embedded room: a folder with a database, a key store and a store. Open with `Vault.open` or make with
    `Vault.init`."""

    witnesses = None  # no card names any: custodian and client are one process

    def __init__(
        self,
        folder: Path,
        *,
        passphrase: PassphraseSource | None = None,
        clock: Callable[[], int] = unix,
        config: RoomConfig | None = None,
    ) -> None:
        self.folder = folder = folder.absolute()
        self.clock = clock  # seconds since 1970
        config = config or RoomConfig.read(folder)
        self.id = config.room
        self.db = Database.open(config.db_url(folder))
        self.blobs: Blobs = open_blobs(config.store_url(folder), create=False)
        self.keys = RoomKeys(self.db, folder, self.id, passphrase)
        self.workers = Settings.from_environment().workers
        self.identities = Identities(folder / "identities")
        self.log_key = key = LogKey(self.id, config.log_key)
        self.published = Published(folder / "log", key)
        self.copies = Copies(self)
        ledger = Ledger(
            self.db,
            key,
            lambda: self.keys.log_signer,
            State,
            clock=clock,
            published=self.published,
            others=self._appended_elsewhere,
        )
        self.custodian = Custodian(self, ledger)

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
        custody: str = "team",
        passphrase: PassphraseSource | None = None,
    ) -> tuple[Vault, list[Share]]:
        """Make a room in a new or empty folder, with `owner` as its first principal; returns it and the recovery
        shares. `custody` is the policy that it starts with: team or solo."""
        if parse_principal(owner).startswith("team/"):
            raise UsageError("init.owner", "a team owns nothing: its members act", hint="--owner user/NAME")
        if custody not in FIRST_ROLES:
            raise UsageError("init.custody", f"there is no custody {custody!r:.40}", hint="--custody team or solo")
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
        config = RoomConfig(random_id(), store, db, (keystore,), b"")
        try:
            shares = cls._furnish(folder.absolute(), config, recovery, owner, custody, passphrase)
        except BaseException:
            # The folder was empty, so all that is in it now is ours; else the same command could not be given again.
            for left in folder.iterdir():
                shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
            raise
        return cls(folder, passphrase=passphrase), shares

    @classmethod
    def _furnish(
        cls,
        folder: Path,
        config: RoomConfig,
        recovery: tuple[int, int] | None,
        owner: str,
        custody: str,
        passphrase: PassphraseSource | None,
    ) -> list[Share]:
        try:
            for part in ("keys", "locks"):
                (folder / part).mkdir(mode=0o700)
        except OSError as error:
            raise UsageError("room.folder", f"can't make a room in {folder}: {error.strerror}") from None
        blobs = open_blobs(config.store_url(folder))
        blobs.check()
        if next(iter(blobs.list("")), None) is not None:
            # One room to a store: fsck could not tell another room's objects from its own orphans.
            raise Conflict(
                "store.not_empty", f"the store {blobs.url} is not empty", hint="--store with a new folder or prefix"
            )
        blobs.close()
        Database.open(config.db_url(folder), create=True).close()
        # Its keys are in use, through its database, until the room can be opened by room.json.
        with contextlib.closing(cls(folder, passphrase=passphrase, config=config)) as first:
            uri, shares = first.keys.create(config.keystores[0], recovery)
            config = replace(config, log_key=first.keys.log_signer.public_key)
            with contextlib.closing(cls(folder, passphrase=passphrase, config=config)) as vault:
                vault.keys = first.keys
                identity = vault.identities.create(owner)
                public = recovery_signer(shares).public_key if shares else b""
                vault.custodian.founding.begin(
                    owner, identity.public_key, custody, vault.keys.signer.public_key, recovery=public
                )
                # Last: a folder without this file is no room, so an interrupted init leaves nothing that looks like
                # one.
                config.pin(folder, [uri])
        return shares

    def close(self) -> None:
        self.db.close()
        self.blobs.close()

    # -- where clients read --------------------------------------------------------------------------------------

    def blobs_at(self, url: str) -> Blobs:  # noqa: ARG002 - a served room's may be elsewhere
        """The store that a release names."""
        return self.blobs

    def read_copy(self, store: str, name: str) -> bytes:  # noqa: ARG002 - as `blobs_at`
        """A piece of a plaintext copy, encrypted: see `Copies.read`."""
        return self.copies.read(name)

    def read_log(self) -> Callable[[str], bytes]:
        """How a verifier reads what is published of the log, by name."""
        self.publish_log()
        return read_from(self.folder / "log")

    def cosigned_note(self, note: bytes) -> bytes:
        """The published note of the same checkpoint, which may have cosignatures of witnesses; else `note`."""
        return self.published.with_cosignatures(note)

    def publish_log(self) -> None:
        """Bring the published tiles and checkpoint up to the newest entry."""
        self.custodian.ledger.publish(wait=True)

    @property
    def signer(self) -> bytes:
        """The room's public key for manifests, as the first entry of the log has it."""
        with self.custodian.ledger.view() as state:
            return bytes.fromhex(state.signer)

    def voice(self, by: str) -> Voice:
        """The principal `by`, to speak with the key that lies here; AuthRequired ``identity.missing``."""
        signer = signer_of(self.identities, self.sessions, by, self.clock())
        return Voice(self.id.hex(), by, signer, self.clock)

    # -- principals ----------------------------------------------------------------------------------------------

    def principal_ls(self) -> list[dict[str, Any]]:
        """Everybody whom the log knows, by path."""
        with self.custodian.ledger.view() as state:
            found = sorted(state.principals.values(), key=lambda each: each.path)
            return [
                {
                    "path": each.path,
                    "person": each.person,
                    "roles": list(each.roles),
                    "teams": list(each.teams),
                    "state": each.state,
                    "since": text(each.since),
                }
                for each in found
            ]

    def principal(self, path: str | None) -> str:
        """The principal to act as: `path`, else the only one that this machine has the key of, else the only one."""
        states = {str(item["path"]): str(item["state"]) for item in self.principal_ls()}
        known = [item for item, state in states.items() if state == "active"]
        if path is None:
            mine = [item for item in sorted({*self.identities.ls(), *self.sessions.ls()}) if item in known]
            if len(mine) == 1:
                return mine[0]
            raise AuthRequired(
                "principal.ambiguous",
                f"the room knows {', '.join(known) or 'no principal'}; say which one you are",
                hint=f"--as {known[0]} or STRONGROOM_AS={known[0]}" if known else "strongroom principal add user/NAME",
            )
        if parse_principal(path) not in known:
            what = f"is {states[path]}" if path in states else "is nobody"
            raise AuthRequired(
                "principal.unknown",
                f"{path} (of --as or STRONGROOM_AS) {what} in this room; active are {', '.join(known)}",
                hint=f"an officer or executive runs: strongroom principal restore {path}"
                if states.get(path) == "suspended"
                else "--as, with one of these",
            )
        return path

    @property
    def sessions(self) -> SessionKeys:
        """The keys that logins to this room have introduced, on this machine."""
        return SessionKeys(Settings.from_environment().state_folder, self.id)

    # -- versions ------------------------------------------------------------------------------------------------

    def ls(self, name: str | None = None) -> list[VersionInfo]:
        """Versions, all or of one name, oldest first, as the log has them; no key is needed. NotFound for none."""
        query = select(versions).order_by(versions.c.name, versions.c.number)
        if name is not None:
            query = query.where(versions.c.name == Ref.parse(name).name)
        with self.db.reading() as tx:
            found = [VersionInfo.of(row) for row in tx.execute(query)]
        if name is not None and not found:
            raise NotFound("weights.missing", f"the room has no weights {name}", hint="strongroom ls")
        return as_logged(found, self.custodian.ledger)

    def find(self, ref: str) -> Row[Any]:
        """The database row of a version that can be read; NotFound otherwise, Tampered if it does not hold together."""
        return self.readable(self.row(ref))

    def readable(self, row: Row[Any]) -> Row[Any]:
        """`row` itself; errors as `find`."""
        if check_row(row).state != "active":
            raise NotFound(
                "weights.shredded", f"{row.name}@{row.number} was shredded at {row.shredded_at}", hint="strongroom ls"
            )
        return row

    def row(self, ref: str) -> Row[Any]:
        """The row, unchecked, of a numbered version, whatever its state, or of the newest that is active."""
        parsed = Ref.parse(ref)
        with self.db.reading() as tx:
            if parsed.number is not None:
                row = _NUMBERED(tx, name=parsed.name, number=parsed.number).first()
            else:
                row = _NEWEST(tx, name=parsed.name).first()
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
        row, image = opened(self, ref, lambda row, record: (row, self.image(record)))
        layout, report = image.layout, image.index.report
        (info,) = as_logged([VersionInfo.of(row)], self.custodian.ledger)
        return {
            **info.as_json(),
            "ceiling": self.custodian.ceilings(info.ref),
            "version": row.version_id,
            "suite": image.manifest.suite.name,
            "signed_by": self.keys.signer.key_id,
            "files": [
                {"path": entry.path, "kind": entry.kind, "bytes": entry.bytes, "sha256": digest}
                for entry, digest in zip(layout.files, image.index.sha256, strict=True)
            ],
            "marked_bytes": layout.positions * layout.marked,
            "markable_bytes": markable_bytes(layout.runs),
            "common_segment": layout.common,
            "marked_segment": layout.marked,
            "packs": len(image.manifest.packs),
            **report,
        }

    def status(self) -> dict[str, Any]:
        """See `strongroom.vault.status.status`."""
        from strongroom.vault.status import status

        return status(self)

    def trace(
        self, path: Path, *, by: str, weights: str | None, progress: Progress = silent, **more: Any
    ) -> dict[str, Any]:
        """See `strongroom.vault.search.search`."""
        from strongroom.vault.search import search

        return search(self, path, by=by, weights=weights, progress=progress, **more)

    def bundle(self, ref: str, holder: str) -> KeyBundle:
        """The key bundle of `holder` for a version: what opens exactly one variant of each marked segment."""
        return self.bundles(ref).of(self.principal(holder))

    def bundles(self, ref: str) -> Bundles:
        """What makes the key bundles of a version, for whoever may have one."""
        signer = self.keys.signer.public_key
        return opened(self, ref, lambda _, record: Bundles(record, self.manifest(record), signer))

    # -- put -----------------------------------------------------------------------------------------------------

    def put(
        self,
        source: ModelSource,
        name: str,
        *,
        by: str | Sent,
        share: str = "auto",
        positions: int = 16384,
        suite: Suite = Suite.BLAKE3,
        progress: Progress = silent,
    ) -> PutResult:
        """Store `source` as the next version of `name`. Killed at any point, the same call goes on where it was.

        `by`: the principal, whose key is on this machine; or what somebody elsewhere has signed of it."""
        said = by if isinstance(by, Sent) else self.voice(by)
        self.check_put(name, positions)
        plan = Plan.of(source, share=parse_share(share), positions=positions, suite=suite)
        signer = self.keys.signer
        with self.journal(plan.fingerprint(name), name, said.by) as journal:
            resumed = len(journal.packs)
            try:
                manifest, index = put(plan, journal, self.blobs, self.id, workers=self.workers, progress=progress)
            except Conflict as error:
                if error.code == "source.changed":
                    journal.forget()
                raise
            self.sign(manifest, signer)
            if not isinstance(said, Sent):
                said = Sent.of(said, name, same.digests(index))
            row, entry, alike = self._publish(journal, manifest, index, name, said)
        return PutResult(
            ref=f"{row.name}@{row.number}",
            digest=f"sha256:{row.manifest_sha256}",
            bytes=row.bytes,
            stored_bytes=row.stored_bytes,
            segments=row.segments,
            positions=row.positions,
            files=tuple(file.path for file in index.layout.files),
            unmarked=plan.unmarked,
            resumed_packs=resumed,
            entry=entry,
            same_as=tuple(alike),
        )

    def put_before(self, entry: int, found: Entry) -> PutResult:
        """What the put was answered with that is `entry` of the log, as long as the version is there: else NotFound.
        Packs that an earlier try had stored are not counted: that was known while it was put."""
        row, index = opened(self, found.ref, lambda row, record: (row, self.image(record).index))
        with self.custodian.ledger.view() as state:
            there = same.there(state)
        with self.db.reading() as tx:
            alike = same.put_before(tx, there, files_digest(same.digests(index)), entry)
        return PutResult(
            ref=found.ref,
            digest=f"sha256:{found.body['manifest']}",
            bytes=found.body["bytes"],
            stored_bytes=row.stored_bytes,
            segments=row.segments,
            positions=found.body["positions"],
            files=tuple(file.path for file in index.layout.files),
            unmarked=index.report["unmarked"],
            resumed_packs=0,
            entry=entry,
            same_as=tuple(alike),
        )

    def check_put(self, name: str, positions: int) -> None:
        """UsageError ``put.*`` for what no version can be called, or have."""
        if Ref.parse(name).number is not None:
            raise UsageError("put.numbered", f"put chooses the version's number itself; give {Ref.parse(name).name}")
        if name == ROOM:
            raise UsageError("put.reserved", f"{ROOM!r} is what policies call the room itself; give another name")
        if not 0 <= positions <= LIMITS.positions:
            raise UsageError(
                "put.positions", f"the number of positions is from 0 to {LIMITS.positions}", hint="--positions 16384"
            )

    def sign(self, manifest: Manifest, signer: Any) -> None:
        payload = manifest.encode()
        signature = signer.sign(pre_authentication_encoding(PAYLOAD_TYPE, payload))
        envelope = Envelope(PAYLOAD_TYPE, payload, ((signer.key_id, signature),))
        self.blobs.delete(manifest.name)  # an interrupted attempt may have left one that nothing refers to
        self.blobs.write(manifest.name, [envelope.encode()])

    def _publish(
        self, journal: Journal, manifest: Manifest, index: Index, name: str, said: Sent
    ) -> tuple[Row[Any], int, list[str]]:
        """One transaction: the version appears, and its journal goes; which versions have the very same files."""
        digest, size = manifest.digest(), sum(entry.bytes for entry in index.layout.files)
        rows: list[Row[Any]] = []
        alike: list[str] = []

        def decide(tx: Connection, state: State, at: int) -> Draft:
            newest = tx.execute(select(func.max(versions.c.number)).where(versions.c.name == name)).scalar()
            if not isinstance(newest, int | None):
                raise Tampered("record.malformed", f"the database numbers a version of {name} {newest!r:.40}")
            # The log knows of those that somebody has deleted from the table, and no number is given twice.
            logged = [Ref.parse(ref) for ref in state.versions]
            number = max(newest or 0, *(ref.number or 0 for ref in logged if ref.name == name), 0) + 1
            record = replace(journal.record, name=name, number=number, manifest_digest=digest)
            body = {
                "version": record.version.hex(),
                "revision": record.revision,
                "manifest": digest.hex(),
                "bytes": size,
                "positions": manifest.positions,
            }
            # Whoever has begun it, hours ago maybe, may do so still.
            entry = acts.put(
                self.custodian.rules,
                state,
                said.statement,
                at,
                f"{name}@{number}",
                body,
                files=said.files.commitment,
                since=said.at,
            )
            tx.execute(
                insert(versions).values(
                    version_id=record.version.hex(),
                    name=name,
                    number=number,
                    state="active",
                    record=record.seal(self.keys.current(tx)),
                    bytes=size,
                    created_at=now(),
                    created_by=said.by,
                    **measured(manifest),
                )
            )
            # Read here: an error after the commit would call a put failed that is not.
            rows.append(tx.execute(select(versions).where(versions.c.version_id == record.version.hex())).one())
            journal.close(tx)
            alike[:] = same.put_before(tx, same.there(state), said.files.value)
            return Draft(entry, [said.files])

        receipt = self.keys.sealing(lambda: self.custodian.act(said.statement, "put", decide))
        return rows[-1], receipt.index, alike

    # -- rotate and shred ----------------------------------------------------------------------------------------

    def rotate(self, ref: str, *, by: str, progress: Progress = silent) -> dict[str, Any]:
        """Re-encrypt a version under a new version key; see `strongroom.vault.rotate`."""
        return rotate(self, ref, by=self.voice(by), progress=progress)

    def shred(self, ref: str, *, confirm: str, by: str) -> dict[str, Any]:
        """Destroy a version's keys, then its ciphertext; see `strongroom.vault.shred`."""
        try:
            return shred(self, ref, confirm=confirm, by=self.voice(by))
        finally:
            self.custodian.forget()  # the keys may have gone, whatever came after that

    def _appended_elsewhere(self, kind: str) -> None:
        """Another process has appended an entry of this type (empty: any): what it shredded is not kept opened here."""
        if kind in ("shred", ""):
            self.custodian.forget()

    # -- verify --------------------------------------------------------------------------------------------------

    def verify(self, ref: str, *, deep: bool = False, progress: Progress = silent) -> VerifyReport:
        """Check every byte of a version; what is wrong is in the report, not raised. CannotVerify, Sealed and
        BackendError are raised: they say nothing about the bytes."""
        return verify(self, ref, deep=deep, progress=progress)

    # -- inside --------------------------------------------------------------------------------------------------

    def journal(
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
