"""What a served room may answer (spec/http.md): the members that a client relies on, and what they have to be. The
server is not trusted to keep to it."""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
from collections.abc import Mapping
from typing import Any

from strongroom.errors import BackendError
from strongroom.formats.card import Card
from strongroom.formats.entry import COUNT, DIGEST, FLAG, ID, TEXT, Kind, one_of, or_null
from strongroom.policy.review import SEVERITIES
from strongroom.storage.blobs import OBJECT_STORES
from strongroom.watch.tallies import CLASSES

_PASS = re.compile(r"/v1/objects/[A-Za-z0-9_-]{32}", re.ASCII)


def _list(kind: Kind) -> Kind:
    return lambda value: isinstance(value, list) and all(map(kind, value))


def _object(members: Mapping[str, Kind]) -> Kind:
    return lambda value: (
        isinstance(value, dict) and all(name in value and kind(value[name]) for name, kind in members.items())
    )


def _number(value: Any) -> bool:
    return type(value) is int or (type(value) is float and math.isfinite(value))


_TEXTS = _list(TEXT)
_WHAT: dict[str, Kind] = {"id": TEXT, "digest": TEXT, "state": TEXT, "action": TEXT, "needs": _TEXTS}
_LISTED = _WHAT | {
    "ref": TEXT,
    "for": TEXT,
    "by": TEXT,
    "duration": COUNT,
    "uses": or_null(COUNT),
    "approved_by": _TEXTS,
    "expires_at": or_null(COUNT),
}
_WHO: dict[str, Kind] = {"path": TEXT, "person": TEXT, "roles": _TEXTS, "teams": _TEXTS, "state": TEXT, "since": TEXT}
_LEASE: dict[str, Kind] = {"id": TEXT, "action": TEXT, "ref": TEXT, "expires_at": COUNT}
_ACCESS: dict[str, Kind] = {
    "principal": TEXT,
    "action": TEXT,
    "ref": TEXT,
    "state": TEXT,
    "answer": TEXT,
    "needs": _TEXTS,
    "path": _TEXTS,
}
_RULE: dict[str, Kind] = {"id": TEXT, "effect": TEXT, "reason": TEXT, "line": COUNT}
_PROPOSAL: dict[str, Kind] = {"id": TEXT, "digest": TEXT, "by": TEXT, "enact_after": COUNT}
_VERSION: dict[str, Kind] = {
    **dict.fromkeys(("ref", "state", "digest", "created_at", "created_by"), TEXT),
    **dict.fromkeys(("revision", "bytes", "stored_bytes", "segments", "positions"), COUNT),
    "shredded_at": or_null(TEXT),
}

UPLOAD: dict[str, Kind] = {"files": COUNT, "bytes": COUNT}
PUT: dict[str, Kind] = {
    **dict.fromkeys(("ref", "digest"), TEXT),
    **dict.fromkeys(("bytes", "stored_bytes", "segments", "positions", "resumed_packs", "entry"), COUNT),
    "files": _TEXTS,
    "same_as": _TEXTS,
    "unmarked": lambda value: isinstance(value, dict) and all(map(TEXT, value)) and all(map(COUNT, value.values())),
}
LEASES: dict[str, Kind] = {"leases": _list(_object(_LEASE | {"holder": TEXT, "used": COUNT}))}
BEGUN: dict[str, Kind] = {"id": ID}
TRACE: dict[str, Kind] = {
    "state": one_of("running", "done", "failed"),
    "done": COUNT,
    "total": COUNT,
    "report": or_null(lambda value: isinstance(value, dict)),
    "error": or_null(lambda value: isinstance(value, dict)),
}
SHOWN = _VERSION | {
    **dict.fromkeys(("version", "suite", "signed_by"), TEXT),
    "files": _list(_object({"path": TEXT, "kind": TEXT, "bytes": COUNT, "sha256": TEXT})),
    "packs": COUNT,
}
REVIEW: dict[str, Kind] = {
    "findings": _list(
        _object({**dict.fromkeys(("kind", "about", "message", "removes"), TEXT), "severity": one_of(*SEVERITIES)})
    ),
    "holdings": _list(
        _object(
            {
                **dict.fromkeys(("lease", "holder", "action", "ref"), TEXT),
                **dict.fromkeys(("expires_at", "used", "last_used"), COUNT),
                "approved_by": _TEXTS,
            }
        )
    ),
    "activity": _list(
        _object(
            {
                "principal": TEXT,
                **dict.fromkeys(("releases", "copies", "requests", "approvals", "refused", "last"), COUNT),
            }
        )
    ),
    "emergencies": _list(COUNT),
    "size": COUNT,
}
STATUS: dict[str, Kind] = {
    "room": TEXT,
    "sealed": FLAG,
    "emergencies": _list(COUNT),
    **dict.fromkeys(("principals", "versions", "shredded", "bytes", "stored_bytes", "log_size", "leases"), COUNT),
}
CHALLENGE: dict[str, Kind] = {"nonce": DIGEST}
RELEASE: dict[str, Kind] = {
    "entry": TEXT,
    "index": COUNT,
    "proof": _TEXTS,
    "checkpoint": TEXT,
    "sealed": TEXT,
    "store": TEXT,
}
PROOF: dict[str, Kind] = {"proof": _TEXTS}
# A request, proposal or grant, after what was done to it, and by itself.
REQUEST = _LISTED | {
    "expires_at": or_null(COUNT),
    "statement": TEXT,
    "reason": or_null(TEXT),
    "salt": TEXT,
    "lease": or_null(
        _object({"id": TEXT, "holder": TEXT, "expires_at": COUNT, "uses": or_null(COUNT), "used": COUNT, "ended": TEXT})
    ),
}
REQUESTS: dict[str, Kind] = {"requests": _list(_object(_LISTED))}
_ENDED: dict[str, Kind] = {"ended": _list(_object(dict.fromkeys(("id", "holder", "action", "ref"), TEXT)))}
REVOKED: dict[str, Kind] = {"target": TEXT, "ref": TEXT, "state": TEXT, **_ENDED, "entry": COUNT}
CHANGED: dict[str, Kind] = {
    **dict.fromkeys(("principal", "person", "state"), TEXT),
    **dict.fromkeys(("roles", "teams"), _TEXTS),
    **_ENDED,
}
_PASSKEY: dict[str, Kind] = {"key": TEXT, "credential": TEXT}
_APIKEY: dict[str, Kind] = {
    **dict.fromkeys(("id", "principal", "name"), TEXT),
    **dict.fromkeys(("expires_at", "entry"), COUNT),
}
PRINCIPAL = _WHO | {
    "key": TEXT,
    "subject": TEXT,
    "entry": COUNT,
    "leases": _list(_object(_LEASE)),
    "passkeys": _list(_object(_PASSKEY)),
    "apikeys": _list(_object(_APIKEY)),
}
PRINCIPALS: dict[str, Kind] = {"principals": _list(_object(_WHO))}
LOGIN: dict[str, Kind] = {"principal": TEXT, "expires_at": COUNT, "entry": COUNT}
_AUTHORITY: dict[str, Kind] = dict.fromkeys(("kind", "name", "audience", "binding"), TEXT) | {"algorithms": _TEXTS}
AUTHORITIES: dict[str, Kind] = {"authorities": _list(_object(_AUTHORITY))}
CHANGED_PASSKEY: dict[str, Kind] = {"principal": TEXT, "state": TEXT, "entry": COUNT}
APIKEYS: dict[str, Kind] = {"apikeys": _list(_object(_APIKEY | {"key": DIGEST}))}
CHANGED_APIKEY = _APIKEY | {"state": TEXT, "infers": lambda value: isinstance(value, bool)}
CHANGED_AUTHORITY: dict[str, Kind] = {"authority": TEXT, "state": TEXT, "entry": COUNT}
ACCESS: dict[str, Kind] = {"access": _list(_object(_ACCESS))}
VERSIONS: dict[str, Kind] = {"versions": _list(_object(_VERSION))}
POLICY: dict[str, Kind] = {
    "digest": TEXT,
    "since": TEXT,
    "text": TEXT,
    "rules": _list(_object(_RULE)),
    "proposals": _list(_object(_PROPOSAL)),
}
PROPOSED: dict[str, Kind] = {"id": TEXT, "enact_after": COUNT, "entry": COUNT}
CEILINGS: dict[str, Kind] = dict.fromkeys(("holders", "copies", "copiers"), COUNT)
BUDGETS: dict[str, Kind] = {
    "ref": TEXT,
    **dict.fromkeys(("effective_bits", "parameters", "bits_per_parameter", "compression"), COUNT),
    **dict.fromkeys(("at", "gone_bits", "bits_a_day", "charged_bits_a_day", "releases", "copies"), COUNT),
    "budgets": _list(
        _object(
            {
                **dict.fromkeys(("scope", "window", "who"), TEXT),
                **dict.fromkeys(("used", "limit", "left"), COUNT),
                "accounted": or_null(COUNT),
                "hard": lambda value: isinstance(value, bool),
                "resets_at": or_null(COUNT),
            }
        )
    ),
    "exfiltration": _object(
        {f"{name}_seconds": or_null(COUNT) for name in ("current", "charged", "caller", "together", "alarm")}
    ),
    "artefacts": _list(_object({"holder": TEXT, **dict.fromkeys(("releases", "copies", "last"), COUNT)})),
    "logged": _object(dict.fromkeys(("requests", "refused", "tokens", "bits"), COUNT)),
    "too_small": lambda value: isinstance(value, bool),
    "verified": or_null(
        _object(
            {
                **dict.fromkeys(("tokens", "good", "suspicious", "dangerous", "others", "term", "hidden_bits"), COUNT),
                **dict.fromkeys(("open_bits", "bound", "bits"), _number),
                **dict.fromkeys(("alarm", "arithmetic"), TEXT),
            }
        )
    ),
}
# What a gateway elsewhere relies on.
SEEN: dict[str, Kind] = {"version": TEXT, "bundles": _TEXTS}
CALLING: dict[str, Kind] = {
    "caller": or_null(
        _object({**dict.fromkeys(("principal", "person", "key", "method"), TEXT), "roles": _TEXTS, "teams": _TEXTS})
    ),
    "until": COUNT,
}
DECISIONS: dict[str, Kind] = {"decisions": _list(or_null(lambda value: isinstance(value, dict)))}
MODELS: dict[str, Kind] = {
    "models": or_null(_list(_object({"ref": TEXT, **dict.fromkeys(("created", "parameters", "vocabulary"), COUNT)})))
}
SPELLING: dict[str, Kind] = {
    "tokens": _list(or_null(TEXT)),
    "control": _list(COUNT),
    "spaced": lambda value: isinstance(value, bool),
}
DRAWN: dict[str, Kind] = {
    "now": COUNT,
    "moved": lambda value: isinstance(value, bool),
    "full": or_null(COUNT),
    "counters": _list(_object({"used": COUNT, "spare": COUNT})),
}
TALLIES: dict[str, Kind] = {
    "kept": _list(_object({"ref": TEXT, "arithmetic": TEXT, **dict.fromkeys(CLASSES, COUNT)})),
}
SETTLED: dict[str, Kind] = {"now": COUNT}
ACTED: dict[str, Kind] = {
    **dict.fromkeys(("type", "ref"), TEXT),
    **dict.fromkeys(("at", "entry"), COUNT),
    "body": lambda value: isinstance(value, dict),
}
# What a client looks for in the body, by the kind of statement.
DONE: dict[str, dict[str, Kind]] = {"clock": {"before": COUNT}, "enact": {"digest": DIGEST}}


_RELEASE: dict[str, Kind] = {
    **dict.fromkeys(("action", "proof"), TEXT),
    **dict.fromkeys(("entry", "at"), COUNT),
    "lease": or_null(TEXT),
    "leaf": DIGEST,
    "person": TEXT,
}
_ACCUSED: dict[str, Kind] = {
    **dict.fromkeys(("holder", "person"), TEXT),
    **dict.fromkeys(("score_sigma", "log10_p", "false_accusation"), _number),
    "layer1": _object({"sigma": _number, "log10_p": _number, "decoder": TEXT}),
    "layer2": _object({"z": _number, "log10_p": _number}),
    "releases": _list(_object(_RELEASE)),
}
_TEXT: dict[str, Kind] = {
    **dict.fromkeys(("pieces", "left_out", "tokens"), COUNT),
    **dict.fromkeys(("temperature", "log_likelihood"), _number),
}
REPORT: dict[str, Kind] = {
    "verdict": one_of("named", "weights-only", "unrelated", "not-named"),
    "weights": TEXT,
    "accused": _list(_object(_ACCUSED)),
    **dict.fromkeys(("carries_marks", "marked", "withheld"), FLAG),
    **dict.fromkeys(("false_accusation_bound", "marked_log10_p", "likeness", "threshold_log10_p"), _number),
    **dict.fromkeys(("positions", "positions_used", "elements", "candidates", "ways", "entry", "at"), COUNT),
    **dict.fromkeys(("by", "room"), TEXT),
    "leaf": DIGEST,
    "request": or_null(_object({"id": TEXT, "by": TEXT, "approved_by": _TEXTS})),
    "transformations": _TEXTS,
    "versions": _list(_object({"ref": TEXT, "likeness": _number, "part": _number, "fits": FLAG, "marked": FLAG})),
    "scores": _list(_object({"holder": TEXT, "log10_p": _number, "stamp_log10_p": _number})),
    "tensors": _list(
        _object({"name": TEXT, "elements": COUNT, "partner": TEXT, "cosine": _number, "transformations": _TEXTS})
    ),
    "suspect": _object(
        {
            "name": TEXT,
            **dict.fromkeys(("tensors", "bytes"), COUNT),
            "files": _list(_object({"path": TEXT, "bytes": COUNT, "sha256": DIGEST})),
        }
    ),
    "text": or_null(_object(_TEXT)),
}


def conforming(value: Any, members: Mapping[str, Kind]) -> dict[str, Any]:
    """`value`, if it is an object of at least these members; BackendError ``server.answer``."""
    if not _object(members)(value):
        raise malformed(f"no object of {', '.join(sorted(members))}")
    found: dict[str, Any] = value
    return found


def acted(kind: str) -> dict[str, Kind]:
    """The members of an answer to a statement of this kind."""
    return ACTED | {"body": _object(DONE.get(kind, {}))}


def parse(data: bytes, members: Mapping[str, Kind]) -> dict[str, Any]:
    """The JSON object in an answer, with at least these members; BackendError ``server.answer``."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        value = None
    return conforming(value, members)


def decode(text: str) -> bytes:
    """The bytes of a member in base64; BackendError ``server.answer``."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise malformed("not base64 where it should be") from None


def store(url: str, card: Card) -> str:
    """`url` if ciphertext of the room on `card` may be read there: by way of its server, or in an object store. A
    server has no say over this machine's files and no other host's. BackendError ``server.answer``."""
    through = url.startswith(f"{card.url}/") and _PASS.fullmatch(url[len(card.url) :])
    if not through and not url.startswith(tuple(f"{scheme}://" for scheme in OBJECT_STORES)):
        raise malformed(f"a store that is neither an object store nor here: {url[:80]!r}")
    return url


def malformed(why: str) -> BackendError:
    """What is raised for an answer that is not one."""
    return BackendError("server.answer", f"the server's answer is malformed: {why}")
