"""What new settings change, for who runs this: names, and never values. Those may be passwords, whose requests are
captured, or the words that are refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from datetime import UTC, datetime
from typing import Any

from strongroom.crypto.revocation import RevocationLists
from strongroom.gateway.settings import Settings


@dataclass(frozen=True)
class Taken:
    """Settings that are in force now, and what is other than before: keys as docs/reference/gateway-settings.md has
    them, the certificate, lists of revoked ones."""

    settings: Settings
    changed: tuple[str, ...]


def of_settings(before: Settings, after: Settings) -> tuple[str, ...]:
    """The keys that have another value; of a list of tables, and of a role, its name."""
    return tuple(_other(before, after, ""))


def of_lists(before: RevocationLists, after: RevocationLists) -> tuple[str, ...]:
    """How many certificates are revoked by them, if they are others."""
    if before.digest == after.digest:
        return ()
    end = f", until {datetime.fromtimestamp(after.end, UTC):%Y-%m-%d %H:%M} UTC" if after.end is not None else ""
    return (f"revoked certificates: {after.revoked} (before: {before.revoked}){end}",)


def _other(before: Any, after: Any, path: str) -> Iterator[str]:
    if is_dataclass(before):
        for each in fields(before):
            name = f"{path}.{each.name}" if path else each.name
            yield from _other(getattr(before, each.name), getattr(after, each.name), name)
    elif path == "role":
        old, new = dict(before), dict(after)
        for role in sorted(old.keys() | new.keys()):
            if old.get(role) != new.get(role):
                yield f"role.{role}"
    elif before != after:
        yield path
