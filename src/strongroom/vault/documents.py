"""Texts that the log names by their SHA-256: policies. Kept in the database, believed by their digest."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Iterator

from sqlalchemy import bindparam, insert, select
from sqlalchemy.engine import Connection

from strongroom.errors import NotFound, Tampered
from strongroom.policy.engine import Policies
from strongroom.storage.db import Database, documents
from strongroom.storage.prepared import Prepared

_DATA = Prepared(select(documents.c.data).where(documents.c.digest == bindparam("digest")))


class Documents:
    """The documents of one room. Thread-safe."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._parsed: dict[str, Policies] = {}
        self._reading = threading.local()

    def policies(self, digest: str) -> Policies:
        """The policies whose text has this digest, parsed once. NotFound ``document.missing``, Tampered
        ``document.tampered``."""
        if digest not in self._parsed:
            self._parsed[digest] = Policies.parse(self._text(digest))
        return self._parsed[digest]

    def keep(self, tx: Connection, policies: Policies) -> str:
        """Store the text of `policies` in `tx`; its digest."""
        found = select(documents.c.digest).where(documents.c.digest == policies.digest)
        if tx.execute(found).first() is None:
            tx.execute(insert(documents).values(digest=policies.digest, data=policies.text.encode()))
        self._parsed[policies.digest] = policies
        return policies.digest

    @contextlib.contextmanager
    def within(self, tx: Connection) -> Iterator[None]:
        """Read through `tx` in this thread for the length of the block: a transaction does not nest in another."""
        self._reading.tx = tx
        try:
            yield
        finally:
            self._reading.tx = None

    def _text(self, digest: str) -> str:
        tx: Connection | None = getattr(self._reading, "tx", None)
        if tx is not None:
            data = _DATA(tx, digest=digest).scalar()
        else:
            with self._db.reading() as reading:
                data = _DATA(reading, digest=digest).scalar()
        if data is None:
            raise NotFound("document.missing", f"the text {digest[:16]}… is not in the database", hint=_RESTORE)
        if not isinstance(data, bytes) or hashlib.sha256(data).hexdigest() != digest:
            raise Tampered("document.tampered", f"the text {digest[:16]}… in the database was altered", hint=_RESTORE)
        return data.decode()


_RESTORE = "restore the database from a backup"
