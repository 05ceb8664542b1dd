"""Shredding: the keys of one version are destroyed, then its ciphertext."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sqlalchemy import Row, or_, select, update
from sqlalchemy.engine import Connection

from strongroom.core.clock import now
from strongroom.core.ids import parse_id
from strongroom.errors import BackendError, CannotVerify, Conflict, IntegrityError, Sealed, UsageError
from strongroom.formats.statement import Voice
from strongroom.ledger.log import Draft
from strongroom.policy import acts
from strongroom.policy.state import State
from strongroom.storage.db import versions
from strongroom.vault.journal import forget_all
from strongroom.vault.versions import check_row, object_names

if TYPE_CHECKING:
    from strongroom.vault.vault import Vault

_REST = "`strongroom fsck --repair` removes what the store may still have of it"
_TRIES = 3  # rotations that may end while what is to be deleted is looked up


class _Rotated(Exception):
    """What was looked up is another revision's. Nobody sees it but `shred`."""


def shred(vault: Vault, ref: str, *, confirm: str, by: Voice) -> dict[str, Any]:
    """Destroy a version's keys, then its ciphertext. There is no way back, except through copies made elsewhere.

    Whatever else the database or the store says of the version, its keys go. Given again for a shredded version, it
    destroys what unfinished jobs may hold, and clears the database's log.
    """
    row = vault.row(ref)  # unchecked: a damaged version must be shreddable, too
    name = f"{row.name}@{row.number}"
    if confirm != name:
        raise UsageError(
            "shred.confirm",
            f"shredding {name} can't be undone; confirm it by its full name",
            hint=f"strongroom shred {name} --confirm {name}",
        )
    for left in reversed(range(_TRIES)):
        try:
            return _shred(vault, row, by, anyhow=not left)
        except _Rotated:
            row = vault.row(name)
    raise AssertionError  # the last one goes on whatever the revision is


def _shred(vault: Vault, row: Row[Any], by: Voice, *, anyhow: bool) -> dict[str, Any]:
    name = f"{row.name}@{row.number}"
    # Not by its state: in a database that somebody wrote to, any row that has a record has keys.
    again = row.state == "shredded" and row.record is None
    names, remains = (set[str](), []) if again else _objects_of(vault, row)

    def destroy(tx: Connection) -> None:
        if not again:
            found = select(versions.c.revision).where(versions.c.version_id == row.version_id)
            if tx.execute(found).scalar() != row.revision:
                if not anyhow:
                    raise _Rotated
                remains.append(_REST)
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

    entry = _record(vault, name, by, destroy, remains)
    try:
        vault.db.scrub()
    except BackendError as error:
        remains.append(
            "the database's log still holds the wrapped key until its next checkpoint, or until "
            f"`strongroom shred {name} --confirm {name}` is given again: {error.message}"
        )
    deleted = 0
    for item in sorted(names):
        try:
            vault.blobs.delete(item)
            deleted += 1
        except BackendError as error:
            remains.append(f"the store still has {item} (`strongroom fsck --repair` removes it): {error.message}")
    return {
        "ref": name,
        "entry": entry,
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


def _record(
    vault: Vault, name: str, by: Voice, destroy: Callable[[Connection], None], remains: list[str]
) -> int | None:
    """Destroy the keys and record it, in one transaction; the entry that says so.

    A log that is damaged or can't be signed, or that doesn't know the version, must not keep the keys alive.
    """
    statement = by.say("shred", {"ref": name})

    def decide(tx: Connection, state: State, at: int) -> Draft:
        entry = acts.shred(vault.custodian.rules, state, statement, at)
        destroy(tx)
        return Draft(entry)

    try:
        return vault.custodian.act(statement, "administer", decide).index
    except (IntegrityError, CannotVerify, Sealed, Conflict) as error:
        if isinstance(error, Conflict) and error.code != "shred.unrecorded":
            raise
        with vault.db.transaction() as tx:
            destroy(tx)
        if not isinstance(error, Conflict):
            remains.append(f"the log could not record it: {error.message}")
        return None


def _objects_of(vault: Vault, row: Row[Any]) -> tuple[set[str], list[str]]:
    """What the store has of a version, as far as the store and the record still say so, and else what is left."""
    names: set[str] = set()
    try:
        parse_id(row.version_id)
        names |= {name for name, _ in vault.blobs.list(f"versions/{row.version_id}")}
        names |= object_names(vault.manifest(vault.record(check_row(row))))
    # A store that is down, or a release that is too old for it, must not keep the keys alive.
    except (IntegrityError, CannotVerify, Sealed, BackendError) as error:
        return names, [f"{_REST}: {error.message}"]
    return names, []
