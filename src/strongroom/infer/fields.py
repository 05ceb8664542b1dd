"""What a body asks for: OpenAI's fields, and those of servers inside a boundary (vLLM's names where it has one).

Not the gateway's reader, gateway/request.py, though both read the same names: that one lets nothing through that is not
in its tables, and gives out a body; this one trusts who asks, takes tokens and what steers them, and gives out jobs.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from strongroom.errors import UsageError
from strongroom.infer.engine import Ask
from strongroom.infer.sampling import Sampling
from strongroom.infer.text import Prompts

MOST_CHOICES = 4096
_ALL_SEEDS = 1 << 64


@dataclass(frozen=True)
class Wanted:
    """A request for text, `asks` one for each prompt, and how its answer is to be written."""

    chat: bool
    asks: list[Ask]
    prompts: list[str | None]  # as it was sent, for an echo
    stops: list[str]
    stream: bool
    usage: bool  # of a stream: an event with the usage at its end
    echo: bool
    numbered: bool  # tokens as token_id:N
    token_ids: bool
    record: bool


class Fields:
    """The members of a body, each taken once and of its type; UsageError ``infer.field``."""

    def __init__(self, body: dict[str, Any]) -> None:
        self._body = body

    def number(self, name: str, default: float, low: float, high: float) -> float:
        value = self._body.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise _wrong(name, f"a number from {low} to {high}")
        return float(value)

    def whole(self, name: str, default: int, low: int, high: int) -> int:
        value = self._body.get(name)
        if value is None:
            return default
        if type(value) is not int or not low <= value <= high:
            raise _wrong(name, f"a whole number from {low} to {high}")
        return value

    def optional(self, name: str, low: int, high: int) -> int | None:
        return None if self._body.get(name) is None else self.whole(name, 0, low, high)

    def flag(self, name: str) -> bool:
        value = self._body.get(name)
        if value is not None and type(value) is not bool:
            raise _wrong(name, "true or false")
        return bool(value)

    def tokens(self, name: str) -> tuple[int, ...] | None:
        value = self._body.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or not all(type(each) is int for each in value):
            raise _wrong(name, "a list of tokens' numbers")
        return tuple(value)

    def texts(self, name: str) -> list[str]:
        value = self._body.get(name)
        if value is None:
            return []
        found = [value] if isinstance(value, str) else value
        if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
            raise _wrong(name, "a text or a list of texts")
        return found

    def __getitem__(self, name: str) -> Any:
        return self._body.get(name)


def _wrong(name: str, expected: str) -> UsageError:
    return UsageError("infer.field", f"{name} is to be {expected}", param=name)


class Reader:
    """Makes `Wanted` of bodies, for a model of `words` tokens and `longest` positions."""

    def __init__(self, prompts: Prompts | None, words: int, longest: int, *, most: int, stops: frozenset[int]) -> None:
        self._prompts, self._words, self._longest, self._most, self._ends = prompts, words, longest, most, stops

    def chat(self, body: dict[str, Any], *, private: bool) -> Wanted:
        fields = Fields(body)
        messages = fields["messages"]
        if not isinstance(messages, list) or not messages or not all(_is_message(each) for each in messages):
            raise _wrong("messages", "a list of role and content")
        prompt = tuple(self._maker().chat([{**each, "content": _content(each["content"])} for each in messages]))
        top = None
        if fields.flag("logprobs"):
            top = fields.whole("top_logprobs", 0, 0, self._words)
        default = min(self._most, max(1, self._longest - len(prompt)))
        most = fields.optional("max_completion_tokens", 1, self._longest)
        most = fields.whole("max_tokens", default, 1, self._longest) if most is None else most
        return self._wanted(fields, [prompt], [None], top, most, private=private, chat=True)

    def completion(self, body: dict[str, Any], *, private: bool) -> Wanted:
        fields = Fields(body)
        prompts, texts = self._given(fields["prompt"])
        most = fields.whole("max_tokens", 16, 0, self._longest)
        top = fields.optional("logprobs", 0, self._words)
        return self._wanted(fields, prompts, texts, top, most, private=private, chat=False)

    def inputs(self, body: dict[str, Any]) -> list[tuple[int, ...]]:
        """What embeddings are wanted of."""
        return self._given(body.get("input"))[0]

    def check_inputs(self, prompts: Sequence[tuple[int, ...]]) -> None:
        """UsageError unless the model can read each at once."""
        for prompt in prompts:
            if not 0 < len(prompt) <= self._longest or not 0 <= min(prompt) <= max(prompt) < self._words:
                raise _wrong("input", f"1 to {self._longest} tokens of numbers below {self._words}")

    def check_output(self, wanted: Wanted, output: Sequence[int]) -> None:
        """UsageError unless these can be the tokens of an answer to what was `wanted`: of one prompt, and no more than
        the model can read."""
        if len(wanted.asks) != 1 or not output:
            raise _wrong("tokens", "those of the answer to one prompt")
        self.check_inputs([(*wanted.asks[0].prompt, *output)])

    def _given(self, value: Any) -> tuple[list[tuple[int, ...]], list[str | None]]:
        """A text, a list of numbers, or a list of either: as tokens, and as text where it was one."""
        many = value if isinstance(value, list) and value and not isinstance(value[0], int) else [value]
        if all(isinstance(each, str) for each in many):
            return [tuple(each) for each in self._maker().text(many)], list(many)
        for each in many:
            if not isinstance(each, list) or not each or not all(type(token) is int for token in each):
                raise _wrong("prompt or input", "a text, a list of tokens' numbers, or a list of these")
        return [tuple(each) for each in many], [None] * len(many)

    def _maker(self) -> Prompts:
        if self._prompts is None:
            raise UsageError(
                "infer.no_tokenizer", "this version has no tokenizer.json", hint="send tokens' numbers as the prompt"
            )
        return self._prompts

    def _wanted(
        self,
        fields: Fields,
        prompts: Sequence[tuple[int, ...]],
        texts: list[str | None],
        top: int | None,
        most: int,
        *,
        private: bool,
        chat: bool,
    ) -> Wanted:
        told = fields["strongroom"] if private else None
        if told is not None and not isinstance(told, dict):
            raise _wrong("strongroom", "an object with seed and record")
        ours = Fields(told or {})
        seed = fields.whole("seed", secrets.randbits(64), -(1 << 63), _ALL_SEEDS - 1)
        seed = ours.whole("seed", seed % _ALL_SEEDS, 0, _ALL_SEEDS - 1)
        echo, record = fields.flag("echo"), ours.flag("record")
        prompt_top = fields.optional("prompt_logprobs", 0, self._words)
        if echo and prompt_top is None and top is not None:
            prompt_top = top
        mode = fields["logprobs_mode"] or "raw_logprobs"
        if mode not in ("raw_logprobs", "processed_logprobs"):
            raise _wrong("logprobs_mode", "raw_logprobs or processed_logprobs")
        extra = frozenset(fields.tokens("stop_token_ids") or ())
        choices = fields.whole("n", 1, 1, MOST_CHOICES)
        ask = Ask(
            prompt=(0,),
            sampling=self._sampling(fields, seed),
            most=most,
            stops=extra if fields.flag("ignore_eos") else extra | self._ends,
            least=fields.whole("min_tokens", 0, 0, self._longest),
            choices=choices,
            top=top,
            processed=mode == "processed_logprobs",
            prompt_top=prompt_top,
            record=record,
        )
        asks = [
            replace(ask, prompt=prompt, sampling=replace(ask.sampling, seed=(seed + number * choices) % _ALL_SEEDS))
            for number, prompt in enumerate(prompts)
        ]
        options = Fields(fields["stream_options"] or {})
        return Wanted(
            chat=chat,
            asks=asks,
            prompts=texts,
            stops=fields.texts("stop"),
            stream=fields.flag("stream"),
            usage=options.flag("include_usage"),
            echo=echo,
            numbered=fields.flag("return_tokens_as_token_ids"),
            token_ids=fields.flag("return_token_ids"),
            record=record,
        )

    def _sampling(self, fields: Fields, seed: int) -> Sampling:
        bias = fields["logit_bias"] or {}
        try:
            biases = {int(token): float(value) for token, value in bias.items()}
        except (AttributeError, TypeError, ValueError):
            raise _wrong("logit_bias", "an object of tokens' numbers and biases") from None
        if not all(-1e4 <= value <= 1e4 for value in biases.values()):
            raise _wrong("logit_bias", "biases from -10000 to 10000")
        banned = set(fields.tokens("banned_token_ids") or ())
        words = fields.texts("bad_words")
        if words:
            for word, ids in zip(words, self._maker().text(words, special=False), strict=True):
                if len(ids) != 1:
                    raise UsageError("infer.field", f"bad_words: {word!r:.40} is not one token", param="bad_words")
                banned.update(ids)
        return Sampling(
            temperature=fields.number("temperature", 1.0, 0.0, 100.0),
            top_p=fields.number("top_p", 1.0, 1e-9, 1.0),
            presence_penalty=fields.number("presence_penalty", 0.0, -2.0, 2.0),
            frequency_penalty=fields.number("frequency_penalty", 0.0, -2.0, 2.0),
            seed=seed,
            bias=biases,
            allowed=fields.tokens("allowed_token_ids"),
            banned=tuple(sorted(banned)),
        )


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and "content" in value


def _content(value: Any) -> str:
    if isinstance(value, str):
        return value
    parts: list[str] = []
    for part in value if isinstance(value, list) else [None]:
        text: Callable[[str], Any] | None = part.get if isinstance(part, dict) else None
        if text is None or text("type") != "text" or not isinstance(text("text"), str):
            raise _wrong("messages", "messages whose content is text")
        parts.append(text("text"))
    return "".join(parts)
