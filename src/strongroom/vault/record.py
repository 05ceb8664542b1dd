"""The version record: the secrets of one version, sealed under the room key, with what the custodian must not be lied
to about."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from typing import Any

from strongroom.core import canonical
from strongroom.crypto.keys import derive, random_key
from strongroom.crypto.sealing import seal, unseal
from strongroom.errors import Tampered
from strongroom.marking.code import COLLUDERS


@dataclass(frozen=True)
class VersionRecord:
    """Kept sealed in the database. `name`, `number`, `revision` and `manifest_digest` are in it so that whoever can
    write to the database, but has no key, can't point a name at other weights or at an older revision."""

    version: bytes
    revision: int
    version_key: bytes = field(repr=False)
    mark_root: bytes = field(repr=False)
    colluders: int = COLLUDERS
    name: str = ""
    number: int = 0
    manifest_digest: bytes = b""

    @classmethod
    def fresh(cls, version: bytes) -> VersionRecord:
        """New secrets for a version that is being put."""
        return cls(version, 1, random_key(), random_key())

    @property
    def journal_key(self) -> bytes:
        """Authenticates what the journal says of this job's packs and source."""
        return derive(self.version_key, "journal")

    @property
    def mark_key(self) -> bytes:
        return derive(self.mark_root, "mark")

    @property
    def code_key(self) -> bytes:
        return derive(self.mark_root, "code")

    @property
    def stamp_key(self) -> bytes:
        """What the stamps of this version's copies derive from (spec/mark.md, section 2)."""
        return derive(self.mark_root, "stamp")

    def seal(self, room_key: bytes, context: str = "") -> bytes:
        """For the database; `context` is set where it is the record of a job that is under way."""
        value: dict[str, Any] = {
            "version": self.version.hex(),
            "revision": self.revision,
            "version_key": base64.b64encode(self.version_key).decode(),
            "mark_root": base64.b64encode(self.mark_root).decode(),
            "colluders": self.colluders,
            "name": self.name,
            "number": self.number,
            "manifest_digest": self.manifest_digest.hex(),
        }
        return seal(room_key, canonical.encode(value), context or _context(self.version))

    @classmethod
    def unseal(cls, room_key: bytes, box: bytes, version: bytes, context: str = "") -> VersionRecord:
        value = canonical.decode(unseal(room_key, box, context or _context(version)), what="the version record")
        try:
            return cls(
                version=bytes.fromhex(value["version"]),
                revision=value["revision"],
                version_key=base64.b64decode(value["version_key"]),
                mark_root=base64.b64decode(value["mark_root"]),
                colluders=value["colluders"],
                name=value["name"],
                number=value["number"],
                manifest_digest=bytes.fromhex(value["manifest_digest"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise Tampered("record.malformed", f"the version record does not hold together: {error}") from None


def _context(version: bytes) -> str:
    return f"version record {version.hex()}"


def job_context(put_id: str, fingerprint: str) -> str:
    """The purpose that the record of a job under way is sealed for."""
    return f"job {put_id} {fingerprint}"
