"""The OpenAPI document of the custodian, made of the table that its routes are made of."""

from __future__ import annotations

import json
import re
from typing import Any

from strongroom.server.operations import CALL, OPERATIONS, Operation
from strongroom.server.schemas import COMPONENTS, COUNT, ID, TEXT, TRACE

_PROBLEMS = {
    "400": "the request is not one",
    "401": "nobody of this room has signed it",
    "403": "policy does not permit it",
    "404": "there is no such thing, or it is not for you",
    "409": "it is too early, or somebody else got there first",
    "422": "what was sent, or what is kept, is not what was signed",
    "429": "too much, too often or too slow",
    "500": "a fault of the server's own",
    "503": "the room is sealed, or its store, database or key store does not answer",
}
_PARAMETERS: dict[str, dict[str, Any]] = {
    "id": ID,
    "trace": TRACE,
    "pass": {"type": "string", "pattern": "^[A-Za-z0-9_-]{32}$"},
    "old": COUNT,
    "new": COUNT,
}
_DESCRIPTION = (
    "The custody of one room. What a principal decides is a signed statement in the body; everything else is "
    "authorised by a signed statement in the header Authorization. Errors are RFC 9457 problem documents. The "
    "specification is spec/http.md."
)


def document() -> dict[str, Any]:
    """OpenAPI 3.1, the same for every room."""
    paths: dict[str, Any] = {}
    for each in OPERATIONS:
        paths.setdefault(re.sub(r":path}", "}", each.path), {})[each.method.lower()] = _operation(each)
    problem = {"schema": {"$ref": "#/components/schemas/Problem"}}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Strongroom custodian",
            "version": "1",  # of spec/http.md
            "description": _DESCRIPTION,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {
            "schemas": COMPONENTS,
            "responses": {
                f"Problem{status}": {"description": text, "content": {"application/problem+json": problem}}
                for status, text in _PROBLEMS.items()
            },
            "securitySchemes": {
                "call": {
                    "type": "apiKey",
                    "in": "header",
                    "name": "Authorization",
                    "description": "`Strongroom STATEMENT`: a signed statement of the kind `call`, base64url without "
                    "padding, of method, path with query, and SHA-256 of the body; good for 300 seconds",
                }
            },
        },
    }


def encoded() -> bytes:
    """The document as it is published, and kept in docs/reference."""
    return (json.dumps(document(), indent=1, sort_keys=True) + "\n").encode()


def _operation(operation: Operation) -> dict[str, Any]:
    named = re.findall(r"{(\w+)", operation.path)
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": _PARAMETERS.get(name, {**TEXT, "minLength": 1})}
        for name in named
    ]
    parameters += [{"name": name, "in": "query", "schema": _PARAMETERS.get(name, TEXT)} for name in operation.query]
    answer = {"description": operation.summary, "content": _content(operation.answers)}
    answers: dict[str, Any] = {str(operation.status): answer}
    if operation.name == "object":
        parameters.append(
            {
                "name": "Range",
                "in": "header",
                "schema": {"type": "string", "pattern": "^bytes=[0-9]{1,18}-[0-9]{1,18}$"},
            }
        )
        answers["206"] = answers["200"]
    answers |= {status: {"$ref": f"#/components/responses/Problem{status}"} for status in _PROBLEMS}
    found: dict[str, Any] = {
        "operationId": operation.name,
        "summary": operation.summary,
        "parameters": parameters,
        "responses": answers,
        "security": [{"call": []}] if operation.speaks == CALL else [],
    }
    if operation.takes:
        found["requestBody"] = {"required": True, "content": _content(operation.takes)}
    return found


def _content(what: str) -> dict[str, Any]:
    if what in COMPONENTS:
        return {"application/json": {"schema": {"$ref": f"#/components/schemas/{what}"}}}
    if what == "application/octet-stream":
        return {what: {"schema": {"type": "string", "format": "binary"}}}
    return {what: {"schema": {"type": "object" if what == "application/json" else "string"}}}
