"""Answers in OpenAI's shape, whole or as events of a stream."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Any

import orjson

from strongroom.infer.engine import PromptLogprobs, Token, Top
from strongroom.infer.fields import Wanted
from strongroom.infer.text import Growing, Spelling

DONE = b"data: [DONE]\n\n"


class Choice:
    """One answer while it grows."""

    def __init__(self, index: int, wanted: Wanted, spelling: Spelling, prompt: int) -> None:
        self.index, self.prompt = index, prompt
        self._wanted, self._spelling = wanted, spelling
        self._growing = Growing(spelling, wanted.stops)
        self.finish: str | None = None
        self.count = 0
        self._echo = wanted.echo
        self._fresh: dict[str, Any] = {}
        self._said = False
        self._clear()

    def _clear(self) -> None:
        self._text = ""
        self._tokens: list[int] = []
        self._own: list[float | None] = []
        self._words: list[str] = []
        self._logprobs: list[float | None] = []
        self._tops: list[Top | None] = []

    def begin(self, heard: PromptLogprobs | None) -> None:
        """What comes of the prompt itself, once it is known."""
        ask = self._wanted.asks[self.prompt]
        if self._echo:
            given = self._wanted.prompts[self.prompt]
            self._text += given if given is not None else self._spelling.text(ask.prompt)
            if heard is not None and ask.top is not None:
                self._words += [self._word(token) for token in ask.prompt]
                self._logprobs += [None, *heard.logprobs]
                self._tops += [None, *heard.tops]
        elif heard is not None:
            self._fresh["prompt_logprobs"] = [None, *map(self._by_number, heard.tops, heard.logprobs, ask.prompt[1:])]
        if self._wanted.token_ids:
            self._fresh["prompt_token_ids"] = list(ask.prompt)

    def add(self, heard: Token) -> bool:
        """Take a token in; whether the answer is complete, which texts that stop it say earlier than the engine."""
        if self.finish is not None:
            return True
        if heard.token >= 0:
            self.count += 1
            self._tokens.append(heard.token)
            self._own.append(heard.own)
            if heard.logprob is not None:
                self._words.append(self._word(heard.token))
                self._logprobs.append(heard.logprob)
                self._tops.append(heard.top)
        spoken = -1 if heard.finish == "stop" else heard.token
        self._text += self._growing.add(spoken, last=heard.finish is not None)
        self.finish = "stop" if self._growing.stopped else heard.finish
        return self.finish is not None

    def piece(self, *, stream: bool) -> dict[str, Any] | None:
        """What is new, as a member of `choices`; None if there is nothing to say yet."""
        silent = not self._text and self.finish is None
        if stream and self._said and silent and not self._wanted.record and not self._words:
            return None
        found: dict[str, Any] = {"index": self.index, **self._fresh, "finish_reason": self.finish}
        if not self._wanted.chat:
            found["text"] = self._text
        elif stream:
            found["delta"] = {"content": self._text} if self._said else {"role": "assistant", "content": self._text}
        else:
            found["message"] = {"role": "assistant", "content": self._text, "refusal": None}
        found["logprobs"] = self._told()
        if self._wanted.token_ids:
            found["token_ids"] = self._tokens
        if self._wanted.record:
            found["strongroom"] = {"tokens": self._tokens, "logprobs": self._own}
        self._said, self._fresh = True, {}
        self._clear()
        return found

    def _told(self) -> dict[str, Any] | None:
        if self._wanted.asks[self.prompt].top is None:
            return None
        if self._wanted.chat:
            rows = zip(self._words, self._logprobs, self._tops, strict=True)
            return {
                "content": [{**_entry(word, value), "top_logprobs": self._entries(top)} for word, value, top in rows]
            }
        offsets, at = [], 0
        for word in self._words:
            offsets.append(at)
            at += len(word)
        tops = [
            None if top is None else dict(zip(self._names(top), top.logprobs.tolist(), strict=True))
            for top in self._tops
        ]
        return {"tokens": self._words, "token_logprobs": self._logprobs, "top_logprobs": tops, "text_offset": offsets}

    def _entries(self, top: Top | None) -> list[dict[str, Any]]:
        if top is None:
            return []
        return [_entry(word, value) for word, value in zip(self._names(top), top.logprobs.tolist(), strict=True)]

    def _names(self, top: Top) -> list[str]:
        if self._wanted.numbered:
            named = self._spelling.numbered()
            return named if len(named) == len(top.tokens) else [named[token] for token in top.tokens.tolist()]
        return [self._spelling.word(token) for token in top.tokens.tolist()]

    def _by_number(self, top: Top, own: float, token: int) -> dict[str, Any]:
        found = dict(zip(map(str, top.tokens.tolist()), top.logprobs.tolist(), strict=True))
        found[str(token)] = own
        return {number: {"logprob": value} for number, value in found.items()}

    def _word(self, token: int) -> str:
        return f"token_id:{token}" if self._wanted.numbered else self._spelling.word(token)


def _entry(word: str, value: float | None) -> dict[str, Any]:
    return {"token": word, "logprob": value, "bytes": list(word.encode())}


def spelled(wanted: Wanted, spelling: Spelling, output: Sequence[int]) -> str:
    """The text that an answer of these tokens has, as it is given out while it grows."""
    growing, text = Growing(spelling, wanted.stops), ""
    for place, token in enumerate(output, 1):
        last = place == len(output)
        text += growing.add(-1 if last and token in wanted.asks[0].stops else token, last=last)
        if growing.stopped:
            break
    return text


class Answer:
    """All choices of a request."""

    def __init__(self, model: str, wanted: Wanted, spelling: Spelling) -> None:
        self._wanted = wanted
        kind = "chat.completion" if wanted.chat else "text_completion"
        prefix = "chatcmpl-" if wanted.chat else "cmpl-"
        self._head = {"id": prefix + secrets.token_hex(12), "created": int(time.time()), "model": model}
        self._kind = kind
        each = wanted.asks[0].choices
        self.choices = [Choice(number, wanted, spelling, number // each) for number in range(each * len(wanted.asks))]

    def of(self, prompt: int, choice: int) -> Choice:
        return self.choices[prompt * self._wanted.asks[0].choices + choice]

    @property
    def complete(self) -> bool:
        return all(choice.finish is not None for choice in self.choices)

    def whole(self) -> bytes:
        pieces = [choice.piece(stream=False) for choice in self.choices]
        return orjson.dumps({**self._head, "object": self._kind, "choices": pieces, "usage": self._usage()})

    def event(self, choice: Choice) -> bytes:
        """What is new of a choice as an event; empty if nothing is."""
        piece = choice.piece(stream=True)
        if piece is None:
            return b""
        more = {"usage": None} if self._wanted.usage else {}
        return self._event({"choices": [piece], **more})

    def ending(self) -> Iterator[bytes]:
        if self._wanted.usage:
            yield self._event({"choices": [], "usage": self._usage()})
        yield DONE

    # As gateway/answer.py has it, in one line; sharing that would need the gateway's extra where only infer's is.
    def _event(self, value: dict[str, Any]) -> bytes:
        kind = self._kind + ".chunk" if self._wanted.chat else self._kind
        return b"data: " + orjson.dumps({**self._head, "object": kind, **value}) + b"\n\n"

    def _usage(self) -> dict[str, int]:
        prompt = sum(len(ask.prompt) for ask in self._wanted.asks)
        made = sum(choice.count for choice in self.choices)
        return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}
