"""Versions of the very same files: of the puts in the log, which were of these."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.engine import Connection

from strongroom.formats.entry import Entry
from strongroom.formats.index import Index
from strongroom.policy.state import State
from strongroom.storage.db import log_entries, log_private


def digests(index: Index) -> list[tuple[str, str]]:
    """Path and SHA-256 in hexadecimal of each file of a version: what its put commits to."""
    return list(zip((entry.path for entry in index.layout.files), index.sha256, strict=True))


def there(state: State) -> set[str]:
    """The references of the versions that are not shredded."""
    return {each.ref for each in state.versions.values() if not each.shredded}


def put_before(tx: Connection, there: set[str], files: str, before: int | None = None) -> list[str]:
    """Those of the versions that are `there` whose put, `before` that entry, was of the same `files` (their
    `files_digest`), as far as the database says so: for a warning, and no more."""
    noted = select(log_private.c.position).where(log_private.c.name == "files", log_private.c.value == files)
    if before is not None:
        noted = noted.where(log_private.c.position < before)
    query = select(log_entries.c.entry).where(log_entries.c.position.in_(noted)).order_by(log_entries.c.position)
    found = tx.execute(query).scalars()
    refs = [Entry.decode(data).ref for data in found if isinstance(data, bytes)]
    return [ref for ref in refs if ref in there]
