"""Found files sent to a served room, which searches them for its marks (spec/http.md, section 9)."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strongroom.client import answers
from strongroom.client.send import pieces
from strongroom.core.ids import Ref
from strongroom.core.progress import Progress
from strongroom.errors import StrongroomError, Tampered
from strongroom.formats.merkle import verify_inclusion
from strongroom.formats.suspect import FoundFiles, suspect_digest
from strongroom.formats.tlogproof import LogProof
from strongroom.storage.session import error_of
from strongroom.vault.names import shown
from strongroom.vault.search import check_text_version
from strongroom.vault.source import ModelSource
from strongroom.vault.suspect import as_found, digests, searched
from strongroom.vault.walk import Walk

if TYPE_CHECKING:
    from strongroom.client.served import ServedRoom

_SOON, _LATER = 0.1, 2.0  # seconds between questions, at first and at most


def trace(
    room: ServedRoom, path: Path, *, by: str, weights: str | None, progress: Progress, text: bool = False
) -> dict[str, Any]:
    """The report of a search of the file or folder at `path`, as `strongroom.vault.search.search` has it, by the
    custodian; `progress` goes over what is sent, then over what is compared. Each proof in it has been checked, that it
    is of this room's log.

    Errors of `Walk.of`, and those that the custodian tells; Conflict ``source.changed``; Tampered ``trace.other``.
    """
    if text:
        check_text_version(weights)
    ref = _numbered(room, weights)
    lease = _lease(room, by, ref) if ref is not None else None
    with as_found():
        walk = Walk.of(path, follow_links=False, model=False)
        files = digests(walk)
    said = room.voice(by).say("trace", {"suspect": suspect_digest(files), "ref": ref, "lease": lease})
    announced = FoundFiles(shown(path.name or "files")[:255], files, said.envelope, text)
    head = announced.encode()
    # What would be refused is refused before gigabytes are on their way.
    room.ask("/v1/suspects", head, answers.UPLOAD)
    sent = room.send("/v1/traces", head, announced.size, _body(walk, announced, head, progress), answers.BEGUN)
    report = answers.conforming(_outcome(room, sent["id"], progress), answers.REPORT)
    if report["suspect"]["files"] != [file.as_json() for file in files]:
        raise Tampered("trace.other", "the report is about other files than those that were sent")
    if (report["room"], report["by"]) != (room.id.hex(), by):
        raise Tampered("trace.other", "the report is of another room, or another's")
    _check_proofs(room, report)
    return report


def _numbered(room: ServedRoom, weights: str | None) -> str | None:
    if weights is None or Ref.parse(weights).number is not None:
        return weights
    named = room.find(weights)
    return f"{named.name}@{named.number}"


def _lease(room: ServedRoom, by: str, ref: str) -> str | None:
    """The lease under which `by` traces `ref`, of several the one that ends last; the custodian says whether there has
    to be one."""
    found = [
        each
        for each in room.get("/v1/leases", answers.LEASES)["leases"]
        if (each["holder"], each["action"], each["ref"]) == (by, "trace", ref)
    ]
    return str(max(found, key=lambda each: each["expires_at"])["id"]) if found else None


def _body(walk: Walk, announced: FoundFiles, head: bytes, progress: Progress) -> Iterator[memoryview]:
    """What is sent; a piece is good until the next one is asked for."""
    yield memoryview(len(head).to_bytes(4, "big"))
    yield memoryview(head)
    source, done = ModelSource(walk.root, tuple(searched(walk))), 0
    for file in source.files:
        with source.reading(file) as read:
            for piece in pieces(read, 0, file):
                yield piece
                done += len(piece)
                progress(done, announced.size)


def _outcome(room: ServedRoom, identifier: str, progress: Progress) -> Any:
    """The report, once there is one; the error of a search that failed."""
    pause, path = _SOON, f"/v1/traces/{identifier}"
    try:
        while (found := room.get(path, answers.TRACE))["state"] == "running":
            if found["total"]:
                progress(found["done"], found["total"])
            time.sleep(pause)
            pause = min(2 * pause, _LATER)
    except (KeyboardInterrupt, SystemExit):
        # Nobody waits for it any more: it gives its place to another at once, and not after two minutes.
        with contextlib.suppress(StrongroomError):
            room.stop(path, answers.TRACE)
        raise
    if found["state"] == "failed":
        raise error_of(found["error"])
    return found["report"]


def _check_proofs(room: ServedRoom, report: dict[str, Any]) -> None:
    for release in (each for accused in report["accused"] for each in accused["releases"]):
        proof = LogProof.decode(release["proof"].encode())
        if proof.index != release["entry"]:
            raise Tampered("trace.other", f"the proof of entry {release['entry']} is one of another entry")
        checkpoint = room.log_key.open(proof.note)
        verify_inclusion(bytes.fromhex(release["leaf"]), proof.index, checkpoint.size, proof.path, checkpoint.root)
