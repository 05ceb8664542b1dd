"""The OpenAPI document: current, published, and kept to by every answer."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema_rs
import pytest

from strongroom.client import answers
from strongroom.server import openapi
from strongroom.server.operations import CALL, OPERATIONS
from strongroom.server.schemas import COMPONENTS

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "reference" / "openapi.json"


def test_the_reference_is_current():
    command = "python -c 'from strongroom.server import openapi as o; print(o.encoded().decode(), end=\"\")'"
    assert PAGE.read_bytes() == openapi.encoded(), f"{command} > docs/reference/openapi.json"


def test_the_schemas_are_schemas_and_all_are_used():
    text = openapi.encoded().decode()
    for name, schema in COMPONENTS.items():
        jsonschema_rs.Draft202012Validator({**schema, "components": {"schemas": COMPONENTS}})
        assert f'"#/components/schemas/{name}"' in text, name


def test_every_route_says_who_speaks_and_how_it_can_fail():
    document = openapi.document()
    found = {each["operationId"]: each for path in document["paths"].values() for each in path.values()}
    assert set(found) == {each.name for each in OPERATIONS}
    assert len(found) == len(OPERATIONS)
    for each in OPERATIONS:
        assert found[each.name]["security"] == ([{"call": []}] if each.speaks == CALL else [])
        assert {"400", "401", "403", "404", "409", "422", "429", "500", "503"} <= found[each.name]["responses"].keys()


# What a client relies on, by what the server says that it answers.
RELIED_ON = {
    "Challenge": answers.CHALLENGE,
    "Release": answers.RELEASE,
    "Proof": answers.PROOF,
    "Request": answers.REQUEST,
    "Requests": answers.REQUESTS,
    "Revoked": answers.REVOKED,
    "PrincipalChanged": answers.CHANGED,
    "Principal": answers.PRINCIPAL,
    "Principals": answers.PRINCIPALS,
    "Login": answers.LOGIN,
    "ApiKeys": answers.APIKEYS,
    "ApiKeyChanged": answers.CHANGED_APIKEY,
    "Authorities": answers.AUTHORITIES,
    "AuthorityChanged": answers.CHANGED_AUTHORITY,
    "PasskeyChanged": answers.CHANGED_PASSKEY,
    "Reach": answers.ACCESS,
    "Versions": answers.VERSIONS,
    "VersionShown": answers.SHOWN,
    "Policy": answers.POLICY,
    "PolicyProposed": answers.PROPOSED,
    "Budgets": answers.BUDGETS,
    "Ceilings": answers.CEILINGS,
    "Acted": answers.ACTED,
    "Seen": answers.SEEN,
    "Calling": answers.CALLING,
    "Decisions": answers.DECISIONS,
    "Models": answers.MODELS,
    "Spelling": answers.SPELLING,
    "Drawn": answers.DRAWN,
    "Settled": answers.SETTLED,
    "Tallies": answers.TALLIES,
    "UploadTaken": answers.UPLOAD,
    "TraceBegun": answers.BEGUN,
    "TraceShown": answers.TRACE,
    "Leases": answers.LEASES,
    "Put": answers.PUT,
    "Review": answers.REVIEW,
    "Status": answers.STATUS,
}


@pytest.mark.parametrize("name", sorted({each.answers for each in OPERATIONS} & COMPONENTS.keys() - {"Ok"}))
def test_a_client_relies_on_nothing_that_is_not_promised(name):
    assert RELIED_ON[name].keys() <= set(COMPONENTS[name]["required"])


def validator(name):
    return jsonschema_rs.Draft202012Validator(
        {"$ref": f"#/components/schemas/{name}", "components": {"schemas": COMPONENTS}}
    )


def conforms(operation, status, headers, body):
    """AssertionError unless an answer is one that the document has for this operation."""
    kind = headers["Content-Type"].partition(";")[0]
    if status >= 400:
        assert kind == "application/problem+json", (operation.name, status, kind)
        value, name = json.loads(body), "Problem"
        assert value["status"] == status
    elif operation.answers in COMPONENTS:
        assert kind == "application/json", (operation.name, kind)
        value, name = json.loads(body), operation.answers
    else:
        assert kind == operation.answers, (operation.name, kind)
        return
    errors = [str(each) for each in validator(name).iter_errors(value)]
    assert not errors, (operation.name, status, errors, value)
