"""What a caller asks, field by field (spec/gateway.md, sections 2 and 3): what is not in a table here does not pass.

What goes upstream is built anew from what was validated. A caller's bytes never do: of two members with one name,
this module and an inference server could read different ones.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import orjson

from strongroom.core.ids import Ref
from strongroom.errors import UsageError

BODY_MOST = 1 << 20  # bytes
_DEPTH = 32
_MESSAGES = 256
_INPUTS = 64
_PASSED_OVER = 4096  # bytes of what is taken and not passed on
_ROLES = ("system", "developer", "user", "assistant")
_NAMED = {"role", "content", "name"}  # members of a message, the last of which may be left out
_LOGPROBS = 5
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
_PILE = bytes([1]) * 31  # marks in a row; no text has more than 30 (UAX #15, section 13)
_MADE_OF_MARKS = re.compile("[\u0f73\u0f75\u0f81\uff9e\uff9f]")  # but none themselves
# Refused under every policy: each lets a caller steer what it then reads exactly, or read what was not generated.
NEVER = frozenset(
    {
        "allowed_token_ids", "bad_words", "best_of", "bad_words_ids", "echo", "force_words_ids", "grammar",
        "guided_choice", "guided_decoding_backend", "guided_grammar", "guided_json", "guided_regex", "ignore_eos",
        "include_stop_str_in_output", "json_schema", "logits_processors", "lora_request", "min_p", "min_tokens",
        "prompt_embeds", "prompt_logprobs", "regex", "return_token_ids", "return_tokens_as_token_ids",
        "skip_special_tokens", "stop_token_ids", "strongroom", "structured_outputs", "suffix", "truncate_prompt_tokens",
        "top_k", "use_beam_search", "extra_body", "functions", "function_call", "tools", "tool_choice",
        "parallel_tool_calls", "modalities", "audio", "prediction", "add_generation_prompt", "continue_final_message",
        "chat_template", "chat_template_kwargs", "documents", "mm_processor_kwargs", "vllm_xargs", "kv_transfer_params",
        "repetition_penalty", "length_penalty", "spaces_between_special_tokens", "add_special_tokens",
    }
)  # fmt: skip


@dataclass(slots=True)
class Asked:
    """One request, validated. `route`: chat, completions or embeddings. `most`: tokens for each of `n` answers, None
    for the settings' default. `logprobs`: for each token so many beside the sampled one, None for none at all."""

    route: str
    model: str = ""
    stream: bool = False
    include_usage: bool = False
    most: int | None = None
    n: int = 1
    logprobs: int | None = None
    dimensions: int | None = None
    base64: bool = False
    inputs: int = 1
    texts: list[str] = field(default_factory=list)
    upstream: dict[str, Any] = field(default_factory=dict)
    actions: list[str] = field(default_factory=lambda: ["infer"])
    steers: str = ""
    characters: int = 0  # of everything that the model reads


NOTHING = Asked("")  # nothing yet


class Forms:
    """Reads requests. `control_tokens`: texts that no request may have, `*` being up to 64 characters other than `|`:
    one that has them speaks in another role's name. `drop_unknown`: whether unknown fields are left out or refused."""

    def __init__(self, control_tokens: Sequence[str], *, drop_unknown: bool = False) -> None:
        tokens = sorted(control_tokens, key=len, reverse=True)
        patterns = [re.escape(token).replace(r"\*", "[^|]{0,64}") for token in tokens]
        self._tokens = re.compile("|".join(patterns) or "(?!)")
        self._drop = drop_unknown

    def read(self, route: str, body: bytes) -> Asked:
        """UsageError ``body.malformed``, ``parameter.unknown``, ``parameter.forbidden``, ``parameter.invalid``, with
        `param` in its evidence."""
        value = parsed(body)
        asked = Asked(route)
        table, required = _TABLES[route], _REQUIRED[route]
        for name, given in value.items():
            if name in table:
                if given is not None:
                    table[name](asked, given)
            elif name in NEVER:
                raise forbidden(name)
            elif not self._drop:
                shown = name[:80].encode(errors="replace").decode()  # half a character can't be answered with
                raise UsageError("parameter.unknown", f"the parameter {name!r:.80} is not known here", param=shown)
        if value.get("model") is None:
            raise invalid("model", "is required")
        if value.get(required) is None:
            raise invalid(required, "is required")
        # What is in none of them is not in all together; what is may be half in one and half in the next.
        texts = asked.texts
        together = "\n".join(texts)
        asked.characters = len(together) - len(texts) + 1
        if _CONTROL.search(together) or not together.isascii() or self._tokens.search(together):
            for text in texts:
                self._check(text, required)
        if asked.logprobs is not None:
            if asked.steers:
                # One query would give one exact value of the last layer (arXiv 2403.06634): no policy allows it.
                raise forbidden(asked.steers, "is never taken together with log-probabilities")
            asked.actions.append("infer_logprobs")
            if asked.n > 1:
                raise forbidden("n", "is never taken together with log-probabilities")
        return asked

    def _check(self, text: str, param: str) -> None:
        if _CONTROL.search(text):
            raise invalid(param, "has control characters, or half a character")
        found = self._tokens.search(text)
        if not found and not text.isascii():
            if _piled(text):
                raise invalid(param, "has more than 30 marks on one character")
            # Some tokenizers normalise first: a wide form of a control token is one, too.
            found = self._tokens.search(unicodedata.normalize("NFKC", text.replace("\ufdfa", " ")))
        if found:
            raise invalid(param, f"has {found[0]!r:.70}, which the model takes for a mark of its own")


def _piled(text: str) -> bool:
    """To normalise a text sorts its marks, in a time that goes with the square of how many there are in a row."""
    marks = map(unicodedata.combining, _MADE_OF_MARKS.sub("\u0301", text))
    return _PILE in bytes(map(bool, marks))


def parsed(body: bytes) -> dict[str, Any]:
    """A JSON object without duplicate names, of bounded depth and numbers; UsageError ``body.malformed``."""
    if len(body) > BODY_MOST:
        raise UsageError("body.too_large", f"the body is longer than {BODY_MOST >> 10} KiB")
    # The decoder is recursive in C: what is deeper than this is not worth its stack.
    if body.count(b"[") + body.count(b"{") > _DEPTH and _too_deep(body):
        raise UsageError("body.malformed", f"the body is nested deeper than {_DEPTH}")
    # Most clients write JSON as it is written here. What comes out as it went in had no name twice.
    try:
        value = orjson.loads(body)
        if isinstance(value, dict) and orjson.dumps(value) == body:
            return value
    except orjson.JSONDecodeError:
        pass
    try:
        value = json.loads(
            body.decode(),
            object_pairs_hook=_members,
            parse_constant=_no_constant,
            parse_int=_integer,
            parse_float=_real,
        )
    except UsageError:
        raise
    except (ValueError, RecursionError):
        raise UsageError("body.malformed", "the body is not JSON in UTF-8") from None
    if not isinstance(value, dict):
        raise UsageError("body.malformed", "the body is not a JSON object")
    return value


# Nothing is tried twice: of a text without an end, each quotation mark in it would be a beginning to try again.
_STRINGS = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)', re.DOTALL)


def _too_deep(body: bytes) -> bool:
    depth = 0
    for bracket in re.findall(rb"[\[{\]}]", _STRINGS.sub(b"", body)):
        depth += 1 if bracket in b"[{" else -1
        if depth > _DEPTH:
            return True
    return False


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise UsageError("body.malformed", "an object in the body has a name twice")
    return value


def _no_constant(name: str) -> Any:
    raise UsageError("body.malformed", f"{name} is not JSON")


def _integer(digits: str) -> int:
    value = int(digits) if len(digits) <= 20 else 1 << 64
    if not -(1 << 63) <= value < 1 << 64:
        raise UsageError("body.malformed", "a number in the body has more than 64 bits")
    return value


def _real(digits: str) -> float:
    value = float(digits[:64]) if len(digits) <= 64 else math.inf
    if not math.isfinite(value):
        raise UsageError("body.malformed", "a number in the body is not finite, or longer than 64 characters")
    return value


def is_number(value: Any) -> bool:
    """Of JSON, whose numbers are of two types and no other: true and false are none, though Python counts with them."""
    return type(value) is int or type(value) is float


def invalid(param: str, why: str) -> UsageError:
    """The error for a value that a parameter can't have."""
    return UsageError("parameter.invalid", f"{param!r:.80} {why}", param=param)


def forbidden(param: str, why: str = "is not for callers of this gateway") -> UsageError:
    """The error for what no policy allows."""
    return UsageError("parameter.forbidden", f"the parameter {param!r:.80} {why}", param=param)


# -- fields ----------------------------------------------------------------------------------------------------------

Take = Callable[[Asked, Any], None]


def _number(name: str, least: float, most: float, *, above: bool = False) -> Take:
    steers = name.endswith("penalty")  # moves the logits of chosen tokens by a chosen amount

    def take(asked: Asked, value: Any) -> None:
        if not is_number(value) or not least <= value <= most or (above and value == least):
            raise invalid(name, f"is not a number {'above' if above else 'from'} {least:g} to {most:g}")
        asked.upstream[name] = value
        if steers and value:
            asked.steers = asked.steers or name

    return take


def _whole(name: str, value: Any, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        raise invalid(name, f"is not a whole number from {least} to {most}")
    return value


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise invalid(name, "is neither true nor false")
    return value


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise invalid(name, "is not a text")
    return value


def _model(asked: Asked, value: Any) -> None:
    if not _may_name(_text("model", value)):
        raise invalid("model", "is not NAME or NAME@N")
    asked.model = value


@lru_cache(4096)
def _may_name(text: str) -> bool:
    try:
        Ref.parse(text)
    except UsageError:
        return False
    return True


def _most(name: str) -> Take:
    def take(asked: Asked, value: Any) -> None:
        given = _whole(name, value, 1, 1 << 20)
        if asked.most is not None and asked.most != given:
            raise invalid(name, "is another number than the other of max_tokens and max_completion_tokens")
        asked.most = given

    return take


def _messages(asked: Asked, value: Any) -> None:
    if not isinstance(value, list) or not 1 <= len(value) <= _MESSAGES:
        raise invalid("messages", f"is not a list of 1 to {_MESSAGES}")
    made, texts = [], asked.texts
    for each in value:
        try:
            role, content = each["role"], each["content"]
        except (KeyError, TypeError):
            raise invalid("messages", "has a member that is not {role, content}") from None
        if len(each) > 2 and each.keys() != _NAMED:
            raise invalid("messages", "has a member that is not {role, content}")
        if role not in _ROLES:
            raise invalid("messages", f"has a role that is not one of {', '.join(_ROLES)}")
        if isinstance(content, list):
            content = "".join([_part(part) for part in content])
        elif not isinstance(content, str):
            raise invalid("messages", "is not a text")
        texts.append(content)
        message = {"role": role, "content": content}
        if len(each) > 2 and each["name"] is not None:
            name = _text("messages", each["name"])
            if not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", name, re.ASCII):
                raise invalid("messages", "has a name that is not 1 to 64 letters and digits")
            message["name"] = name
        made.append(message)
    asked.upstream["messages"] = made


def _part(part: Any) -> str:
    if not isinstance(part, dict) or part.keys() != {"type", "text"} or part["type"] != "text":
        raise invalid("messages", 'has a part that is not {"type": "text", "text": …}: this gateway takes text only')
    return _text("messages", part["text"])


def _prompt(asked: Asked, value: Any) -> None:
    asked.upstream["prompt"] = _text("prompt", value)  # lists of token numbers would pass by every check of texts
    asked.texts.append(value)


def _input(asked: Asked, value: Any) -> None:
    given = value if isinstance(value, list) else [value]
    if not 1 <= len(given) <= _INPUTS:
        raise invalid("input", f"is not a text or a list of 1 to {_INPUTS}")
    asked.texts += [_text("input", each) for each in given]
    asked.inputs = len(given)
    asked.actions.append("infer_embeddings")
    asked.upstream["input"] = given


def _stop(asked: Asked, value: Any) -> None:
    given = value if isinstance(value, list) else [value]
    if not 1 <= len(given) <= 4 or not all(isinstance(each, str) and 1 <= len(each) <= 64 for each in given):
        raise invalid("stop", "is not a text, or a list of 1 to 4, each of 1 to 64 characters")
    asked.texts += given
    asked.upstream["stop"] = given


def _stream(asked: Asked, value: Any) -> None:
    asked.stream = _flag("stream", value)


def _stream_options(asked: Asked, value: Any) -> None:
    if not isinstance(value, dict) or not value.keys() <= {"include_usage", "include_obfuscation"}:
        raise invalid("stream_options", "is not {include_usage}")
    asked.include_usage = _flag("stream_options", value.get("include_usage", False))


def _several(asked: Asked, value: Any) -> None:
    asked.n = _whole("n", value, 1, 8)
    if asked.n > 1:
        asked.upstream["n"] = asked.n
        asked.actions.append("infer_many")


def _logprobs_chat(asked: Asked, value: Any) -> None:
    if _flag("logprobs", value):
        asked.logprobs = asked.logprobs or 0


def _top_logprobs(asked: Asked, value: Any) -> None:
    asked.logprobs = _whole("top_logprobs", value, 0, _LOGPROBS)


def _logprobs_text(asked: Asked, value: Any) -> None:
    asked.logprobs = _whole("logprobs", value, 0, _LOGPROBS)


def _logit_bias(asked: Asked, value: Any) -> None:
    if not isinstance(value, dict) or len(value) > 64:
        raise invalid("logit_bias", "is not an object of at most 64 tokens")
    made = {}
    for token, bias in value.items():
        if not re.fullmatch("[0-9]{1,7}", token, re.ASCII):
            raise invalid("logit_bias", "has a name that is not a token's number")
        if not is_number(bias) or not -100 <= bias <= 100:
            raise invalid("logit_bias", "has a bias that is not from -100 to 100")
        made[str(int(token))] = bias
    if made:
        asked.upstream["logit_bias"] = made
        asked.actions.append("infer_steering")
        asked.steers = asked.steers or "logit_bias"


def _response_format(asked: Asked, value: Any) -> None:  # noqa: ARG001 - what is allowed changes nothing
    if value != {"type": "text"}:
        raise forbidden("response_format", "of any type but text steers what is generated, and is not for callers")


def _dimensions(asked: Asked, value: Any) -> None:
    asked.dimensions = _whole("dimensions", value, 1, 256)


def _encoding_format(asked: Asked, value: Any) -> None:
    if value not in ("float", "base64"):
        raise invalid("encoding_format", "is neither float nor base64")
    asked.base64 = value == "base64"


def _seed(asked: Asked, value: Any) -> None:  # noqa: ARG001 - the gateway draws seeds itself
    _whole("seed", value, -(1 << 63), (1 << 63) - 1)


def _over(name: str, allowed: Callable[[Any], bool]) -> Take:
    """What clients send and nobody needs: looked at, and left out."""

    def take(asked: Asked, value: Any) -> None:  # noqa: ARG001 - left out
        if not allowed(value) or len(json.dumps(value)) > _PASSED_OVER:
            raise invalid(name, "is not a value that is taken here")

    return take


def _strings(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(each, str) for each in value.values())


_USER = _over("user", lambda value: isinstance(value, str))
_ALWAYS: Mapping[str, Take] = {
    "model": _model,
    "max_tokens": _most("max_tokens"),
    "temperature": _number("temperature", 0, 2),
    "top_p": _number("top_p", 0, 1, above=True),
    "presence_penalty": _number("presence_penalty", -2, 2),
    "frequency_penalty": _number("frequency_penalty", -2, 2),
    "stop": _stop,
    "seed": _seed,
    "stream": _stream,
    "stream_options": _stream_options,
    "user": _USER,
    "metadata": _over("metadata", _strings),
    "store": _over("store", lambda value: value is False),
    "service_tier": _over("service_tier", lambda value: value in ("auto", "default")),
    "n": _several,
    "logit_bias": _logit_bias,
}
_TABLES: Mapping[str, Mapping[str, Take]] = {
    "chat": {
        **_ALWAYS,
        "messages": _messages,
        "max_completion_tokens": _most("max_completion_tokens"),
        "logprobs": _logprobs_chat,
        "top_logprobs": _top_logprobs,
        "response_format": _response_format,
    },
    "completions": {**_ALWAYS, "prompt": _prompt, "logprobs": _logprobs_text},
    "embeddings": {
        "model": _model,
        "input": _input,
        "dimensions": _dimensions,
        "encoding_format": _encoding_format,
        "user": _USER,
    },
}
_REQUIRED = {"chat": "messages", "completions": "prompt", "embeddings": "input"}
