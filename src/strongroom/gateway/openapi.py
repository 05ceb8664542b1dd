"""The gateway's interface as OpenAPI 3.1: what requests may have, and every answer that there is."""

from __future__ import annotations

from functools import cache
from typing import Any

import orjson

_CODES = {
    400: "A field that is unknown, forbidden or out of range; contents that are not passed on; a body that is none.",
    401: "No API key that is good here.",
    403: "A feature that policy does not permit, or a version that is frozen.",
    404: "No model of this name that the caller may use.",
    413: "A body of more than 1 MiB.",
    429: "A limit, or the egress budget.",
    502: "The inference server: nothing that could be taken for an answer.",
    503: "The gateway can't see the log, or can't write records.",
    504: "The inference server took too long.",
}


def _number(least: float, most: float) -> dict[str, Any]:
    return {"type": "number", "minimum": least, "maximum": most}


def _whole(least: int, most: int) -> dict[str, Any]:
    return {"type": "integer", "minimum": least, "maximum": most}


_TEXT = {"type": "string"}
_STOP = {"type": "string", "minLength": 1, "maxLength": 64}
_SAMPLING: dict[str, Any] = {
    "model": {"type": "string", "description": "NAME@N, or NAME for the newest"},
    "max_tokens": _whole(1, 1 << 20),
    "temperature": _number(0, 2),
    "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    "presence_penalty": _number(-2, 2),
    "frequency_penalty": _number(-2, 2),
    "stop": {
        "anyOf": [
            _STOP,
            {
                "type": "array",
                "items": _STOP,
                "minItems": 1,
                "maxItems": 4,
            },
        ]
    },
    "seed": {"type": "integer", "description": "Taken and not used: the gateway draws seeds."},
    "stream": {"type": "boolean"},
    "stream_options": {
        "type": "object",
        "properties": {"include_usage": {"type": "boolean"}},
        "additionalProperties": False,
    },
    "user": _TEXT,
    "n": {**_whole(1, 8), "description": "Above 1 with infer_many."},
    "logit_bias": {
        "type": "object",
        "maxProperties": 64,
        "propertyNames": {"pattern": "^[0-9]{1,7}$"},
        "additionalProperties": _number(-100, 100),
        "description": "With infer_steering.",
    },
}
_MESSAGE = {
    "type": "object",
    "required": ["role", "content"],
    "properties": {
        "role": {"enum": ["system", "developer", "user", "assistant"]},
        "content": {
            "anyOf": [
                _TEXT,
                {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "required": ["type", "text"],
                        "properties": {"type": {"const": "text"}, "text": _TEXT},
                        "additionalProperties": False,
                    },
                },
            ]
        },
        "name": {"type": "string", "pattern": "^[A-Za-z0-9_.-]{1,64}$"},
    },
    "additionalProperties": False,
}
_CHAT = {
    **_SAMPLING,
    "messages": {"type": "array", "items": _MESSAGE, "minItems": 1, "maxItems": 256},
    "max_completion_tokens": _whole(1, 1 << 20),
    "logprobs": {"type": "boolean", "description": "With infer_logprobs."},
    "top_logprobs": {**_whole(0, 5), "description": "With infer_logprobs."},
    "response_format": {"const": {"type": "text"}},
}
_COMPLETIONS = {
    **_SAMPLING,
    "prompt": _TEXT,
    "logprobs": {**_whole(0, 5), "description": "With infer_logprobs."},
}
_EMBEDDINGS = {
    "model": _SAMPLING["model"],
    "input": {"anyOf": [_TEXT, {"type": "array", "items": _TEXT, "minItems": 1, "maxItems": 64}]},
    "dimensions": _whole(1, 256),
    "encoding_format": {"enum": ["float", "base64"]},
    "user": _TEXT,
}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": _TEXT,
                "type": _TEXT,
                "param": {"type": ["string", "null"]},
                "code": _TEXT,
                "hint": _TEXT,
            },
        }
    },
}
_MODEL = {
    "type": "object",
    "required": ["id", "object", "created", "owned_by"],
    "properties": {"id": _TEXT, "object": {"const": "model"}, "created": {"type": "integer"}, "owned_by": _TEXT},
}


def _answers(schema: dict[str, Any], *, streams: bool = False) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": {"schema": schema}}
    if streams:
        content["text/event-stream"] = {"schema": _TEXT}
    errors = {
        str(status): {
            "description": text,
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
        }
        for status, text in _CODES.items()
    }
    return {"200": {"description": "The answer.", "content": content}, **errors}


def _asks(summary: str, fields: dict[str, Any], required: str, answer: dict[str, Any]) -> dict[str, Any]:
    body = {"type": "object", "required": ["model", required], "properties": fields, "additionalProperties": False}
    return {
        "post": {
            "operationId": required,
            "summary": summary,
            "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
            "responses": _answers(answer, streams="stream" in fields),
        }
    }


def _completion(kind: str) -> dict[str, Any]:
    return {
        "type": "object",
        "required": ["id", "object", "created", "model", "choices", "usage"],
        "properties": {"object": {"const": kind}, "choices": {"type": "array", "minItems": 1}},
    }


@cache
def encoded() -> bytes:
    """The document."""
    listed = {
        "type": "object",
        "required": ["object", "data"],
        "properties": {"object": {"const": "list"}, "data": {"type": "array", "items": _MODEL}},
    }
    vectors = {"type": "object", "required": ["object", "data", "model", "usage"]}
    document = {
        "openapi": "3.1.0",
        "info": {"title": "Strongroom gateway", "version": "1", "license": {"name": "Apache-2.0"}},
        "security": [{"key": []}, {"certificate": []}],
        "paths": {
            "/v1/chat/completions": _asks("Answer a conversation.", _CHAT, "messages", _completion("chat.completion")),
            "/v1/completions": _asks("Continue a text.", _COMPLETIONS, "prompt", _completion("text_completion")),
            "/v1/embeddings": _asks("Embed texts; with infer_embeddings.", _EMBEDDINGS, "input", vectors),
            "/v1/models": {
                "get": {
                    "operationId": "models",
                    "summary": "The models that the caller may use.",
                    "responses": _answers(listed),
                }
            },
        },
        "components": {
            "schemas": {"Error": _ERROR},
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer", "description": "strongroom apikey new"},
                "certificate": {"type": "mutualTLS", "description": "where it is started with --client-certificates"},
            },
        },
    }
    return orjson.dumps(document, option=orjson.OPT_INDENT_2) + b"\n"
