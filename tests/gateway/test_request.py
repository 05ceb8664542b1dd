"""What a caller may ask: every field, and what is none."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strongroom.errors import StrongroomError, UsageError
from strongroom.gateway.refusal import body_of
from strongroom.gateway.request import NEVER, Forms, parsed
from strongroom.gateway.settings import Settings

TOKENS = Settings().requests.control_tokens
FORMS = Forms(TOKENS)
CHAT: dict[str, Any] = {"model": "acme/tiny@1", "messages": [{"role": "user", "content": "Hello"}]}


def chat(**more: Any) -> bytes:
    return json.dumps({**CHAT, **more}).encode()


def refused(body: bytes, route: str = "chat") -> str:
    with pytest.raises(UsageError) as caught:
        FORMS.read(route, body)
    return f"{caught.value.code} {caught.value.evidence.get('param', '')}".strip()


def test_a_plain_request_goes_upstream_as_it_was_meant():
    asked = FORMS.read(
        "chat", chat(temperature=0.5, top_p=1, stop="\n\n", max_completion_tokens=7, stream=True, user="u")
    )
    assert (asked.model, asked.most, asked.stream, asked.actions) == ("acme/tiny@1", 7, True, ["infer"])
    assert asked.upstream == {
        "messages": [{"role": "user", "content": "Hello"}],
        "temperature": 0.5,
        "top_p": 1,
        "stop": ["\n\n"],
    }


def test_parts_of_text_are_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert FORMS.read("chat", chat(messages=[{"role": "user", "content": parts}])).texts == ["ab"]


@pytest.mark.parametrize("name", sorted(NEVER))
def test_what_helps_to_steal_is_refused_under_every_policy(name):
    assert refused(chat(**{name: 1})) == f"parameter.forbidden {name}"
    assert Forms(TOKENS, drop_unknown=True).read("chat", chat(thing=1)).upstream.keys() == {"messages"}
    with pytest.raises(UsageError, match="not for callers"):
        Forms(TOKENS, drop_unknown=True).read("chat", chat(**{name: 1}))


@pytest.mark.parametrize(
    ("steering", "named"),
    [({"logit_bias": {"5": -100}}, "logit_bias"), ({"presence_penalty": 2}, "presence_penalty"), ({"n": 2}, "n")],
)
def test_log_probabilities_never_meet_what_steers(steering, named):
    asked = FORMS.read("chat", chat(logprobs=True, top_logprobs=5))
    assert asked.actions == ["infer", "infer_logprobs"]
    assert refused(chat(logprobs=True, **steering)) == f"parameter.forbidden {named}"
    assert refused(chat(top_logprobs=0, **steering)) == f"parameter.forbidden {named}"


def test_features_are_actions_of_the_policy():
    assert FORMS.read("chat", chat(logit_bias={"5": 1})).actions == ["infer", "infer_steering"]
    assert FORMS.read("chat", chat(n=2)).actions == ["infer", "infer_many"]
    assert FORMS.read("chat", chat(logit_bias={}, n=1, logprobs=False)).actions == ["infer"]


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"model": "no name"}, "model"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": "<|im_end|>"}, "messages"),
        ({"n": 9}, "n"),
        ({"stream": "yes"}, "stream"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"top_logprobs": 6}, "top_logprobs"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x", "more": 1}]}, "messages"),
        ({"messages": [{"role": "user", "content": None}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x", "name": "a b"}]}, "messages"),
        ({"user": "u" * 5000}, "user"),
        ({"model": None}, "model"),
    ],
)
def test_values_out_of_range_are_named(more, param):
    assert refused(chat(**more)) == f"parameter.invalid {param}"


@pytest.mark.parametrize(
    "text",
    [
        "a<|im_start|>system",
        "a<|im_end|>",
        "<s>",
        "[INST]",
        "<<SYS>>",
        "\u0000",
        "\u001b[2J",
        "\u0085",
        "<\uff5cUser\uff5c>",
        "\uff1c|im_start|\uff1e",
        "<start_of_turn>",
    ],
)
def test_nobody_speaks_in_another_roles_name(text):
    assert refused(chat(messages=[{"role": "user", "content": text}])) == "parameter.invalid messages"
    body = json.dumps({"model": "m@1", "prompt": text}).encode()
    assert refused(body, "completions") == "parameter.invalid prompt"


def test_half_a_character_is_no_text():
    body = b'{"model":"m@1","messages":[{"role":"user","content":"\\ud800"}]}'
    assert refused(body) == "parameter.invalid messages"


def test_token_numbers_are_no_prompt():
    body = json.dumps({"model": "m@1", "prompt": [1, 2]}).encode()
    assert refused(body, "completions") == "parameter.invalid prompt"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"null",
        b"{",
        b'{"a":1,"a":2}',
        b'{"a":{"b":1,"b":2}}',
        b'{"a":NaN}',
        b'{"a":Infinity}',
        b'{"a":1e999}',
        b'{"a":' + b"9" * 21 + b"}",
        b'{"a":18446744073709551616}',
        b'{"a":-9223372036854775809}',
        b'{"a":' + b"[" * 33 + b"]" * 33 + b"}",
        b"[" * 500_000,
        b'{"a":' * 100_000,
        b'{"a":"\xff"}',
        b"\xef\xbb\xbf{}",
    ],
)
def test_bodies_that_two_readers_could_read_differently_are_refused(body):
    with pytest.raises(UsageError) as caught:
        parsed(body)
    assert caught.value.code == "body.malformed"


def test_brackets_inside_a_text_are_no_depth():
    text = "[{" * 100 + '"'
    assert parsed(json.dumps({"a": text}).encode()) == {"a": text}


@pytest.mark.parametrize("end", [b"", b"\\", b'"', b'"}'])
def test_a_text_without_an_end_is_read_once(end):
    """Quotation marks in it were each taken for a beginning: half a million of them held a gateway up for hours."""
    with pytest.raises(UsageError) as caught:
        parsed(b'{"a":' + b"[" * 33 + b'"' + b'\\"' * 500_000 + end)
    assert caught.value.code == "body.malformed"
    deep = b'{"a":"' + b'[\\"' * 50 + b'","b":'
    assert parsed(deep + b"1}")["b"] == 1
    with pytest.raises(UsageError):
        parsed(deep + b"[" * 32 + b"]" * 32 + b"}")


@pytest.mark.parametrize("marks", ["\u0301\u0316", "\uff9e\u0301", "\u0f73\u0316"])
def test_marks_are_not_piled_up(marks):
    """To normalise a mebibyte of them took four minutes."""
    body = {"model": "acme/tiny@1", "prompt": "a" + marks * 150_000}
    with pytest.raises(UsageError, match="marks"):
        FORMS.read("completions", json.dumps(body, ensure_ascii=False).encode())
    assert FORMS.read("completions", json.dumps({**body, "prompt": ("a" + marks * 15) * 3}).encode()).texts


def test_names_that_are_no_text_can_be_answered():
    with pytest.raises(UsageError) as caught:
        FORMS.read("chat", b'{"\\ud800":1}')
    assert b'"param":"?"' in body_of(caught.value)


def test_a_body_has_at_most_a_mebibyte():
    with pytest.raises(UsageError) as caught:
        parsed(b" " * ((1 << 20) + 1))
    assert caught.value.code == "body.too_large"


@given(st.binary(max_size=200))
def test_any_bytes_raise_only_our_errors(body):
    for route in ("chat", "completions", "embeddings"):
        with pytest.raises(StrongroomError):
            FORMS.read(route, body)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda x: st.lists(x) | st.dictionaries(st.text(), x),
)


@given(st.dictionaries(st.sampled_from(sorted({*NEVER, "temperature", "messages", "stop", "n", "logit_bias"})), JSON))
def test_any_value_of_any_field_is_taken_or_refused(more):
    try:
        asked = FORMS.read("chat", json.dumps({**CHAT, **more}).encode())
    except StrongroomError:
        return
    assert not asked.upstream.keys() & NEVER
