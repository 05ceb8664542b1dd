"""A trace as it is asked for, allowed, recorded and told (spec/ledger.md, section 4): the custody of `trace.py`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy.engine import Connection

from strongroom.core import canonical
from strongroom.core.ids import Ref
from strongroom.errors import StrongroomError
from strongroom.formats.entry import Private
from strongroom.ledger.log import Draft
from strongroom.policy import acts
from strongroom.policy.speaker import speaking
from strongroom.policy.state import State
from strongroom.vault.suspect import Suspect
from strongroom.vault.trace import trace

if TYPE_CHECKING:
    from strongroom.vault.vault import Vault

Progress = Callable[[int, int], None]


def search(vault: Vault, path: Path, *, by: str, weights: str | None, progress: Progress) -> dict[str, Any]:
    """Whose copy the suspect at `path` is, as the report's JSON with the `entry` of the log that records it.

    `weights`, a version, is searched under the lease of `by`. Without it every version is, which names nobody unless
    policy lets `by` trace the one that it turns out to be without a lease; `withheld` says that names were held back.

    Denied, explained; UsageError ``suspect.*``, ``source.*``; NotFound ``weights.missing``.
    """
    ref = _numbered(vault, weights) if weights is not None else None
    lease = vault.custodian.tracing(by, ref)
    with Suspect.opened(path) as suspect:
        files = suspect.digests()
        said = vault.voice(by).say("trace", {"suspect": _digest(files), "ref": ref, "lease": lease})
        found = trace(vault, suspect, path.name, files, weights=ref, progress=progress)
    told = found.weights if ref is None else ref
    withheld = bool(found.weights) and ref is None and not _may_name(vault, by, told)
    accused = [] if withheld else [each.holder for each in found.accused]
    report = {**found.as_json(), "withheld": withheld}
    if withheld:
        report |= {"accused": [], "scores": [], "verdict": "weights-only"}
    detail = Private.fresh("detail", _summary(report))

    def decide(_: Connection, state: State, now: int) -> Draft:
        entry = acts.trace(
            vault.custodian.rules,
            state,
            said,
            now,
            report["verdict"],
            accused,
            detail=detail.commitment,
            since=said.at,
        )
        return Draft(entry, [detail])

    # Before anybody is told: what is found out is on the record.
    receipt = vault.custodian.act(said, "trace", decide)
    return {**report, "entry": receipt.index}


def _numbered(vault: Vault, weights: str) -> str:
    parsed = Ref.parse(weights)
    if parsed.number is not None:
        return str(parsed)
    row = vault.row(weights)
    return f"{row.name}@{row.number}"


def _may_name(vault: Vault, by: str, ref: str) -> bool:
    with vault.custodian.ledger.view() as state:
        try:
            vault.custodian.rules.may(state, speaking(state, by), "trace", ref, now=vault.clock(), lease=False)
        except StrongroomError:
            return False
    return True


def _digest(files: list[dict[str, Any]]) -> str:
    """What a suspect is known by: the SHA-256 of its one file, or of the canonical list of paths and digests."""
    if len(files) == 1:
        return str(files[0]["sha256"])
    return hashlib.sha256(canonical.encode([[each["path"], each["sha256"]] for each in files])).hexdigest()


def _summary(report: dict[str, Any]) -> str:
    """What is kept beside the log's entry: enough to say later on what ground somebody was named."""
    kept = ("verdict", "weights", "accused", "false_accusation_bound", "likeness", "marked_log10_p", "transformations")
    return json.dumps({name: report[name] for name in kept}, sort_keys=True)[:4096]
