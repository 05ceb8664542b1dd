"""What an inference server answers, be it as hostile as it likes, and what of it a caller gets."""

from __future__ import annotations

import contextlib
import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strongroom.errors import BackendError, StrongroomError
from strongroom.gateway.answer import DONE, Events, Shape, embeddings
from strongroom.gateway.request import Asked


def shape(route: str = "chat", **more: Any) -> Shape:
    return Shape(Asked(route, **more), "0a", "acme/tiny@1", 7)


def whole(**more: Any) -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": "Hi"}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    return json.dumps({"choices": [{**choice, **more.pop("choice", {})}], "usage": usage, **more}).encode()


def piece(text: str | None = None, reason: str | None = None, **more: Any) -> bytes:
    delta = {} if text is None else {"content": text}
    return json.dumps({"choices": [{"index": 0, "delta": delta, "finish_reason": reason, **more}]}).encode()


def test_an_answer_has_what_the_specification_has_and_nothing_else():
    more = {"system_fingerprint": "fp", "prompt_logprobs": [1], "kv_transfer_params": {"x": 1}, "id": "theirs"}
    choice = {"token_ids": [1, 2], "hidden_states": [0.1], "logprobs": {"content": []}}
    found = shape().whole(whole(choice=choice, **more))
    assert found == {
        "id": "chatcmpl-0a",
        "object": "chat.completion",
        "created": 7,
        "model": "acme/tiny@1",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hi"},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
    }


def test_log_probabilities_are_cut_and_rounded():
    likely = {"token": "a", "logprob": -0.123456, "bytes": [1], "top_logprobs": []}
    beside = [{"token": str(k), "logprob": -1.23456 - k} for k in range(20)]
    body = whole(choice={"logprobs": {"content": [{**likely, "top_logprobs": beside, "hidden": 1}]}})
    found = shape(logprobs=2).whole(body)["choices"][0]["logprobs"]["content"]
    assert found == [
        {
            "token": "a",
            "logprob": -0.12,
            "bytes": [97],
            "top_logprobs": [
                {"token": "0", "logprob": -1.23, "bytes": [48]},
                {"token": "1", "logprob": -2.23, "bytes": [49]},
            ],
        }
    ]


@pytest.mark.parametrize("route", ["chat", "completions"])
def test_every_token_whose_log_probability_is_told_is_counted(route):
    """An upstream could say that there were two tokens, and list a thousand."""
    one = {"token": "a", "logprob": -1.0}
    listed = {"content": [one] * 1000} if route == "chat" else {"tokens": ["a"] * 1000, "token_logprobs": [-1.0] * 1000}
    made = shape(route, logprobs=2)
    made.whole(whole(choice={"text": "Hi", "logprobs": listed}))
    assert made.meter.tokens() == (1000, True)


def test_the_private_channel_is_counted_and_goes_no_further():
    made = shape()
    found = made.whole(whole(choice={"strongroom": {"tokens": [5, 6, 7], "logprobs": [-0.6931471805599453] * 3}}))
    assert "strongroom" not in json.dumps(found)
    assert made.meter.tokens() == (3, True)
    assert made.meter.estimate == pytest.approx(3.0)
    assert made.meter.sampled == {0: [5, 6, 7]}


@pytest.mark.parametrize(("tokens", "expected"), [(0, (34, False)), (6, (34, False)), (7, (7, True))])
def test_a_channel_that_counts_too_little_is_not_believed(tokens, expected):
    """The server writes both: text that it gives out for nothing would be a way out for weights."""
    made = shape()
    said = {"tokens": [5] * tokens, "logprobs": [-1.0] * tokens}
    made.whole(whole(choice={"message": {"content": "x" * 100}, "strongroom": said}))
    assert made.meter.tokens() == expected
    made = shape(stream=True)
    for _ in range(5):
        made.piece(piece("x", strongroom={"tokens": [], "logprobs": []}))
    assert made.meter.tokens()[0] == 5


def test_an_event_of_many_lines_has_an_end():
    events = Events()
    with pytest.raises(BackendError, match="too long"):
        list(events.feed((b"data: " + b"x" * 1000 + b"\n") * 2000))


@pytest.mark.parametrize("route", ["chat", "completions"])
def test_log_probabilities_count_as_the_tokens_that_they_are_of(route):
    """A server could put megabytes into those of tokens that no text has."""
    row = {"token": "ab", "logprob": -1.0, "top_logprobs": [{"token": "cde", "logprob": -2.0}] * 3}
    columns = {"tokens": ["ab"] * 9, "token_logprobs": [-1.0] * 9, "top_logprobs": [{"cde": -2.0}] * 9}
    made = shape(route, stream=True, logprobs=1)
    assert made.piece(piece("", logprobs={"content": [row] * 9} if route == "chat" else columns))
    assert made.meter.tokens()[0] == 9
    assert (made.meter.listed, made.meter.named) == (9, 9 * 5)
    made.piece(b'{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":1}}')
    assert made.meter.tokens() == (9, True)
    empty = {"content": []} if route == "chat" else {"tokens": [], "token_logprobs": []}
    assert made.piece(piece("", logprobs=empty)) == b""


def test_a_prompt_has_no_more_tokens_than_it_can_have():
    """They go into the limits of whoever asked: one answer must not use up years of them."""
    usage = {"prompt_tokens": 1 << 40, "completion_tokens": 2}
    made = shape(texts=["Hi", "é"], characters=3)
    found = made.whole(whole(usage=usage))
    assert found["usage"]["prompt_tokens"] == made.meter.prompt == 4 * 3 + 1024 + 2 * 64
    body = json.dumps({"data": [{"index": 0, "embedding": [1.0]}], "usage": usage}).encode()
    assert (
        embeddings(Asked("embeddings", texts=["Hi"], characters=2), body, "acme/tiny@1", 256)[0]["usage"][
            "prompt_tokens"
        ]
        < 2000
    )


@pytest.mark.parametrize(
    ("reported", "text", "expected"),
    [(2, "Hi", (2, True)), (0, "x" * 100, (34, False)), (1, "x" * 17, (6, False)), (7, "x" * 100, (7, True))],
)
def test_an_upstream_that_says_too_little_is_not_believed(reported, text, expected):
    made = shape()
    usage = {"prompt_tokens": 1, "completion_tokens": reported}
    made.whole(whole(choice={"message": {"content": text}}, usage=usage))
    assert made.meter.tokens() == expected


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{}",
        b"\xff",
        b'{"choices":{}}',
        whole(choice={"index": 1}),
        whole(choice={"index": True}),
        whole(choice={"message": None}),
        whole(choice={"message": {"content": 5}}),
        whole(choice={"message": {"content": "\ud800"}}),
        whole(choices=[]),
        whole(choices=[{}, {}]),
        whole(usage={"completion_tokens": -1}),
        whole(usage={"completion_tokens": True, "prompt_tokens": 1}),
        whole(usage={"completion_tokens": 10**30, "prompt_tokens": 1}),
        whole(usage=[]),
        whole(choice={"strongroom": {"tokens": [1], "logprobs": []}}),
        whole(choice={"strongroom": {"tokens": ["1"], "logprobs": [0.0]}}),
        whole(choice={"strongroom": 5}),
    ],
)
def test_what_is_no_answer_is_malformed(body):
    with pytest.raises(BackendError) as caught:
        shape().whole(body)
    assert caught.value.code == "upstream.malformed"


def test_a_stream():
    made = shape(stream=True, include_usage=True)
    out = made.piece(piece("Hel")) + made.piece(piece("lo")) + made.piece(piece(None, "stop"))
    out += made.piece(b'{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}') + made.end()
    events = [line.removeprefix("data: ") for line in out.decode().split("\n\n") if line]
    assert events.pop() == "[DONE]"
    chunks = [json.loads(event) for event in events]
    assert [c["choices"][0]["delta"] for c in chunks[:-1]] == [
        {"role": "assistant", "content": "Hel"},
        {"content": "lo"},
        {},
    ]
    assert chunks[-1]["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    assert {c["object"] for c in chunks} == {"chat.completion.chunk"}


def test_no_text_begins_an_event_of_its_own():
    made = shape(stream=True)
    out = made.piece(piece('x\n\ndata: {"choices":[]}\n\ndata: [DONE]\n\n\r\n'))
    assert out.count(b"\n") == 2
    assert out.endswith(b"\n\n")


@pytest.mark.parametrize(
    "more", [{}, {"reason": "stop"}, {"logprobs": {"content": [{"token": "\x85", "logprob": -1}]}}]
)
@pytest.mark.parametrize("route", ["chat", "completions"])
def test_no_text_ends_a_line_for_whoever_ends_lines_elsewhere(route, more):
    """As clients do that split what they have decoded: requests' `iter_lines` is one."""
    made = shape(route, stream=True, logprobs=1 if "logprobs" in more else None)
    text = "a\u2028data: b\u2029\x85\\\x0b\x0cé"
    if "logprobs" in more and route == "completions":
        more = {"logprobs": {"tokens": ["\x85"], "token_logprobs": [-1]}}
    for _ in range(2):  # a first piece is made in another way
        given = json.loads(piece(text, **more))
        given["choices"][0]["text"] = text
        found = made.piece(json.dumps(given).encode())
        assert len(found.decode().splitlines()) == 2
        (choice,) = json.loads(found.removeprefix(b"data: "))["choices"]
        assert (choice["delta"]["content"] if route == "chat" else choice["text"]) == text
        if more.get("reason"):
            break


def test_a_stream_that_does_not_end_is_no_answer():
    made = shape(stream=True)
    made.piece(piece("x"))
    with pytest.raises(BackendError, match="ends before"):
        made.end()


@pytest.mark.parametrize(
    "event",
    [
        b'{"error":{"message":"x"}}',
        b'{"choices":[{"index":1,"delta":{}}]}',
        b'{"choices":[{"index":0,"delta":{"content":5}}]}',
        b'{"choices":[{},{}]}',
        b'{"choices":5}',
        b"5",
    ],
)
def test_pieces_that_nobody_asked_for(event):
    with pytest.raises(BackendError):
        shape(stream=True).piece(event)


def test_nothing_comes_after_the_end():
    made = shape(stream=True)
    made.piece(piece("x", "stop"))
    with pytest.raises(BackendError):
        made.piece(piece("more"))


@given(st.lists(st.binary(max_size=30), max_size=20))
def test_events_are_the_same_however_the_body_is_cut(pieces):
    body = b": hello\r\n\r\ndata: {}\n\nevent: x\ndata: [1]\ndata: [2]\n\nid: 5\n\n" + b"".join(pieces)
    at_once = list(Events().feed(body[:66]))
    one_by_one = Events()
    assert [event for k in range(66) for event in one_by_one.feed(body[k : k + 1])] == at_once


_LINES = st.sampled_from(
    [b"data: {}", b"data: {}", b"data:{}", b"data: [DONE]", b": hello", b"id: 5", b"", b"\r", b"data: a\r", b"x"]
)


@given(st.lists(_LINES, max_size=30), st.lists(st.integers(0, 200), max_size=6).map(sorted))
def test_events_are_the_same_line_by_line(lines, cuts):
    """However a server writes them, and whatever is quick about the usual way."""
    body = b"\n".join([each + b"\n" * (k % 2) for k, each in enumerate(lines)])
    quick, slow = Events(), Events()
    found: list[list[object]] = [[], []]
    for a, b in zip([0, *cuts], [*cuts, len(body)], strict=True):
        for events, out, feed in (
            (quick, found[0], quick.feed),
            (slow, found[1], lambda piece: slow._lines(slow._rest + piece)),
        ):
            try:
                out.extend(feed(body[a:b]))
            except BackendError as error:
                out.append(error.message)
            out.append(events.ended)
        assert found[0] == found[1]
        if any(isinstance(each, str) for each in found[0]):  # it is given up
            break


def test_an_event_that_never_ends():
    events = Events()
    for _ in range(16):
        list(events.feed(b"x" * 65536))
    with pytest.raises(BackendError, match="too long"):
        list(events.feed(b"x"))
    with pytest.raises(BackendError, match="too long"):  # or comes at once
        list(Events().feed(b"data: " + b"x" * (1 << 20) + b"\n\n"))


@pytest.mark.parametrize("piece", [b"x", b"data: x\n"])
def test_an_event_in_small_pieces_costs_no_more_than_they_have(piece):
    """Else an inference server could keep a worker, and all whom it answers, busy with a thousand packets a second."""
    events = Events()
    list(events.feed(b"data: " + b"x" * (1 << 19)))
    begun = time.thread_time()
    for _ in range(4000):
        list(events.feed(piece))
    assert time.thread_time() - begun < 0.5


def test_events_end_once():
    events = Events()
    assert list(events.feed(b"data: {}\n\n" + DONE)) == [b"{}"]
    assert events.ended
    with pytest.raises(BackendError, match="after its end"):
        list(events.feed(b"data: {}\n\n"))


def test_embeddings_are_cut_and_rounded():
    asked = Asked("embeddings", dimensions=3)
    body = json.dumps({"data": [{"index": 0, "embedding": [0.5, -1.0, 0.123456, 9.0]}]}).encode()
    found, numbers = embeddings(asked, body, "acme/tiny@1", 256)
    assert numbers == 3
    assert found["data"][0]["embedding"] == [64 / 127, -1.0, 16 / 127]
    assert all(round(127 * x) / 127 == x for x in found["data"][0]["embedding"])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.sampled_from(["index", "delta", "content", "tokens"]), x),
)
CHOICE = st.fixed_dictionaries(
    {}, optional=dict.fromkeys(("index", "delta", "message", "text", "finish_reason", "strongroom", "logprobs"), JSON)
)
ANSWER = st.fixed_dictionaries(
    {}, optional={"choices": st.lists(CHOICE, max_size=2) | JSON, "usage": JSON, "data": JSON}
)


@given(ANSWER, st.sampled_from(["chat", "completions"]))
def test_any_answer_is_made_anew_or_refused(value, route):
    body = json.dumps(value).encode()
    for asked in (Asked(route, logprobs=5), Asked(route, stream=True)):
        made = Shape(asked, "0a", "m@1", 7)
        try:
            made.piece(body) if asked.stream else made.whole(body)
        except StrongroomError:
            continue
        tokens, _ = made.meter.tokens()
        assert tokens >= 0
    with contextlib.suppress(StrongroomError):
        embeddings(Asked("embeddings"), body, "m@1", 256)
