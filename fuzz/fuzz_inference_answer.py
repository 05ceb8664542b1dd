"""Any bytes as what an inference server answers, whole and as a stream: only Strongroom's errors come out, no more
tokens are charged than an answer may have, and no text begins an event of its own."""

from __future__ import annotations

import contextlib
import json

import atheris
import orjson
from harness import fuzz

with atheris.instrument_imports():
    from strongroom.errors import StrongroomError
    from strongroom.gateway.answer import DONE, Events, Meter, Shape, embeddings
    from strongroom.gateway.request import Asked

MOST = 64  # tokens
ROUTES = (
    Asked("chat"),
    Asked("chat", stream=True, logprobs=2),
    Asked("completions", n=2),
    Asked("completions", stream=True),
)


def seeds() -> dict[str, bytes]:
    """Answers of each kind, the private channel included."""
    top = [{"token": "a", "logprob": -0.1, "bytes": [97]}]
    content = [{"token": "a", "logprob": -0.1, "bytes": [97], "top_logprobs": top}]
    channel = {"tokens": [5], "logprobs": [-0.1]}
    said = {"index": 0, "logprobs": {"content": content}, "finish_reason": "stop", "strongroom": channel}
    usage = {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4}
    delta = json.dumps({"choices": [{**said, "delta": {"content": "a"}}], "usage": usage}).encode()
    text = [{"index": index, "text": "a\n\ndata: b", "finish_reason": "length"} for index in (1, 0)]
    return {
        "chat": json.dumps({"choices": [{**said, "message": {"content": "a"}}], "usage": usage}).encode(),
        "text": json.dumps({"choices": text, "usage": usage}).encode(),
        "stream": b"data: " + delta + b"\n\n: nothing\r\ndata: [DONE]\n\n",
        "embeddings": b'{"data": [{"index": 0, "embedding": [0.5, -1e300, 3]}], "usage": {"prompt_tokens": 4}}',
    }


def TestOneInput(data: bytes) -> None:  # noqa: N802  # the name that fuzzers look for
    for asked in ROUTES:
        meter = Meter(most=MOST, text_most=MOST * 16)
        shape = Shape(asked, "0" * 8, "m", 1, meter)
        with contextlib.suppress(StrongroomError):
            if asked.stream:
                _stream(shape, data)
            else:
                orjson.dumps(shape.whole(data))
        if not 0 <= meter.tokens()[0] <= max(MOST, MOST * 16 // 3 + 1):
            raise AssertionError(meter)
    with contextlib.suppress(StrongroomError):
        orjson.dumps(embeddings(Asked("embeddings"), data, "m", 256)[0])


def _stream(shape: Shape, data: bytes) -> None:
    events = Events()
    for begin in range(0, len(data), 37):
        for event in events.feed(data[begin : begin + 37]):
            made = shape.piece(event)
            if made and (made.count(b"\n") != 2 or not made.startswith(b"data: {") or not made.endswith(b"}\n\n")):
                raise AssertionError(made)
    if not shape.end().endswith(DONE):
        raise AssertionError("no end")


if __name__ == "__main__":
    fuzz(TestOneInput, seeds())
