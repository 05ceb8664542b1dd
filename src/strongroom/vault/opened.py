"""A version that is read while others rotate it, shred it, or rotate the room's key: what its row named a moment ago is
gone then, and nothing is damaged."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import Row, bindparam, select
from sqlalchemy.engine import Connection

from strongroom.errors import IntegrityError, NotFound
from strongroom.storage.db import versions
from strongroom.storage.prepared import Prepared

if TYPE_CHECKING:
    from strongroom.vault.record import VersionRecord
    from strongroom.vault.vault import Vault

T = TypeVar("T")
_TRIES = 5  # changes that one reading may meet
_OF = Prepared(select(versions).where(versions.c.version_id == bindparam("version_id")))


def opened(vault: Vault, ref: str, use: Callable[[Row[Any], VersionRecord], T]) -> T:
    """What `use` makes of a version that can be read, of its row and its secrets. Asked once more where that fails and
    the version has changed since its row was read. NotFound; what `use` and `Vault.record` raise."""
    row = vault.find(ref)
    for _ in range(_TRIES):
        try:
            return use(row, vault.record(row))
        except (IntegrityError, NotFound):
            now = changed(vault, row)
            if now is None:
                raise
            row = vault.readable(now)
    return use(row, vault.record(row))


def settled(vault: Vault, row: Row[Any], look: Callable[[Row[Any]], T], whole: Callable[[T], bool]) -> T:
    """What `look` finds at a version that is checked. Where that isn't `whole`, and the version has changed since its
    row was read, it is looked at anew, as it is now."""
    for _ in range(_TRIES):
        found = look(row)
        now = None if whole(found) else changed(vault, row)
        if now is None:
            return found
        row = now
    return look(row)


def changed(vault: Vault, row: Row[Any]) -> Row[Any] | None:
    """The row of the version of `row`, unchecked, if it is another by now."""
    with vault.db.reading() as tx:
        now = _OF(tx, version_id=row.version_id).one_or_none()
    return now if now is not None and _told(now) != _told(row) else None


def there(tx: Connection, record: VersionRecord) -> bool:
    """Whether the database has the secrets of `record` still. Whether they may be used is in the log, as a rule; but a
    shred does not wait for a log that can't be written, and what is kept opened must not outlive it."""
    row = _OF(tx, version_id=record.version.hex()).one_or_none()
    return row is not None and (row.state, row.revision) == ("active", record.revision)


def check_there(tx: Connection, record: VersionRecord) -> None:
    """NotFound ``version.missing`` unless the secrets of `record` are `there`."""
    if not there(tx, record):
        ref = f"{record.name}@{record.number}"
        raise NotFound("version.missing", f"{ref} was rotated or shredded meanwhile", hint="strongroom ls")


def _told(row: Row[Any]) -> tuple[Any, ...]:
    return row.state, row.revision, row.record
