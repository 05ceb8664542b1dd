"""A room of release 0.1.0 gets a log: what is in it is recorded as brought in by the upgrade."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sqlalchemy import Row, func, select
from sqlalchemy.engine import Connection

from strongroom.core.ids import parse_principal
from strongroom.crypto.keystores import PassphraseSource
from strongroom.errors import Conflict, Tampered, UsageError
from strongroom.formats.entry import CUSTODIAN, Entry
from strongroom.ledger.log import Decision, Draft
from strongroom.policy.state import State
from strongroom.storage.db import SCHEMA, Database, versions
from strongroom.vault.config import RoomConfig
from strongroom.vault.founding import FIRST_ROLES
from strongroom.vault.journal import locked
from strongroom.vault.vault import Vault
from strongroom.vault.versions import check_row

_RESTORE = "restore the database from a backup"


@dataclass(frozen=True)
class Upgraded:
    """What was done: the schema that the database had, and how many versions the log names."""

    schema: int
    versions: int


def upgrade(folder: Path, *, owner: str, custody: str = "team", passphrase: PassphraseSource | None = None) -> Upgraded:
    """Bring the room in `folder` to this release. Killed at any point, the same call goes on where it was.

    `owner` becomes the first principal, and gets a key: principals of 0.1.0 had none, so nobody else is carried over. A
    room that has a log already has its owner, and keeps it; only its database is brought to this release.
    Conflict ``upgrade.not_needed``, ``upgrade.busy``; errors of `Database.migrate`.
    """
    if parse_principal(owner).startswith("team/"):
        raise UsageError("init.owner", "a team owns nothing: its members act", hint="--owner user/NAME")
    if custody not in FIRST_ROLES:
        raise UsageError("init.custody", f"there is no custody {custody!r:.40}", hint="--custody team or solo")
    config = RoomConfig.read(folder, older=True)
    with locked(folder / "locks" / "upgrade") as mine:
        if not mine:
            raise Conflict("upgrade.busy", "the room is being upgraded", hint="wait for it to end")
        found = Database.migrate(config.db_url(folder))
        if config.log_key:
            return _migrated(config.db_url(folder), found)
        with contextlib.closing(Vault(folder, passphrase=passphrase, config=config)) as first:
            config = replace(config, log_key=first.keys.log_signer.public_key)
        with contextlib.closing(Vault(folder, passphrase=passphrase, config=config)) as vault:
            count = _record(vault, owner, custody)
        # Last: with the log's key the room is one of this release.
        config.write(folder)
    return Upgraded(found, count)


def _migrated(url: str, found: int) -> Upgraded:
    """Of a room that has a log already only the database was older."""
    if found == SCHEMA:
        raise Conflict(
            "upgrade.not_needed", "this room has a log, and its database is of this release", hint="strongroom status"
        )
    with contextlib.closing(Database.open(url)) as database, database.reading() as tx:
        return Upgraded(found, tx.execute(select(func.count()).select_from(versions)).scalar_one())


def _record(vault: Vault, owner: str, custody: str) -> int:
    """The first entries of the log, those that are missing: the room, its owner, every version; how many versions."""
    with vault.custodian.ledger.view() as state:
        begun, owned, known = bool(state.room), set(state.principals), dict(state.versions)
        if begun and state.custody != custody:
            raise Conflict(
                "upgrade.custody",
                f"the upgrade was begun with the custody {state.custody}",
                hint=f"--custody {state.custody}",
            )
    if owned and owner not in owned:
        raise Conflict(
            "upgrade.owner", f"the upgrade was begun for {', '.join(owned)}", hint=f"--owner {next(iter(owned))}"
        )
    if not owned:
        key = vault.identities.ensure(owner).public_key
        vault.custodian.founding.begin(owner, key, custody, vault.keys.signer.public_key, begun=begun)
    with vault.db.reading() as tx:
        rows = tx.execute(select(versions).order_by(versions.c.name, versions.c.number)).all()
    for row in rows:
        ref = f"{check_row(row).name}@{row.number}"
        if row.state == "active":
            vault.record(row)  # what the log will say has to be what the sealed record says
        if ref not in known:
            vault.custodian.ledger.append(_put(row, ref))
        if row.state == "shredded" and not (ref in known and known[ref].shredded):
            vault.custodian.ledger.append(_shred(ref))
    return len(rows)


def _shred(ref: str) -> Decision[State]:
    return lambda _, __, now: Draft(Entry("shred", now, CUSTODIAN, ref, {"statement": ""}))


def _put(row: Row[Any], ref: str) -> Decision[State]:
    body = {
        "version": row.version_id,
        "revision": row.revision,
        "manifest": row.manifest_sha256,
        "bytes": row.bytes,
        "positions": row.positions,
        "statement": "",
    }

    def decide(_: Connection, __: State, now: int) -> Draft:
        entry = Entry("put", now, CUSTODIAN, ref, body)
        try:
            entry.encode()
        except ValueError:
            raise Tampered(
                "record.malformed", f"the database's row of {ref} is not one that a room writes", hint=_RESTORE
            ) from None
        return Draft(entry)

    return decide
