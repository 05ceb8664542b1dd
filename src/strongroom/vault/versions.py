"""What the database says of a version. A row need not be what its columns were declared to hold: whoever can write to
the database can put anything there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Self

from sqlalchemy import Row

from strongroom.core.ids import Ref, parse_id
from strongroom.errors import Tampered, UsageError
from strongroom.formats.manifest import Manifest
from strongroom.formats.pack import object_bytes
from strongroom.ledger.log import Ledger
from strongroom.policy.state import State

_TEXTS = ("name", "state", "manifest_sha256", "created_at", "created_by")
_NUMBERS = ("number", "revision", "bytes", "stored_bytes", "segments", "positions")


@dataclass(frozen=True)
class VersionInfo:
    """What the room knows of a version without opening it; sizes in bytes. `state`: active, frozen or shredded."""

    name: str
    number: int
    state: str
    revision: int
    digest: str
    bytes: int
    stored_bytes: int
    segments: int
    positions: int
    created_at: str
    created_by: str
    shredded_at: str | None

    @property
    def ref(self) -> str:
        return f"{self.name}@{self.number}"

    def as_json(self) -> dict[str, Any]:
        return {"ref": self.ref, **{key: value for key, value in vars(self).items() if key not in ("name", "number")}}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """The reverse of `as_json`; Tampered ``record.malformed``."""
        try:
            ref = Ref.parse(value["ref"])
            return cls(name=ref.name, number=ref.number or 0, **{key: value[key] for key in value if key != "ref"})
        except (KeyError, TypeError, AttributeError, UsageError):
            raise Tampered("record.malformed", "what a server says of a version is not what one says") from None

    @classmethod
    def of(cls, row: Row[Any]) -> Self:
        """From a row of the table of versions; Tampered ``record.malformed`` if it can't be one that we wrote."""
        check_row(row)
        return cls(
            name=row.name,
            number=row.number,
            state=row.state,
            revision=row.revision,
            digest=f"sha256:{row.manifest_sha256}",
            bytes=row.bytes,
            stored_bytes=row.stored_bytes,
            segments=row.segments,
            positions=row.positions,
            created_at=row.created_at,
            created_by=row.created_by,
            shredded_at=row.shredded_at,
        )


def as_logged(found: Iterable[VersionInfo], ledger: Ledger[State]) -> list[VersionInfo]:
    """`found`, as frozen what the log says is: the database has no say in that."""
    with ledger.view() as state:
        frozen = {each.ref for each in state.versions.values() if each.frozen}
    return [replace(each, state="frozen") if each.ref in frozen and each.state == "active" else each for each in found]


def check_row(row: Row[Any]) -> Row[Any]:
    """The row, if it holds what its columns were declared to; Tampered ``record.malformed`` otherwise."""
    values = row._mapping
    sound = (
        all(isinstance(values[column], str) for column in _TEXTS)
        and all(type(values[column]) is int and values[column] >= 0 for column in _NUMBERS)
        and values["state"] in ("active", "shredded")
        and isinstance(values["record"], bytes if values["state"] == "active" else type(None))
        and isinstance(values["shredded_at"], str | None)
        and _is_named(values)
    )
    if not sound:
        raise Tampered(
            "record.malformed",
            f"the database's row of {values['name']!r:.80}@{values['number']!r:.20} does not hold together",
            hint="restore the room's database from a backup",
        )
    return row


def _is_named(values: Any) -> bool:
    with contextlib.suppress(UsageError, Tampered):
        parse_id(values["version_id"])
        Ref.parse(f"{values['name']}@{values['number']}")
        return True
    return False


def measured(manifest: Manifest) -> dict[str, Any]:
    """The columns of a version that follow from its manifest."""
    bodies = sum(object_bytes(manifest, pack) for pack in manifest.packs)
    return {
        "revision": manifest.revision,
        "manifest_sha256": manifest.digest().hex(),
        "stored_bytes": bodies + manifest.index_bytes,
        "segments": manifest.common_count + 2 * manifest.positions,
        "positions": manifest.positions,
    }


def object_names(manifest: Manifest) -> set[str]:
    """What a revision has in the store."""
    return {manifest.name, manifest.index_name, *(pack.name for pack in manifest.packs)}
