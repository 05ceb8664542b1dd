"""Every route of the custodian, in one table: what is not here is not served, and what is here is in the OpenAPI
document (spec/http.md, section 2)."""

from __future__ import annotations

from dataclasses import dataclass

# How a request says who speaks: not at all, by the header Authorization, in its body, by the pass in its path.
NOBODY, CALL, STATEMENT, PASS = "nobody", "call", "statement", "pass"
JSON, BYTES, NOTE, EXPOSITION = "application/json", "application/octet-stream", "text/plain", "text/plain"


@dataclass(frozen=True)
class Operation:
    """A route. `takes` and `answers`: names of schemas, or media types where it is no JSON; `query`: the names of
    parameters that may be given; `status`: of an answer that is none of an error."""

    name: str
    method: str
    path: str
    summary: str
    speaks: str
    answers: str
    takes: str = ""
    query: tuple[str, ...] = ()
    status: int = 200


OPERATIONS = (
    Operation("challenge", "POST", "/v1/challenges", "A fresh challenge, for one release", NOBODY, "Challenge"),
    Operation("release", "POST", "/v1/releases", "The keys of a version, for its holder", STATEMENT, "Release", "Said"),
    Operation("requests", "GET", "/v1/requests", "What was asked for", CALL, "Requests"),
    Operation("request", "POST", "/v1/requests", "Ask for a lease", STATEMENT, "Request", "SaidWithReason"),
    Operation("show_request", "GET", "/v1/requests/{id}", "One request, grant or proposal", CALL, "Request"),
    Operation("approve", "POST", "/v1/requests/{id}/approve", "One person's yes", STATEMENT, "Request", "Said"),
    Operation("deny", "POST", "/v1/requests/{id}/deny", "A no", STATEMENT, "Request", "SaidWithReason"),
    Operation("leases", "GET", "/v1/leases", "The leases that hold now", CALL, "Leases"),
    Operation("renew", "POST", "/v1/leases/{id}/renew", "Extend a lease to load", STATEMENT, "Request", "Said"),
    Operation(
        "revoke",
        "POST",
        "/v1/revocations",
        "End a lease, suspend a principal, freeze a version",
        STATEMENT,
        "Revoked",
        "SaidWithReason",
    ),
    Operation("principals", "GET", "/v1/principals", "Everybody", CALL, "Principals"),
    Operation(
        "principal", "POST", "/v1/principals", "Register or change a principal", STATEMENT, "PrincipalChanged", "Said"
    ),
    Operation("show_principal", "GET", "/v1/principals/{path:path}", "One principal", CALL, "Principal"),
    Operation("login", "POST", "/v1/logins", "A key speaks for a principal for a while", STATEMENT, "Login", "Proven"),
    Operation("authorities", "GET", "/v1/authorities", "Whose word is taken for who somebody is", CALL, "Authorities"),
    Operation("passkey", "POST", "/v1/passkeys", "Add a passkey, or remove it", STATEMENT, "PasskeyChanged", "Said"),
    Operation("apikeys", "GET", "/v1/apikeys", "API keys of the gateway", CALL, "ApiKeys", query=("principal",)),
    Operation("apikey", "POST", "/v1/apikeys", "Make an API key, or end it", STATEMENT, "ApiKeyChanged", "Said"),
    Operation("authority", "POST", "/v1/authorities", "Take, or no more", STATEMENT, "AuthorityChanged", "Said"),
    Operation("policy", "GET", "/v1/policies", "A policy, and what is proposed", CALL, "Policy", query=("digest",)),
    Operation("propose", "POST", "/v1/policies", "Propose a policy", STATEMENT, "PolicyProposed", "Proposed"),
    Operation(
        "enact", "POST", "/v1/policies/{id}/enact", "Make a proposal the policy in force", STATEMENT, "Acted", "Said"
    ),
    Operation(
        "budgets", "GET", "/v1/budgets", "What has left of a version as answers", CALL, "Budgets", query=("ref",)
    ),
    Operation("ceilings", "GET", "/v1/ceilings", "How many may have a version", CALL, "Ceilings", query=("ref",)),
    Operation("act", "POST", "/v1/acts", "Look after the room (section 8)", STATEMENT, "Acted", "Said"),
    Operation("weights", "GET", "/v1/weights", "Versions", CALL, "Versions", query=("name",)),
    Operation("put", "POST", "/v1/weights", "Put a model (section 7)", CALL, "Put", BYTES),
    Operation("show", "GET", "/v1/weights/{ref:path}", "Everything about one version", CALL, "VersionShown"),
    Operation("check_put", "POST", "/v1/uploads", "Would this be taken?", CALL, "UploadTaken", BYTES),
    Operation("trace", "POST", "/v1/traces", "Search found files (section 9)", CALL, "TraceBegun", BYTES, status=202),
    Operation("show_trace", "GET", "/v1/traces/{trace}", "How far a search is", CALL, "TraceShown"),
    Operation("stop_trace", "DELETE", "/v1/traces/{trace}", "Stop a search", CALL, "TraceShown"),
    Operation("check_trace", "POST", "/v1/suspects", "Would these be searched?", CALL, "UploadTaken", BYTES),
    Operation(
        "reach", "GET", "/v1/reach", "Who can, or what can be reached", CALL, "Reach", query=("ref", "principal")
    ),
    Operation("review", "GET", "/v1/reviews", "Who has what, who used it, what to look at", CALL, "Review"),
    Operation("status", "GET", "/v1/status", "What the room holds", CALL, "Status"),
    Operation("object", "GET", "/v1/objects/{pass}/{name:path}", "Ciphertext (section 5)", PASS, BYTES),
    Operation("checkpoint", "GET", "/v1/log/checkpoint", "The newest signed note", CALL, NOTE),
    Operation(
        "consistency",
        "GET",
        "/v1/log/consistency",
        "That the log only grew",
        CALL,
        "Proof",
        query=("old", "new"),
    ),
    Operation("tile", "GET", "/v1/log/tile/{path:path}", "A tile or an entry bundle", CALL, BYTES),
    Operation("gateway_version", "GET", "/v1/gateway/version", "Has the log changed?", CALL, "Seen", query=("after",)),
    Operation("gateway_callers", "POST", "/v1/gateway/callers", "Who calls a gateway", CALL, "Calling", "Shown"),
    Operation("gateway_decisions", "POST", "/v1/gateway/decisions", "What callers may", CALL, "Decisions", "Questions"),
    Operation("gateway_models", "POST", "/v1/gateway/models", "Versions, for a gateway", CALL, "Models", "Wanted"),
    Operation("gateway_spellings", "POST", "/v1/gateway/spellings", "What tokens spell", CALL, "Spelling", "Named"),
    Operation("gateway_draws", "POST", "/v1/gateway/draws", "Draw bits of budgets", CALL, "Drawn", "Draw"),
    Operation("gateway_settlements", "POST", "/v1/gateway/settlements", "Pay, give back", CALL, "Settled", "Settle"),
    Operation("gateway_tallies", "POST", "/v1/gateway/tallies", "What was run again", CALL, "Tallies", "Tally"),
    Operation("inference", "POST", "/v1/gateway/accounts", "What a gateway has answered", STATEMENT, "Acted", "Said"),
    Operation("openapi", "GET", "/v1/openapi.json", "This document", NOBODY, JSON),
    Operation("metrics", "GET", "/metrics", "Counts and times, in the text form of Prometheus", CALL, EXPOSITION),
    Operation("alive", "GET", "/healthz", "The server runs", NOBODY, "Ok"),
    Operation("ready", "GET", "/readyz", "The room is unsealed, its log and its key store answer", NOBODY, "Ok"),
)
