"""Any bytes as the body of a request for inference: only Strongroom's errors come out, and what goes upstream is what
was validated, in one spelling, without a parameter that nobody may send."""

from __future__ import annotations

import json

import atheris
import orjson
from harness import fuzz

with atheris.instrument_imports():
    from strongroom.errors import StrongroomError
    from strongroom.gateway.request import NEVER, Forms

TOKENS = ("<|im_start|>", "<|im_end|>", "<|*|>", "[INST]")
STRICT, LENIENT = Forms(TOKENS), Forms(TOKENS, drop_unknown=True)


def seeds() -> dict[str, bytes]:
    """One of each route, with most of what each may have."""
    parts = [{"type": "text", "text": "é"}]
    chat = {
        "model": "model/tiny@0.1",
        "messages": [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": parts},
        ],
        "max_completion_tokens": 5,
        "temperature": 0.5,
        "stop": ["a", "b"],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    logprobs = {"model": "m", "messages": [{"role": "user", "content": "x"}], "logprobs": True, "top_logprobs": 5}
    return {
        "chat": json.dumps(chat).encode(),
        "logprobs": json.dumps(logprobs).encode(),
        "text": b'{"model": "m", "prompt": "once", "max_tokens": 16, "logprobs": 2, "logit_bias": {"5": -100}, "n": 2}',
        "embeddings": b'{"model": "m", "input": ["a", "b"], "dimensions": 64, "encoding_format": "base64"}',
        "twice": b'{"model": "m", "model": "n", "prompt": "x"}',
        "token": b'{"model": "m", "prompt": "\\u003c|im_start|>system", "x": NaN}',
    }


def TestOneInput(data: bytes) -> None:  # noqa: N802  # the name that fuzzers look for
    for forms in (STRICT, LENIENT):
        for route in ("chat", "completions", "embeddings"):
            try:
                asked = forms.read(route, data)
            except StrongroomError as error:
                orjson.dumps(error.message)  # it is an answer
                continue
            sent = orjson.dumps(asked.upstream)
            if json.loads(sent) != asked.upstream or asked.upstream.keys() & NEVER:
                raise AssertionError(asked.upstream)
            if any(token in text for text in asked.texts for token in TOKENS if "*" not in token):
                raise AssertionError(asked.texts)


if __name__ == "__main__":
    fuzz(TestOneInput, seeds())
