"""A trace as it is asked for, allowed, recorded and told (spec/ledger.md, section 4): the custody of `trace.py`."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy.engine import Connection

from strongroom.core.ids import Ref
from strongroom.core.progress import Progress
from strongroom.errors import StrongroomError, UsageError
from strongroom.formats.entry import Private
from strongroom.formats.merkle import leaf_hash
from strongroom.formats.statement import Statement
from strongroom.formats.suspect import FoundFile, FoundFiles, suspect_digest
from strongroom.formats.tlogproof import LogProof
from strongroom.ledger.log import Draft
from strongroom.policy import acts
from strongroom.policy.speaker import Speaker, authenticate, speaking
from strongroom.policy.state import State
from strongroom.vault.names import shown
from strongroom.vault.suspect import Suspect, as_found, digests
from strongroom.vault.text import Text
from strongroom.vault.texttrace import trace_text
from strongroom.vault.trace import FALSE_ACCUSATION, trace
from strongroom.vault.walk import Walk

if TYPE_CHECKING:
    from strongroom.vault.vault import Vault


def search(
    vault: Vault,
    path: Path,
    *,
    by: str,
    weights: str | None,
    progress: Progress,
    text: bool = False,
    seconds: float | None = None,
) -> dict[str, Any]:
    """Whose copy the suspect at `path` is, as the report's JSON with the `entry` of the log that records it. `text`: it
    is text that a model wrote, and `weights` is the version that this may be.

    `weights`, a version, is searched under the lease of `by`. Without it every version is, which names nobody unless
    policy lets `by` trace the one that it turns out to be without a lease; `withheld` says that names were held back.
    `seconds`: how long a suspect may be aligned; then what was found by that time is told, and that it is not all.

    Denied, explained; UsageError ``suspect.*``, ``source.*``, ``text.*``; NotFound ``weights.missing``.
    """
    if text:
        check_text_version(weights)
    ref = _numbered(vault, weights) if weights is not None else None
    vault.custodian.tracing(by, ref)
    with as_found():
        walk = Walk.of(path, follow_links=False, model=False)
        files, name = digests(walk), shown(path.name)
    # Now that what takes long before the search is done: the lease has to hold when that begins.
    lease = vault.custodian.tracing(by, ref)
    statement = vault.voice(by).say("trace", {"suspect": suspect_digest(files), "ref": ref, "lease": lease})
    with Text.of(walk) if text else Suspect.of(walk, name) as suspect:
        return found(vault, Search(statement, by, statement.at, name, files), suspect, progress, seconds)


@dataclass(frozen=True)
class Search:
    """A search that somebody has signed for: `by`, whose `statement` came at `since` (seconds), for what the report
    calls `name`, which are these files."""

    statement: Statement
    by: str | Speaker
    since: int
    name: str
    files: tuple[FoundFile, ...]
    text: bool = False


def begun(vault: Vault, announced: FoundFiles, by: Speaker) -> Search:
    """The search that `by` wants, if it may begin: it is decided now as it will be at the end, when what was found is
    recorded. UsageError ``trace.other``; AuthRequired, Conflict ``statement.*``; Denied, explained; NotFound."""
    statement, now = announced.said(by.path), vault.clock()
    if announced.text:
        check_text_version(statement.body["ref"])
    with vault.custodian.ledger.view() as state:
        acts.trace(vault.custodian.rules, state, statement, now, "", [])
        # Who signed it, with which key: whoever carries it here may have come in by another.
        said = authenticate(state, statement, now)
    return Search(statement, said, now, announced.name, announced.files, announced.text)


def check_text_version(weights: str | None) -> None:
    """UsageError ``trace.text_version`` if text is to be compared with every version: each would have to be run."""
    if weights is None:
        raise UsageError(
            "trace.text_version",
            "text is compared with one version: say with which",
            hint="strongroom trace --text FILE --weights REF",
        )


def found(
    vault: Vault, search: Search, suspect: Suspect | Text, progress: Progress, seconds: float | None = None
) -> dict[str, Any]:
    """The report of one search, once it is in the log; errors as `search`."""
    said, ref = search.statement, search.statement.body["ref"]
    files = [file.as_json() for file in search.files]

    def named(told: str) -> bool:
        return ref is not None or _may_name(vault, search.by, told)

    if isinstance(suspect, Text):
        result = trace_text(vault, suspect, search.name, files, weights=ref, progress=progress)
    else:
        result = trace(vault, suspect, search.name, files, weights=ref, progress=progress, named=named, seconds=seconds)
    # Policy may have changed meanwhile, either way.
    withheld = bool(result.weights) and (result.withheld or not named(result.weights))
    accused = [] if withheld else [each.holder for each in result.accused]
    report = {**_finite(result.as_json()), "withheld": withheld}
    if withheld:
        report |= {"accused": [], "scores": [], "verdict": "weights-only", "threshold_log10_p": 0.0, "ways": 0}
        # Not because somebody was named, if policy took that away meanwhile.
        report["marked"] = result.marked_log10_p <= math.log10(FALSE_ACCUSATION)
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
            since=search.since,
        )
        return Draft(entry, [detail])

    # Before anybody is told: what is found out is on the record.
    receipt = vault.custodian.act(said, "trace", decide)
    _prove(vault, report["accused"])
    recorded = {"entry": receipt.index, "leaf": leaf_hash(receipt.data).hex(), "at": receipt.entry.at}
    return {**report, **recorded, "room": vault.id.hex(), "by": said.by, "request": _request(vault, said.body["lease"])}


def _request(vault: Vault, lease: str | None) -> dict[str, Any] | None:
    """Who asked for the lease of a search, and who agreed."""
    with vault.custodian.ledger.view() as state:
        asked = state.requests.get(lease or "")
        if asked is None:
            return None
        approved_by = list(dict.fromkeys(each.by for each in asked.approvals))
        return {"id": asked.id, "by": asked.by, "approved_by": approved_by}


def _prove(vault: Vault, accused: list[dict[str, Any]]) -> None:
    """Give each release its proof: who may trace need not be one who may read the log, and has nothing of an entry by
    it but that it is there."""
    ledger = vault.custodian.ledger
    checkpoint, note = ledger.checkpoint()
    note = vault.cosigned_note(note)
    for release in (each for one in accused for each in one["releases"]):
        index = release["entry"]
        leaf = leaf_hash(ledger.proven(index, index + 1)[0])
        proof = LogProof(index, tuple(ledger.inclusion(index, checkpoint.size)), note)
        release |= {"leaf": leaf.hex(), "proof": proof.encode().decode()}


def _numbered(vault: Vault, weights: str) -> str:
    parsed = Ref.parse(weights)
    if parsed.number is not None:
        return str(parsed)
    row = vault.row(weights)
    return f"{row.name}@{row.number}"


def _may_name(vault: Vault, by: str | Speaker, ref: str) -> bool:
    with vault.custodian.ledger.view() as state:
        try:
            vault.custodian.rules.may(state, speaking(state, by), "trace", ref, now=vault.clock(), lease=False)
        except StrongroomError:
            return False
    return True


def _finite(value: Any) -> Any:
    """The same in numbers that JSON has."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return 0.0 if math.isnan(value) else math.copysign(1e300, value)
    return value


def _summary(report: dict[str, Any]) -> str:
    """What is kept beside the log's entry: enough to say later on what ground somebody was named."""
    kept = ("verdict", "weights", "accused", "false_accusation_bound", "likeness", "marked_log10_p", "text")
    return json.dumps({name: report[name] for name in (*kept, "transformations")}, sort_keys=True)[:4096]
