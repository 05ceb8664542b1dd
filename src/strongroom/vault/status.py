"""Status and doctor: whether the room is usable, and set up the way it should be."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import func, select

from strongroom.errors import StrongroomError
from strongroom.storage.db import puts, room

if TYPE_CHECKING:
    from strongroom.vault.vault import Vault


@dataclass(frozen=True)
class Check:
    """One line of the doctor: `level` is ok, warn or fail; `hint` is the next command."""

    name: str
    level: str
    message: str
    hint: str = ""

    def as_json(self) -> dict[str, str]:
        return dict(vars(self))


def status(vault: Vault) -> dict[str, Any]:
    """Where the room is, whether it can be unsealed, and what it holds. Never fails because the key store is down."""
    versions = vault.ls()
    active = [info for info in versions if info.state != "shredded"]
    with vault.db.reading() as tx:
        row = tx.execute(select(room)).one()
        pending = tx.execute(select(func.count()).select_from(puts)).scalar()
    sealed = _why_sealed(vault)
    with vault.custodian.ledger.view() as state:
        emergencies = sorted(map(int, state.emergencies))
    return {
        "room": vault.id.hex(),
        "folder": str(vault.folder),
        "store": vault.blobs.url,
        "keystore": row.keystore_uri,
        "sealed": sealed is not None,
        "sealed_because": sealed,
        "key_epoch": row.key_epoch,
        "recovery": f"{row.recovery_threshold} of {row.recovery_shares}" if row.recovery_threshold else None,
        "recovery_proven_at": row.recovery_proven_at,
        "principals": len(vault.principal_ls()),
        "versions": len(active),
        "shredded": len(versions) - len(active),
        "bytes": sum(info.bytes for info in active),
        "stored_bytes": sum(info.stored_bytes for info in active),
        "interrupted_puts": pending,
        "emergencies": emergencies,
    }


def _why_sealed(vault: Vault) -> str | None:
    try:
        vault.keys.room_key  # noqa: B018 - asking is the check
    except StrongroomError as error:
        return error.message
    return None


def doctor(vault: Vault) -> list[Check]:
    """Everything about this machine and room that decides how safe and how fast it is."""
    return [
        *_keystore(vault),
        *_recovery(vault),
        *_database(vault),
        *_log(vault),
        *_store(vault),
        *_folder(vault),
        *_machine(),
    ]


def _keystore(vault: Vault) -> list[Check]:
    sealed = _why_sealed(vault)
    facts = ", ".join(f"{key}: {value}" for key, value in vault.keys.keystore.check().items())
    if sealed:
        return [
            Check("key store", "fail", f"{sealed} ({facts})", "make the key store available, then strongroom status")
        ]
    found = [Check("key store", "ok", facts)]
    if vault.keys.keystore.uri.startswith("file:"):
        message = (
            "the key lies in a file on this machine: whoever can read the room's folder and the key can read the "
            "weights"
        )
        found.append(
            Check(
                "key store kind",
                "warn",
                message,
                "strongroom keystore rotate --to openbao:https://HOST:8200/transit/KEY",
            )
        )
    return found


def _recovery(vault: Vault) -> list[Check]:
    with vault.db.reading() as tx:
        row = tx.execute(select(room)).one()
    if not row.recovery_threshold:
        return [
            Check(
                "recovery",
                "warn",
                "no recovery shares: a lost key store is a lost room; recovery shares are made by init only",
            )
        ]
    scheme = f"{row.recovery_threshold} of {row.recovery_shares} shares"
    if not row.recovery_proven_at:
        return [Check("recovery", "warn", f"{scheme}, never proven", "strongroom recovery drill")]
    return [Check("recovery", "ok", f"{scheme}, last proven {row.recovery_proven_at}")]


def _database(vault: Vault) -> list[Check]:
    try:
        faults = vault.db.check()
    except StrongroomError as error:
        return [Check("database", "fail", error.message, error.hint)]
    if faults:
        return [
            Check("database", "fail", "; ".join(faults), "restore the database from a backup, then strongroom fsck")
        ]
    return [Check("database", "ok", "no faults found")]


def _log(vault: Vault) -> list[Check]:
    try:
        checkpoint, _ = vault.custodian.ledger.checkpoint()
        with vault.custodian.ledger.view() as state:
            emergencies, granters, custody = dict(state.emergencies), state.granters(), state.custody
    except StrongroomError as error:
        return [Check("log", "fail", error.message, error.hint or "strongroom log verify")]
    found = [Check("log", "ok", f"{checkpoint.size} entries, under the signed root")]
    if custody != "solo" and len(granters) < 2:
        message = f"{', '.join(sorted(granters)) or 'nobody'} alone may let anybody in: a room needs two such people"
        found.append(Check("people", "warn", message, "strongroom principal add user/NAME --role officer"))
    if emergencies:
        entries = ", ".join(f"{index} by {person}" for index, person in emergencies.items())
        message = f"the glass was broken, or recovery shares used, and nobody else has reviewed it: entry {entries}"
        hint = f"somebody else: strongroom log show {min(map(int, emergencies))}; then strongroom review --apply"
        found.append(Check("emergencies", "fail", message, hint))
    return found


def _store(vault: Vault) -> list[Check]:
    try:
        facts = vault.blobs.check()
    except StrongroomError as error:
        return [Check("store", "fail", error.message, error.hint)]
    problems = list(facts["problems"])
    known = ", ".join(f"{key}: {value}" for key, value in facts.items() if key != "problems")
    message = "; ".join([*problems, known])
    if not facts["writable"]:
        return [Check("store", "fail", message, "mend the store or its credentials, then strongroom doctor")]
    if problems or not facts["durable"]:
        return [Check("store", "warn", message)]
    return [Check("store", "ok", message)]


def _folder(vault: Vault) -> list[Check]:
    mode = vault.folder.stat().st_mode & 0o777
    if mode & 0o077:
        return [
            Check(
                "folder",
                "warn",
                f"{vault.folder} has mode {mode:o}: others on this machine can look into it",
                f"chmod 700 {vault.folder}",
            )
        ]
    return [Check("folder", "ok", f"mode {mode:o}")]


def _machine() -> list[Check]:
    """What Linux says of this machine; an unreadable fact reads as not there."""
    cpu = _read("/proc/cpuinfo")
    fast = " aes" in cpu
    pages = _read("/sys/kernel/mm/transparent_hugepage/enabled").strip() or "not available"
    never = "[never]" in pages
    swap = _read("/proc/swaps").count("\n") > 1
    core = resource.getrlimit(resource.RLIMIT_CORE)[0] != 0
    return [
        Check("AES instructions", "ok", "present") if fast else Check("AES instructions", "warn", "missing: slow"),
        Check("huge pages", "warn", pages, "set transparent_hugepage/enabled to madvise")
        if never
        else Check("huge pages", "ok", pages),
        Check("swap", "warn", "on: plaintext in memory can reach the disk", "swapoff -a, or encrypt swap")
        if swap
        else Check("swap", "ok", "off"),
        Check("core dumps", "warn", "on: a crash can write keys and weights to the disk", "ulimit -c 0")
        if core
        else Check("core dumps", "ok", "off"),
        Check("python", "ok", sys.version.split()[0]),
    ]


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
