"""The keys of a room: unwrapped by its key store, rotated, and recovered from shares."""

from __future__ import annotations

import base64
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import Row, select, update

from strongroom.core import canonical
from strongroom.core.clock import now
from strongroom.crypto.keys import random_key
from strongroom.crypto.keystores import Keystore, PassphraseSource, create_keystore, open_keystore
from strongroom.crypto.recovery import create_recovery, open_with_shares, seal_for_recovery
from strongroom.crypto.sealing import seal, unseal
from strongroom.crypto.shamir import Share
from strongroom.crypto.signatures import Signer
from strongroom.errors import NotFound, UsageError
from strongroom.storage.db import Database, puts, room, versions
from strongroom.vault.record import VersionRecord


class RoomKeys:
    """Unwraps the room key on first use and keeps it in memory. Raises Sealed while the key store is not to be had."""

    def __init__(self, db: Database, folder: Path, room_id: bytes, passphrase: PassphraseSource | None = None) -> None:
        self._db, self._folder, self._room_id, self._passphrase = db, folder, room_id, passphrase
        self._key: bytes | None = None
        self._lock = threading.Lock()

    # -- creating ------------------------------------------------------------------------------------------------

    def create(self, keystore_uri: str, recovery: tuple[int, int] | None) -> list[Share]:
        """New keys for a new room; returns the recovery shares, which are kept nowhere else."""
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
        self._key = key
        return shares

    # -- using ---------------------------------------------------------------------------------------------------

    @property
    def keystore(self) -> Keystore:
        uri = self._row().keystore_uri
        return open_keystore(uri, self._room_id.hex(), self._folder, passphrase=self._passphrase)

    @property
    def unsealed(self) -> bool:
        """Whether this process has the room key in memory."""
        return self._key is not None

    @property
    def room_key(self) -> bytes:
        with self._lock:
            if self._key is None:
                self._key = self.keystore.unwrap(self._row().wrapped_room_key, self._context())
            return self._key

    @property
    def signer(self) -> Signer:
        """The room's signature key."""
        seed, _ = self._open_secrets(self.room_key, self._row())
        return Signer(seed)

    # -- rotating and recovering ---------------------------------------------------------------------------------

    def rotate(self, to_uri: str | None = None) -> dict[str, int | str]:
        """A new room key under a new key-encryption key (or another key store); everything sealed under the old room
        key is sealed anew, in one transaction. Packs stay as they are: they are encrypted under version keys."""
        old_key, old_store = self.room_key, self.keystore
        if to_uri is None:
            new_store = old_store.rotate()
        else:
            new_store = create_keystore(to_uri, self._room_id.hex(), self._folder, passphrase=self._passphrase)
        resealed = self._install(old_key, random_key(), new_store)
        old_store.retire()
        return {"keystore": new_store.uri, "resealed": resealed, "key_epoch": int(self._row().key_epoch)}

    def drill(self, shares: Sequence[Share]) -> None:
        """Prove that these shares open the room, and note when; changes nothing else."""
        self._recovered(shares)
        with self._db.transaction() as tx:
            tx.execute(update(room).values(recovery_proven_at=now()))

    def recover(self, shares: Sequence[Share], keystore_uri: str) -> dict[str, int | str]:
        """Open the room with `shares` and put its key, made anew, under another key store: the old one is lost."""
        key = self._recovered(shares)
        store = create_keystore(keystore_uri, self._room_id.hex(), self._folder, passphrase=self._passphrase)
        resealed = self._install(key, random_key(), store)
        return {"keystore": store.uri, "resealed": resealed, "key_epoch": int(self._row().key_epoch)}

    def _recovered(self, shares: Sequence[Share]) -> bytes:
        row = self._row()
        if row.recovery_sealed is None:
            raise UsageError(
                "recovery.none", "this room was made without recovery shares", hint="strongroom init --recovery 2of3"
            )
        key = open_with_shares(row.recovery_sealed, shares, self._room_id)
        self._open_secrets(key, row)  # the key is the one in use, not an older one
        return key

    def _install(self, old_key: bytes, new_key: bytes, store: Keystore) -> int:
        """Seal everything under `new_key` and wrap that; nothing changes unless all of it does."""
        count = 0
        with self._db.transaction() as tx:
            row = tx.execute(select(room)).one()
            for table in (versions, puts):
                for item in tx.execute(select(table).where(table.c.record.is_not(None))).all():
                    record = VersionRecord.unseal(old_key, item.record, bytes.fromhex(item.version_id))
                    primary = next(iter(table.primary_key.columns))
                    key_value = getattr(item, primary.name)
                    tx.execute(update(table).where(primary == key_value).values(record=record.seal(new_key)))
                    count += 1
            seed, public = self._open_secrets(old_key, row)
            tx.execute(
                update(room).values(
                    keystore_uri=store.uri,
                    wrapped_room_key=store.wrap(new_key, self._context()),
                    secrets=self._seal_secrets(new_key, seed, public),
                    recovery_sealed=seal_for_recovery(public, new_key, self._room_id) if public else None,
                    key_epoch=row.key_epoch + 1,
                )
            )
        with self._lock:
            self._key = new_key
        return count

    # -- inside --------------------------------------------------------------------------------------------------

    def _row(self) -> Row[Any]:
        with self._db.reading() as tx:
            row = tx.execute(select(room)).one_or_none()
        if row is None or row.room_id != self._room_id.hex():
            raise NotFound("room.missing", "the database holds no room, or another one", hint="strongroom init")
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
