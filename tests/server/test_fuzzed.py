"""A served room is asked whatever its OpenAPI document allows, and what it does not: nothing is a 5xx, and every answer
is one that the document has."""

from __future__ import annotations

import base64
import hashlib

import hypothesis
import pytest
import requests
import schemathesis
from hypothesis import strategies as st
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi import checks

from server.served import REF, Served
from strongroom.client import Room
from strongroom.core.clock import unix
from strongroom.crypto.signatures import Signer
from strongroom.formats.entry import Private
from strongroom.formats.statement import BODIES, Statement
from strongroom.formats.stream import fresh
from strongroom.server.operations import OPERATIONS, STATEMENT

pytestmark = pytest.mark.server

EXAMPLES = 10  # of each route and speaker
SPEAKERS = ("", "user/ben", "user/ada", "user/pat", "workload/gate")  # nobody, officer, auditor, partner, gateway
CHECKS = [
    schemathesis.checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]
OPEN = ("challenge", "alive", "ready", "openapi")
ABOUT = {"request": {401, 403, 404}, "revoke": {401, 403, 404}}  # each gets as far as policy
TOLD = ("requests", "leases", "principals", "policy", "weights", "review", "status", "checkpoint", "metrics")
ACTS = ("ceiling", "clock", "copy", "redact", "review", "thaw")
SAID = [each.name for each in OPERATIONS if each.speaks == STATEMENT]  # called as the kind of the statement is


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    made = Served(tmp_path_factory.mktemp("served"))
    with Room(made.folder, "user/olga") as room:
        for path, role in (("user/pat", "partner"), ("workload/gate", "gateway")):
            room.principal_add(path, roles=[role], public_key=made.identities.create(path).public_key.hex())
    made.authority = made.home / "authority.pem"
    made.authority.write_text(made.card.authority)
    yield made
    made.stop()


@pytest.fixture(scope="module")
def api(served):
    with requests.get(f"{served.url}/v1/openapi.json", verify=str(served.authority), timeout=30) as answer:
        schema = schemathesis.openapi.from_dict(answer.json())
    schema.config.update(base_url=served.url)
    return schema


class Signed(requests.auth.AuthBase):
    """Signs each request as it is sent."""

    def __init__(self, served, who):
        self.served, self.who = served, who

    def __call__(self, request):
        body = request.body or b""
        body = body.encode() if isinstance(body, str) else body
        said = {"method": request.method, "path": request.path_url, "body": hashlib.sha256(body).hexdigest()}
        envelope = statement(self.served, "call", said, self.who)
        text = base64.urlsafe_b64encode(envelope.encode()).rstrip(b"=").decode()
        request.headers["Authorization"] = f"Strongroom {text}"
        return request


def statement(served, kind, body, who):
    signer = served.identities.signer(who) if who else Signer(b"e" * 32)
    room = served.card.room.hex()
    return Statement.sign(kind, body, room=room, by=who or "user/eve", at=unix(), signer=signer).envelope


digests, identifiers = st.from_regex(r"[0-9a-f]{64}", fullmatch=True), st.from_regex(r"[0-9a-f]{16}", fullmatch=True)
paths = st.sampled_from(
    [*(each for each in SPEAKERS if each), "user/ana", "user/olga", "user/new", "team/x", "", "user/"]
)
refs = st.sampled_from([REF, "acme/tiny", "acme/none@1", "acme/tiny@99999999999", "@", "room", "x" * 300])
counts = st.sampled_from([0, 1, 60, 8 * 3600, 10**9, 2**53 - 1])
texts = st.text(st.characters(codec="utf-8"), max_size=20)
MEMBERS = {
    "action": st.sampled_from(["load", "copy", "trace"]),
    "ref": refs | texts,
    "for": paths | texts,
    "holder": paths | texts,
    "target": refs | paths | identifiers | texts,
    "duration": counts,
    "uses": st.none() | counts,
    "request": digests,
    "lease": identifiers,
    "public_key": digests,
    "challenge": digests,
    "digest": digests,
    "break_glass": st.booleans(),
    "reason": digests,
    "principal": paths | texts,
    "person": paths | texts,
    "key": digests | st.just("") | st.just("30" * 91),
    "proposal": identifiers,
    "before": st.none() | counts,
    **dict.fromkeys(("holders", "copies", "copiers", "files", "bytes"), counts),
    **dict.fromkeys(("release", "size", "findings", "removed", "entry"), counts),
    "credential": st.just("abc") | texts,
    "roles": st.lists(st.sampled_from(["officer", "partner", "x", ""]), max_size=3),
    "teams": st.lists(paths, max_size=2),
    "method": st.sampled_from(["oidc", "x509"]),
    "authority": st.sampled_from(["https://id.example", "prod.example", ""]) | texts,
    "text": st.just("") | texts,
    "state": st.sampled_from(["active", "suspended", "removed", "ended"]),
    "name": st.sampled_from(["ci", "default", ""]) | texts,
    **dict.fromkeys(("account", "records", "requests", "refused", "tokens", "bits"), counts),
    "gateway": st.from_regex(r"[0-9a-f]{32}", fullmatch=True) | st.just(fresh(bytes(16), "user/ben")),
    **dict.fromkeys(("head", "settings"), digests),
    "expires_at": counts | st.just(unix() + 8 * 3600),
}


@st.composite
def bodies(draw, kind):
    """The body of a statement of this kind that is well formed, and about anything."""
    while True:
        body = {name: draw(MEMBERS[name]) for name in BODIES[kind]}
        if all(conforms(body[name]) for name, conforms in BODIES[kind].items()):
            return body


def say(served, case, kind, body, who):
    """Make `case` one that is as it should be: a signed statement, at the address of what it is about."""
    note = Private.fresh("reason", "because")
    case.body = {}
    if "reason" in body and kind != "release":
        body["reason"] = note.commitment
        case.body["reason"] = {"value": note.value, "salt": base64.b64encode(note.salt).decode()}
    if kind == "propose":
        case.body["text"] = "permit (principal, action, resource);"
        body["digest"] = hashlib.sha256(case.body["text"].encode()).hexdigest()
    if about := body.get("request", body.get("lease", body.get("proposal"))):
        case.path_parameters = {"id": about[:16]}
    case.body["statement"] = statement(served, kind, body, who)


@pytest.mark.parametrize("who", SPEAKERS, ids=lambda who: who or "nobody")
@pytest.mark.parametrize("name", [each.name for each in OPERATIONS])
def test_whatever_is_asked(served, api, name, who):
    seen = set()
    operation = next(each.ok() for each in api.get_all_operations() if each.ok().definition.raw["operationId"] == name)
    auth, fair = Signed(served, who) if who else None, operation.as_strategy(generation_mode=GenerationMode.POSITIVE)

    @hypothesis.settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=fair | operation.as_strategy(generation_mode=GenerationMode.NEGATIVE), data=st.data())
    def ask(case, data):
        if name in SAID and data.draw(st.booleans()):
            kind = data.draw(st.sampled_from(ACTS)) if name == "act" else name
            say(served, case, kind, data.draw(bodies(kind)), who)
        response = case.call(verify=str(served.authority), auth=auth, timeout=60)
        seen.add(response.status_code)
        case.validate_response(response, checks=CHECKS)

    ask()
    assert seen
    if name in OPEN or (name in TOLD and who == "user/ben"):
        assert 200 in seen
    if name in ABOUT and who:
        assert seen & (ABOUT[name] | {200})
