"""The keys of a room: unwrapped by its key store, rotated, and recovered from shares."""

from __future__ import annotations

import base64
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Row, delete, select, update
from sqlalchemy.engine import Connection

from strongroom.core import canonical
from strongroom.core.clock import now
from strongroom.core.files import locked
from strongroom.core.ids import parse_id
from strongroom.crypto.keys import derive, random_key
from strongroom.crypto.keystores import Keystore, PassphraseSource, create_keystore, open_keystore
from strongroom.crypto.recovery import create_recovery, open_with_shares, seal_for_recovery
from strongroom.crypto.sealing import seal, unseal
from strongroom.crypto.shamir import Share
from strongroom.crypto.signatures import Signer
from strongroom.errors import BackendError, IntegrityError, NotFound, StrongroomError, Tampered, UsageError
from strongroom.ledger.key import log_signer
from strongroom.storage.db import Database, put_packs, puts, room, versions
from strongroom.storage.prepared import Prepared
from strongroom.vault.config import RoomConfig
from strongroom.vault.record import VersionRecord, job_context

T = TypeVar("T")


class _Unknown(Exception):
    """The room key in use is not in memory, and its key store can't be asked here. Nobody sees it but `sealing`."""


_ROOM = Prepared(select(room))
_ROOM_HELD = Prepared(select(room).with_for_update(read=True))  # SQLite's transactions that write are alone anyhow
_ROOM_MINE = Prepared(select(room).with_for_update())


class RoomKeys:
    """Unwraps the room key on first use and keeps it in memory. Raises Sealed while the key store is not to be had."""

    def __init__(self, db: Database, folder: Path, room_id: bytes, passphrase: PassphraseSource | None = None) -> None:
        self._db, self._folder, self._room_id, self._passphrase = db, folder, room_id, passphrase
        self._cached: tuple[int, bytes] | None = None  # the epoch of the room key, and the key
        self._opened: bytes | None = None  # the signing seed
        self._signer: Signer | None = None
        self._log_signer: Signer | None = None
        self._lock = threading.Lock()

    # -- creating ------------------------------------------------------------------------------------------------

    def create(self, keystore_uri: str, recovery: tuple[int, int] | None) -> tuple[str, list[Share]]:
        """New keys for a new room; returns the key store's URI, and the recovery shares, which are kept nowhere
        else."""
        keystore = create_keystore(keystore_uri, self._room_id.hex(), self._folder, passphrase=self._passphrase)
        key = random_key()
        public, shares = create_recovery(*recovery) if recovery else (None, [])
        with self._db.transaction() as tx:
            tx.execute(
                room.insert().values(
                    room_id=self._room_id.hex(),
                    created_at=now(),
                    keystore_uri=keystore.uri,
                    wrapped_room_key=keystore.wrap(key, self._context()),
                    secrets=self._seal_secrets(key, random_key(), public),
                    recovery_sealed=seal_for_recovery(public, key, self._room_id) if public else None,
                    recovery_threshold=recovery[0] if recovery else None,
                    recovery_shares=recovery[1] if recovery else None,
                    key_epoch=1,
                )
            )
        self._cached = (1, key)
        return keystore.uri, shares

    # -- using ---------------------------------------------------------------------------------------------------

    @property
    def keystore(self) -> Keystore:
        return self._keystore(self._row())

    @property
    def room_key(self) -> bytes:
        """The room key in use; unwrapped again if somebody else has rotated it since. The key store that the database
        named a moment ago may have been left by then, and its key destroyed."""
        return self._unwrapped()[1]

    def _unwrapped(self) -> tuple[Row[Any], bytes]:
        return self.with_key(self._row)

    def current(self, tx: Connection) -> bytes:
        """The room key in use until `tx`, which writes, ends. Whatever is sealed for the database is sealed in a
        transaction, under the key that this returns: sealed under one that another process has just replaced, it could
        never be opened. On PostgreSQL it holds those up who would replace it. Only within `sealing`,
        which has the key unwrapped first where it is not in memory."""
        return self._known(self._row(tx, _ROOM_HELD))

    def sealing(self, write: Callable[[], T]) -> T:
        """What `write` gives, which writes in a transaction, with the key that is `current` in it. Where that has to be
        unwrapped first it is undone, and done again with the key: everybody who writes would wait for a key store that
        is asked in a transaction, as long as that takes."""
        while True:
            try:
                return write()
            except _Unknown:
                self.room_key  # noqa: B018 - in memory from here on

    def with_key(self, read: Callable[[Connection], T]) -> tuple[T, bytes]:
        """What `read` reads, and the room key that was in use then, for what is unsealed: read anew where that key has
        gone meanwhile. Its key store is asked once nothing is held."""
        while True:
            with self._db.reading() as tx:
                found, row = read(tx), self._row(tx)
            try:
                return found, self._of(row)
            except StrongroomError:
                if self._row().key_epoch <= row.key_epoch:
                    raise

    def _known(self, row: Row[Any]) -> bytes:
        cached = self._cached  # not under the lock, which is held while a key store is asked
        if cached is None or cached[0] != row.key_epoch:
            raise _Unknown
        return cached[1]

    def _of(self, row: Row[Any]) -> bytes:
        with self._lock:
            if self._cached is None or self._cached[0] != row.key_epoch:
                self._cached = (row.key_epoch, self._keystore(row).unwrap(row.wrapped_room_key, self._context()))
            return self._cached[1]

    def _keystore(self, row: Row[Any]) -> Keystore:
        config = RoomConfig.read(self._folder, older=True)  # its log key is none of this module's business
        if row.keystore_uri not in config.keystores:
            # Whoever writes to the database must not choose the server that is given the key store's token.
            raise Tampered(
                "keystore.not_pinned",
                f"the database names a key store that is not one of this room's ({', '.join(config.keystores)})",
                hint="the database was altered; restore it from a backup",
            )
        return open_keystore(row.keystore_uri, self._room_id.hex(), self._folder, passphrase=self._passphrase)

    @property
    def signer(self) -> Signer:
        """The room's signature key."""
        if self._signer is None:
            self._signer = Signer(self._seed)
        return self._signer

    @property
    def log_signer(self) -> Signer:
        """The key that signs the log's checkpoints."""
        if self._log_signer is None:
            self._log_signer = log_signer(self._seed)
        return self._log_signer

    @property
    def challenge_key(self) -> bytes:
        """What challenges of this room are recognised by."""
        return derive(self._seed, "challenge")

    @property
    def reading_key(self) -> bytes:
        """What reading passes of this room are recognised by."""
        return derive(self._seed, "reading")

    @property
    def copy_key(self) -> bytes:
        """What the keys derive from that copies are on their way under (spec/release.md, section 4)."""
        return derive(self._seed, "copy")

    @property
    def _seed(self) -> bytes:
        """The room's signing seed, which a room has for good: asked for once, so that a release need not ask again."""
        if self._opened is None:
            row, key = self._unwrapped()
            self._opened, _ = self._open_secrets(key, row)
        return self._opened

    # -- rotating and recovering ---------------------------------------------------------------------------------

    def rotate(self, to_uri: str | None = None) -> dict[str, int | str]:
        """A new room key under a new key-encryption key (or another key store); everything sealed under the old room
        key is sealed anew, in one transaction. Packs stay as they are: they are encrypted under version keys."""
        with self._taking_turns():
            old_store = self.keystore
            if to_uri is None:
                new_store = old_store.rotate()
            else:
                new_store = create_keystore(to_uri, self._room_id.hex(), self._folder, passphrase=self._passphrase)
            resealed, epoch = self._install(None, random_key(), new_store)
            old_store.retire()
        return {"keystore": new_store.uri, "resealed": resealed, "key_epoch": epoch}

    def drill(self, shares: Sequence[str]) -> None:
        """Prove that these shares open the room, and note when; changes nothing else."""
        self._recovered(shares)
        with self._db.transaction() as tx:
            tx.execute(update(room).values(recovery_proven_at=now()))

    def recover(self, shares: Sequence[str], keystore_uri: str) -> dict[str, int | str]:
        """Open the room with `shares` and put its key, made anew, under another key store: the old one is lost."""
        with self._taking_turns():
            key = self._recovered(shares)
            store = create_keystore(keystore_uri, self._room_id.hex(), self._folder, passphrase=self._passphrase)
            resealed, epoch = self._install(key, random_key(), store)
        return {"keystore": store.uri, "resealed": resealed, "key_epoch": epoch}

    @contextmanager
    def _taking_turns(self) -> Iterator[None]:
        """Two at a time would each pin what the other does not know of, and the slower one retire a key store that is
        not the one before its own."""
        with ExitStack() as stack:
            try:
                (self._folder / "locks").mkdir(mode=0o700, exist_ok=True)  # it need not be in a backup
                stack.enter_context(locked(self._folder / "locks" / "room-key"))
            except OSError as error:
                raise BackendError(
                    "room.unwritable",
                    f"can't make a lock file in {self._folder / 'locks'}: {error.strerror}",
                    hint="free space, and make the room's folder writable for this user",
                ) from None
            yield

    def _recovered(self, shares: Sequence[str]) -> bytes:
        parsed = [Share.parse(share) for share in shares]
        row = self._row()
        if row.recovery_sealed is None:
            raise UsageError(
                "recovery.none",
                "this room was made without recovery shares, and they can only be made with the room",
                hint="put the weights into a new room: strongroom --room NEW-FOLDER init --recovery 2of3",
            )
        key = open_with_shares(row.recovery_sealed, parsed, self._room_id)
        self._open_secrets(key, row)  # the key is the one in use, not an older one
        return key

    def _install(self, old_key: bytes | None, new_key: bytes, store: Keystore) -> tuple[int, int]:
        """Seal everything under `new_key` and wrap that; how much it was, and the key's number. Nothing changes unless
        all of it does.

        `old_key` None is the one in use. Both key stores are pinned while the database changes from one to the other.
        """
        config = RoomConfig.read(self._folder, older=True)  # its log key is none of this module's business
        config.pin(self._folder, [*config.keystores, store.uri])
        try:
            # Before it is anybody's turn: key stores can be slow, and all who write would wait for them.
            wrapped = store.wrap(new_key, self._context())
            count, epoch = self.sealing(lambda: self._replace(old_key, new_key, store.uri, wrapped))
        except BaseException:
            # Only a key that the database certainly does not name may go.
            if self._row().keystore_uri in config.keystores and store.uri not in config.keystores:
                store.retire()
                config.pin(self._folder, config.keystores)
            raise
        with self._lock:
            self._cached = (epoch, new_key)
        config.pin(self._folder, [store.uri])
        return count, epoch

    def _replace(self, old_key: bytes | None, new_key: bytes, uri: str, wrapped: bytes) -> tuple[int, int]:
        # Not of one snapshot, which would be taken before those have ended who seal under the old key.
        with self._db.sequencing() as tx:
            row = self._row(tx, _ROOM_MINE)
            opening, epoch = old_key or self._known(row), row.key_epoch + 1
            count = self._reseal(tx, opening, new_key)
            seed, public = self._open_secrets(opening, row)
            tx.execute(
                update(room).values(
                    keystore_uri=uri,
                    wrapped_room_key=wrapped,
                    secrets=self._seal_secrets(new_key, seed, public),
                    recovery_sealed=seal_for_recovery(public, new_key, self._room_id) if public else None,
                    key_epoch=epoch,
                )
            )
        return count, epoch

    def _reseal(self, tx: Connection, old_key: bytes, new_key: bytes) -> int:
        """Every version's record, and those of jobs under way; a job's that does not open is dropped with its job."""
        count = 0
        for item in tx.execute(select(versions).where(versions.c.record.is_not(None))).all():
            try:
                record = VersionRecord.unseal(old_key, item.record, parse_id(item.version_id))
            except IntegrityError as error:
                raise Tampered(
                    "record.unreadable",
                    f"the record of {item.name}@{item.number} does not open: {error.message}",
                    hint="restore the database from a backup; the room key was not changed",
                ) from None
            values = {"record": record.seal(new_key)}
            tx.execute(update(versions).where(versions.c.version_id == item.version_id).values(values))
            count += 1
        for item in tx.execute(select(puts)).all():
            context = job_context(item.put_id, item.fingerprint)
            try:
                record = VersionRecord.unseal(old_key, item.record, parse_id(item.version_id), context)
            except IntegrityError:
                tx.execute(delete(put_packs).where(put_packs.c.put_id == item.put_id))
                tx.execute(delete(puts).where(puts.c.put_id == item.put_id))
                continue
            tx.execute(update(puts).where(puts.c.put_id == item.put_id).values(record=record.seal(new_key, context)))
            count += 1
        return count

    # -- inside --------------------------------------------------------------------------------------------------

    def _row(self, tx: Connection | None = None, query: Prepared = _ROOM) -> Row[Any]:
        if tx is None:
            with self._db.reading() as reading:
                return self._row(reading)
        row = query(tx).one_or_none()
        if row is None or row.room_id != self._room_id.hex():
            raise NotFound("room.missing", "the database holds no room, or another one", hint="strongroom init")
        if not isinstance(row.key_epoch, int) or not all(
            isinstance(value, bytes) for value in (row.wrapped_room_key, row.secrets)
        ):
            raise Tampered("room.malformed", "the room's row in the database is not one that a room writes")
        return row

    def _seal_secrets(self, key: bytes, seed: bytes, recovery_public: bytes | None) -> bytes:
        # The recovery key's public half is sealed too: whoever could replace it would be given the next room key.
        value = {
            "signing_seed": base64.b64encode(seed).decode(),
            "recovery_public": base64.b64encode(recovery_public).decode() if recovery_public else None,
        }
        return seal(key, canonical.encode(value), self._secrets_context())

    def _open_secrets(self, key: bytes, row: Row[Any]) -> tuple[bytes, bytes | None]:
        """The signing seed, and the public half of the recovery key if there is one."""
        value = canonical.decode(unseal(key, row.secrets, self._secrets_context()), what="the room's secrets")
        public = value["recovery_public"]
        return base64.b64decode(value["signing_seed"]), base64.b64decode(public) if public else None

    def _context(self) -> str:
        return f"room key {self._room_id.hex()}"

    def _secrets_context(self) -> str:
        return f"room secrets {self._room_id.hex()}"
