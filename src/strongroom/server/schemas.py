"""What requests and answers of the custodian consist of, as JSON Schema (spec/http.md): the components of its OpenAPI
document. An answer has exactly the members that are here."""

from __future__ import annotations

from typing import Any

from strongroom.core.canonical import MAX_INTEGER
from strongroom.core.limits import LIMITS
from strongroom.policy.query import FEATURES
from strongroom.policy.review import SEVERITIES
from strongroom.watch.tallies import CLASSES
from strongroom.watch.verdict import HONEST

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer", "minimum": 0, "maximum": MAX_INTEGER}
FLAG: Schema = {"type": "boolean"}
DIGEST: Schema = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
ID: Schema = {"type": "string", "pattern": "^[0-9a-f]{16}$"}
TRACE: Schema = {"type": "string", "pattern": "^[0-9a-f]{32}$"}
BYTES: Schema = {"type": "string", "contentEncoding": "base64"}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _list(schema: Schema) -> Schema:
    return {"type": "array", "items": schema}


def _object(members: dict[str, Schema], *, optional: tuple[str, ...] = ()) -> Schema:
    required = sorted(members.keys() - set(optional))
    return {"type": "object", "properties": members, "required": required, "additionalProperties": False}


def _few(members: dict[str, Schema], most: int) -> Schema:
    return {**_list(_object(members)), "maxItems": most}


def _one(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _all(*names: str) -> dict[str, Schema]:
    return dict.fromkeys(names, TEXT)


def _counts(*names: str) -> dict[str, Schema]:
    return dict.fromkeys(names, COUNT)


_LEASE: dict[str, Schema] = {
    "id": ID,
    "holder": TEXT,
    **_counts("expires_at", "used"),
    "uses": _or_null(COUNT),
    "ended": TEXT,
}
_REQUEST: dict[str, Schema] = {
    "id": ID,
    "digest": DIGEST,
    **_all("action", "state", "ref", "for", "by"),
    "statement": TEXT,
    "reason": _or_null(TEXT),
    "salt": TEXT,
    **_counts("duration", "enact_after", "entry"),
    "uses": _or_null(COUNT),
    "needs": _list(TEXT),
    "approved_by": _list(TEXT),
    "lease": _or_null(_object(_LEASE)),
    "expires_at": _or_null(COUNT),
}
_SOMETIMES = ("enact_after", "entry")
_LISTED = {name: schema for name, schema in _REQUEST.items() if name not in ("statement", "reason", "salt")}
_WHO: dict[str, Schema] = {
    **_all("path", "person", "state", "since"),
    "roles": _list(TEXT),
    "teams": _list(TEXT),
}
_VERSION: dict[str, Schema] = {
    **_all("ref", "state", "digest", "created_at", "created_by"),
    **_counts("revision", "bytes", "stored_bytes", "segments", "positions"),
    "shredded_at": _or_null(TEXT),
}
_HELD: dict[str, Schema] = {"id": ID, **_all("holder", "action", "ref"), **_counts("expires_at", "used")}
_APIKEY: dict[str, Schema] = {"id": ID, "key": DIGEST, **_all("principal", "name"), **_counts("expires_at", "entry")}
_ENDED = _list(_object({"id": ID, **_all("holder", "action", "ref")}))  # leases

_METHOD: Schema = {"enum": ["apikey", "oidc", "x509"]}  # of a gateway's callers
_CALLER: dict[str, Schema] = {**_all("principal", "person", "key"), **dict.fromkeys(("roles", "teams"), _list(TEXT))}
_TAKEN: dict[str, Schema] = {**_all("scope", "window", "who"), "start": COUNT}  # one counter of budgets

# What is sent.
_SAID: dict[str, Schema] = {"statement": {"type": "string", "maxLength": LIMITS.entry}}
_REASON: Schema = _object({"value": {"type": "string", "maxLength": LIMITS.reason}, "salt": BYTES})

COMPONENTS: dict[str, Schema] = {
    "Problem": _object(
        {
            "type": {"const": "about:blank"},
            **_all("title", "detail", "code", "hint"),
            "status": {"type": "integer", "minimum": 400, "maximum": 599},
            "evidence": {"type": "object"},
        }
    ),
    "Reason": _REASON,
    "Said": _object(_SAID | {"reason": _or_null(_one("Reason"))}, optional=("reason",)),
    "SaidWithReason": _object(_SAID | {"reason": _one("Reason")}),
    "Proposed": _object(_SAID | {"reason": _one("Reason"), "text": TEXT}),
    "Proven": _object(_SAID | {"proof": {"type": "object"}}),
    "Ok": _object({"ok": {"const": True}}),
    "Challenge": _object({"nonce": DIGEST, "expires_at": COUNT}),
    "Release": _object(
        {"entry": BYTES, "index": COUNT, "proof": _list(BYTES), "checkpoint": BYTES, "sealed": BYTES, "store": TEXT}
    ),
    "Request": _object(_REQUEST, optional=_SOMETIMES),
    "Requests": _object({"requests": _list(_object(_LISTED, optional=_SOMETIMES))}),
    "Lease": _object(_HELD),
    "Leases": _object({"leases": _list(_one("Lease"))}),
    "Revoked": _object({**_all("target", "ref"), "state": {"const": "revoked"}, "ended": _ENDED, "entry": COUNT}),
    "Principal": _object(
        _WHO
        | {
            "key": TEXT,
            "subject": TEXT,
            "entry": COUNT,
            "leases": _list(_object({"id": ID, **_all("action", "ref"), "expires_at": COUNT})),
            "passkeys": _list(_object({**_all("key", "credential"), "entry": COUNT})),
            "apikeys": _list(_object(_APIKEY)),
        }
    ),
    "Principals": _object({"principals": _list(_object(_WHO))}),
    "PrincipalChanged": _object(
        {
            **_all("principal", "person", "state"),
            **dict.fromkeys(("roles", "teams"), _list(TEXT)),
            "id": ID,
            "ended": _ENDED,
            "entry": COUNT,
        },
        optional=("id",),
    ),
    "Login": _object({"principal": TEXT, **_counts("expires_at", "entry")}),
    "Authorities": _object(
        {
            "authorities": _list(
                _object(
                    {
                        **_all("kind", "name", "audience", "binding", "jwks", "ca", "bundle"),
                        "algorithms": _list(TEXT),
                        "longest": COUNT,
                    }
                )
            )
        }
    ),
    "PasskeyChanged": _object({**_all("principal", "state"), "entry": COUNT}),
    "ApiKeys": _object({"apikeys": _list(_object(_APIKEY))}),
    "ApiKeyChanged": _object(
        {"id": ID, **_all("principal", "name", "state"), **_counts("expires_at", "entry"), "infers": FLAG}
    ),
    "AuthorityChanged": _object({**_all("authority", "state"), "id": ID, "entry": COUNT}, optional=("id",)),
    "Policy": _object(
        {
            "digest": DIGEST,
            **_all("since", "text"),
            "rules": _list(_object({**_all("id", "effect", "reason", "ask"), "line": COUNT})),
            "proposals": _list(_object({"id": ID, "digest": DIGEST, "by": TEXT, "enact_after": COUNT})),
        }
    ),
    "PolicyProposed": _object({"id": ID, **_counts("enact_after", "entry")}),
    "Ceilings": _object(_counts("holders", "copies", "copiers")),
    "Budgets": _object(
        {
            "ref": TEXT,
            **_counts("effective_bits", "parameters", "bits_per_parameter", "compression"),
            **_counts("at", "gone_bits", "bits_a_day", "charged_bits_a_day", "releases", "copies"),
            "budgets": _list(
                _object(
                    {
                        **_all("scope", "window", "who"),
                        **_counts("used", "limit", "left"),
                        "accounted": _or_null(COUNT),
                        "hard": {"type": "boolean"},
                        "resets_at": _or_null(COUNT),
                    }
                )
            ),
            "exfiltration": _object(
                {f"{name}_seconds": _or_null(COUNT) for name in ("current", "charged", "caller", "together", "alarm")}
            ),
            "artefacts": _list(_object({"holder": TEXT, **_counts("releases", "copies", "last")})),
            "logged": _object(_counts("requests", "refused", "tokens", "bits")),
            "too_small": {"type": "boolean"},
            "verified": _or_null(
                _object(
                    {
                        **_counts("tokens", "good", "suspicious", "dangerous", "others", "term", "hidden_bits"),
                        **{name: {"type": "number", "minimum": 0} for name in ("open_bits", "bound", "bits")},
                        **_all("alarm", "arithmetic"),
                    }
                )
            ),
        }
    ),
    "Seen": _object({"version": TEXT, "bundles": _list(TEXT)}),
    "Shown": _object({**_all("token", "chain"), "key": DIGEST, "at": COUNT}, optional=("key", "token", "chain", "at")),
    "Calling": _object({"caller": _or_null(_object({**_CALLER, "method": _METHOD})), "until": COUNT}),
    "Questions": _object(
        {
            "asked": {
                **_list(
                    _object({**_all("principal", "ref"), "method": _METHOD, "action": {"enum": ["infer", *FEATURES]}})
                ),
                "minItems": 1,
                "maxItems": 64,
            }
        }
    ),
    "Decisions": _object({"decisions": _list(_or_null(_one("Problem")))}),
    "Wanted": _object(
        {**_all("principal", "name", "ref"), "method": _METHOD}, optional=("principal", "method", "name", "ref")
    ),
    "Models": _object(
        {"models": _or_null(_list(_object({"ref": TEXT, **_counts("created", "parameters", "vocabulary")})))}
    ),
    "Named": _object({"ref": TEXT}),
    "Spelling": _object({"tokens": _list(_or_null(TEXT)), "control": _list(COUNT), "spaced": FLAG}),
    "Draw": _object(
        {"id": TRACE, "rules": DIGEST, "ref": TEXT, "bits": COUNT, "take": _few(_TAKEN | {"missing": COUNT}, 1024)}
    ),
    "Drawn": _object(
        {"now": COUNT, "moved": FLAG, "full": _or_null(COUNT), "counters": _list(_object(_counts("used", "spare")))}
    ),
    "Settle": _object(
        {
            "id": TRACE,
            "rules": DIGEST,
            **dict.fromkeys(("pay", "back"), _few(_TAKEN | {"ref": TEXT, "bits": COUNT}, 1024)),
        }
    ),
    "Settled": _object({"now": COUNT}),
    "Tally": _object({"id": TRACE, "term": COUNT, "add": _or_null(_one("Runs"))}),
    "Runs": _object(
        {
            "ref": TEXT,
            "arithmetic": {"enum": [*HONEST]},
            **{name: {"type": "integer", "minimum": 0, "maximum": (1 << 40) - 1} for name in CLASSES},
        }
    ),
    "Tallies": _object({"kept": _list(_object({**_all("ref", "arithmetic"), **_counts(*CLASSES)}))}),
    "Acted": _object({**_all("type", "ref"), **_counts("at", "entry"), "body": {"type": "object"}}),
    "Version": _object(_VERSION),
    "Versions": _object({"versions": _list(_one("Version"))}),
    "VersionShown": {
        "type": "object",
        "properties": {
            **_VERSION,
            **_all("version", "suite", "signed_by"),
            **_counts("marked_bytes", "markable_bytes", "common_segment", "marked_segment", "packs"),
            "files": _list(_object({**_all("path", "kind"), "bytes": COUNT, "sha256": DIGEST})),
            "ceiling": _one("Ceilings"),
        },
        "required": sorted([*_VERSION, "version", "suite", "signed_by", "files", "packs"]),
    },
    "UploadTaken": _object(_counts("files", "bytes")),
    "TraceBegun": _object({"id": TRACE}),
    "TraceShown": _object(
        {
            "state": {"enum": ["running", "done", "failed"]},
            **_counts("done", "total"),
            "report": _or_null({"type": "object"}),
            "error": _or_null(_one("Problem")),
        }
    ),
    "Put": _object(
        {
            **_all("ref", "digest"),
            **_counts("bytes", "stored_bytes", "segments", "positions", "resumed_packs", "entry"),
            "files": _list(TEXT),
            "same_as": _list(TEXT),
            "unmarked": {"type": "object", "additionalProperties": COUNT},
        }
    ),
    "Reach": _object(
        {
            "access": _list(
                _object(
                    {**_all("principal", "action", "ref", "state", "answer"), "needs": _list(TEXT), "path": _list(TEXT)}
                )
            )
        }
    ),
    "Review": _object(
        {
            "findings": _list(
                _object({**_all("kind", "about", "message", "removes"), "severity": {"enum": list(SEVERITIES)}})
            ),
            "holdings": _list(
                _object(
                    {
                        **_all("lease", "holder", "action", "ref"),
                        **_counts("expires_at", "used", "last_used"),
                        "approved_by": _list(TEXT),
                    }
                )
            ),
            "activity": _list(
                _object(
                    {"principal": TEXT, **_counts("releases", "copies", "requests", "approvals", "refused", "last")}
                )
            ),
            "emergencies": _list(COUNT),
            "size": COUNT,
        }
    ),
    "Status": _object(
        {
            "room": TEXT,
            "sealed": FLAG,
            "emergencies": _list(COUNT),
            **_counts("principals", "versions", "shredded", "bytes", "stored_bytes", "log_size", "leases"),
        }
    ),
    "Proof": _object({"proof": _list(BYTES)}),
}
