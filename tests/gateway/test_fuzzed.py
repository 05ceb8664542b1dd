"""The gateway is asked whatever its OpenAPI document allows, and what it does not: nothing is a fault of ours, and each
answer is one that the document has."""

from __future__ import annotations

import json

import hypothesis
import pytest
import requests
import schemathesis
from hypothesis import strategies as st
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi import checks

from gateway.places import ANA, REF, framed, whole
from strongroom.gateway import openapi
from strongroom.gateway.request import _TABLES

CHECKS = [
    schemathesis.checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]


def answered(body):
    """What an inference server says to a request of any route."""
    if "messages" in body:
        return [whole("x", 1)]
    if "prompt" in body:
        choices = [{"index": 0, "text": "x", "finish_reason": "stop"}]
        return [
            framed(json.dumps({"choices": choices, "usage": {"prompt_tokens": 1, "completion_tokens": 1}}).encode())
        ]
    data = [{"index": k, "embedding": [0.5] * 300} for k in range(len(body["input"]))]
    return [framed(json.dumps({"data": data}).encode())]


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_whatever_is_asked_is_answered_as_the_document_says(place, mode):
    place.inference.script = answered
    gateway = place.gateway("[limits]\nkey = {requests = 0}\nidentity = {requests = 0}\n")
    url = f"http://127.0.0.1:{gateway.port}"
    with requests.get(f"{url}/openapi.json", timeout=60) as answer:
        schema = schemathesis.openapi.from_dict(answer.json())
    schema.config.update(base_url=url)
    cases = [operation.ok().as_strategy(generation_mode=mode) for operation in schema.get_all_operations()]

    @hypothesis.settings(max_examples=120, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(st.one_of(cases))
    def ask(case):
        if isinstance(case.body, dict):
            if case.body.get("stream") is True:
                case.body["stream"] = False  # the inference server of this test has no streams
            if mode is GenerationMode.POSITIVE:
                case.body["model"] = REF
        answer = case.call(headers={"authorization": f"Bearer {place.keys[ANA]}"}, timeout=60)
        case.validate_response(answer, checks=CHECKS)
        statuses.add(answer.status_code)

    statuses: set[int] = set()
    ask()
    assert statuses >= ({200, 403} if mode is GenerationMode.POSITIVE else {400})


def test_the_document_has_every_field_that_is_read():
    document = json.loads(openapi.encoded())
    names = {"chat": "/v1/chat/completions", "completions": "/v1/completions", "embeddings": "/v1/embeddings"}
    for route, path in names.items():
        schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        passed_over = {"metadata", "store", "service_tier"}
        assert set(_TABLES[route]) - passed_over == set(schema["properties"])
