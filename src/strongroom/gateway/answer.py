"""What upstream answers, read as if it were hostile, and made anew (spec/gateway.md, section 4)."""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import orjson

from strongroom.errors import BackendError
from strongroom.gateway.request import Asked, is_number

_LINE_MOST = 1 << 20  # bytes of one event
_USAGE_MOST = 1 << 40  # tokens
_FINISHED = ("stop", "length", "content_filter")
BYTES_A_TOKEN = 16  # what says that it is fewer tokens than this many bytes each is not believed
_PROMPT_MORE = (1024, 64)  # tokens that a template adds at most to a prompt, and to each of its texts
TOKEN_BYTES = 128  # no token that is given out with its log-probability is longer
_LEAST = -9999.0  # of a log-probability: what is less is as good as never
DONE = b"data: [DONE]\n\n"
_PIECE = b'{"index":%d,"delta":{"content":%b},"finish_reason":null}'  # the text as JSON, in quotes
_TEXT_PIECE = b'{"index":%d,"text":%b,"finish_reason":null}'
_KINDS = {  # of answers, by whether they are chat, and whether they are streams
    (True, True): ("chatcmpl-", "chat.completion.chunk"),
    (True, False): ("chatcmpl-", "chat.completion"),
    (False, True): ("cmpl-", "text_completion"),
    (False, False): ("cmpl-", "text_completion"),
}


@dataclass(slots=True)
class Meter:
    """What an answer has given out so far."""

    text_bytes: int = 0
    chunks: int = 0  # pieces that had text
    channel: int = 0  # tokens, by the private channel
    listed: int = 0  # tokens whose log-probabilities were given out
    named: int = 0  # bytes of the tokens that these name
    channelled: bool = False
    reported: int | None = None  # tokens, by upstream's word
    prompt: int = 0
    estimate: float = 0.0  # −Σ log2 q, by the private channel
    sampled: dict[int, list[int]] = field(default_factory=dict)  # of each choice, by the private channel
    text: dict[int, list[str]] | None = None  # what was given out of each, where it is looked at again
    most: int = _USAGE_MOST  # tokens that may be given out: what says that it has more is not
    text_most: int = _USAGE_MOST  # bytes of text, in the same way

    def tokens(self) -> tuple[int, bool]:
        """How many tokens were given out, and whether they were counted: False where 8 bits a byte are charged."""
        # Of both words the server is the author: on the channel, too, one could send much and count little.
        least = self.chunks if self.chunks > self.listed else self.listed  # noqa: FURB136 - asked several times an answer
        text = self.text_bytes if self.text_bytes < self.text_most else self.text_most  # noqa: FURB136 - see `given`
        said = self.channel if self.channelled else self.reported
        if said is not None and said * BYTES_A_TOKEN >= text:
            said = said if said > least else least  # noqa: FURB136
            # A server that says 2^40 would use up everybody's budgets with one answer, which nobody gets.
            return (said if said < self.most else self.most), True  # noqa: FURB136
        return max(min(least, self.most), -(-text // 3)), False

    @property
    def given(self) -> int:
        """Bytes of text that were given out, or could be: an answer that has more is given to nobody."""
        return self.text_bytes if self.text_bytes < self.text_most else self.text_most  # noqa: FURB136


class Shape:
    """Answers to one request: `whole` from one body, `piece` from each event of a stream."""

    __slots__ = ("_asked", "_begin", "_begun", "_chat", "_common", "_finished", "meter")

    def __init__(self, asked: Asked, identifier: str, model: str, created: int, meter: Meter | None = None) -> None:
        self._asked = asked
        self._chat = asked.route == "chat"
        prefix, kind = _KINDS[self._chat, asked.stream]
        self._common = {"id": prefix + identifier, "object": kind, "created": created, "model": model}
        self.meter = meter or Meter()
        if asked.stream:
            # JSON has no line breaks, so no text of a model begins an event of its own.
            self._begin = b"data: " + orjson.dumps(self._common)[:-1] + b',"choices":['
            self._finished: set[int] = set()
            self._begun: set[int] = set()

    # -- an answer that comes whole ------------------------------------------------------------------------------

    def whole(self, body: bytes) -> dict[str, Any]:
        """BackendError ``upstream.malformed``."""
        value = _object(body)
        given = value.get("choices")
        if not isinstance(given, list) or len(given) != self._asked.n:
            raise malformed(f"has not {self._asked.n} choices")
        self._usage(value.get("usage"))
        if len(given) > 1:
            given.sort(key=_index)
        choices = [self._choice(each, index) for index, each in enumerate(given)]
        tokens, _ = self.meter.tokens()
        return {**self._common, "choices": choices, "usage": self.usage(tokens)}

    def usage(self, tokens: int) -> dict[str, int]:
        prompt = self.meter.prompt
        return {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}

    def _choice(self, choice: Any, index: int) -> dict[str, Any]:
        if _index(choice) != index:
            raise malformed("has choices that are not numbered")
        if self._chat:
            message = choice.get("message")
            text = message.get("content", "") if isinstance(message, dict) else None
            if text is None and message:
                text = ""
        else:
            text = choice.get("text")
        if not isinstance(text, str):
            raise malformed("has a choice without a text")
        self._text(text, index)
        if "strongroom" in choice:
            self._channel(choice["strongroom"], index)
        logprobs = None if self._asked.logprobs is None else self._logprobs(choice.get("logprobs"))
        reason = choice.get("finish_reason")
        if reason not in _FINISHED:
            reason = "stop"
        if self._chat:
            message = {"role": "assistant", "content": text}
            return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    # -- a stream ------------------------------------------------------------------------------------------------

    def piece(self, event: bytes) -> bytes:
        """One event of upstream as one of ours, or nothing; BackendError ``upstream.malformed``."""
        # Written out, as is `_delta`: of a stream this is nearly all that there is to do.
        try:
            value = orjson.loads(event)
        except orjson.JSONDecodeError:
            raise malformed("is not JSON") from None
        if not isinstance(value, dict):
            raise malformed("is not an object")
        if "error" in value:
            raise malformed("is an error in the middle of a stream")
        if value.get("usage") is not None:
            self._usage(value["usage"])
        given = value.get("choices")
        if not isinstance(given, list) or len(given) > self._asked.n:
            raise malformed("has an event that is not a piece of an answer")
        if len(given) == 1:  # as nearly always
            made = self._delta(given[0])
        else:
            made = b",".join([found for each in given if (found := self._delta(each))])
        if not made:
            return b""
        return self._begin + (made if made.isascii() else _on_one_line(made)) + b"]}\n\n"

    def _delta(self, choice: Any) -> bytes:
        """One choice of a piece, or nothing."""
        asked, meter = self._asked, self.meter
        index = choice.get("index", 0) if isinstance(choice, dict) else -1
        if type(index) is not int or not 0 <= index < asked.n or index in self._finished:
            raise malformed("has a piece of an answer that nobody asked for")
        text: Any
        if self._chat:
            delta = choice.get("delta")
            text = delta.get("content") if isinstance(delta, dict) else None
        else:
            text = choice.get("text")
        if text is None:
            text = ""
        if not isinstance(text, str):
            raise malformed("has a piece that is not a text")
        reason = choice.get("finish_reason")
        if "strongroom" in choice:
            self._channel(choice["strongroom"], index)
        logprobs = None if asked.logprobs is None else self._logprobs(choice.get("logprobs"))
        if text:
            if meter.text is None and text.isascii():
                meter.text_bytes += len(text)
            else:
                self._text(text, index)
            meter.chunks += 1
        if reason is None and logprobs is None and index in self._begun:  # as nearly all are
            return (_PIECE if self._chat else _TEXT_PIECE) % (index, orjson.dumps(text)) if text else b""
        reason = _reason(reason)
        if reason:
            self._finished.add(index)
        made: dict[str, Any] = {"index": index}
        if self._chat:
            first = {} if index in self._begun else {"role": "assistant"}
            made["delta"] = {**first, "content": text} if text or first else {}
        else:
            made["text"] = text
        self._begun.add(index)
        if logprobs is not None:
            made["logprobs"] = logprobs
        made["finish_reason"] = reason
        return orjson.dumps(made)

    def end(self) -> bytes:
        """What closes a stream; BackendError ``upstream.malformed`` where upstream's has no end."""
        if len(self._finished) != self._asked.n:
            raise malformed("ends before its answer does")
        if not self._asked.include_usage:
            return DONE
        tokens, _ = self.meter.tokens()
        return self._begin + b'],"usage":%b}\n\n' % orjson.dumps(self.usage(tokens)) + DONE

    # -- parts ---------------------------------------------------------------------------------------------------

    def _text(self, text: str, index: int) -> None:
        try:
            size = len(text) if text.isascii() else len(text.encode())
        except UnicodeEncodeError:
            raise malformed("has half a character") from None
        meter = self.meter
        meter.text_bytes += size
        if meter.text is not None:
            meter.text.setdefault(index, []).append(text)

    def _usage(self, usage: Any) -> None:
        if usage is None:
            return
        if not isinstance(usage, dict):
            raise malformed("has a usage that is not counted in tokens")
        tokens, prompt = usage.get("completion_tokens"), usage.get("prompt_tokens")
        if not (_counted(tokens) and _counted(prompt)):
            raise malformed("has a usage that is not counted in tokens")
        meter = self.meter
        meter.reported, meter.prompt = tokens, _prompt(self._asked, prompt)

    def _channel(self, value: Any, index: int) -> None:
        """The private channel's part (section 7) goes into the meter and no further."""
        if value is None:
            return
        tokens = value.get("tokens") if isinstance(value, dict) else None
        logprobs = value.get("logprobs") if isinstance(value, dict) else None
        if not isinstance(tokens, list) or not isinstance(logprobs, list) or len(tokens) != len(logprobs):
            raise malformed("has a private channel without tokens")
        meter = self.meter
        for token, logprob in zip(tokens, logprobs, strict=True):
            if type(token) is not int or not is_number(logprob):
                raise malformed("has a private channel without tokens")
            # Bounded: a sum that is infinite is no number that a record could have.
            meter.estimate -= max(_LEAST, min(0.0, logprob)) / math.log(2) if math.isfinite(logprob) else 0.0
        meter.channelled = True
        meter.channel += len(tokens)
        meter.sampled.setdefault(index, []).extend(tokens)

    def _logprobs(self, value: Any) -> dict[str, Any] | None:
        most = self._asked.logprobs
        if most is None or value is None:
            return None
        if not isinstance(value, dict):
            raise malformed("has log-probabilities of another form")
        made = _of_chat(value, most) if self._chat else _of_text(value, most)
        named = made["content"] if self._chat else made["tokens"]
        if not named:  # an event for nothing would be free
            return None
        # Each is charged: a list that is longer than the answer would carry bits that nobody counts.
        self.meter.listed += len(named)
        self.meter.named += _named(made)
        return made


def _on_one_line(made: bytes) -> bytes:
    """JSON, for clients too that end lines where Unicode has them end."""
    return (
        made.replace(b"\xe2\x80\xa8", rb"\u2028").replace(b"\xe2\x80\xa9", rb"\u2029").replace(b"\xc2\x85", rb"\u0085")
    )


def _of_chat(value: dict[str, Any], most: int) -> dict[str, Any]:
    content = value.get("content")
    if not isinstance(content, list):
        raise malformed("has log-probabilities of another form")
    return {"content": [{**_likely(each), "top_logprobs": _beside(each, most)} for each in content]}


def _named(made: dict[str, Any]) -> int:
    """Bytes of all tokens that log-probabilities name."""
    if "content" in made:
        return sum(len(each["bytes"]) for row in made["content"] for each in (row, *row["top_logprobs"]))
    names = [*made["tokens"], *(token for each in made["top_logprobs"] or () for token in each)]
    return sum(len(token.encode(errors="replace")) for token in names)


def _prompt(asked: Asked, said: int) -> int:
    """Tokens of a prompt, by upstream's word as far as that can be: it goes into its caller's limits."""
    fixed, each = _PROMPT_MORE
    most = 4 * asked.characters + fixed + each * len(asked.texts)
    return said if said < most else most  # noqa: FURB136 - asked with every answer


def _beside(each: dict[str, Any], most: int) -> list[dict[str, Any]]:
    top = each.get("top_logprobs", [])
    if not isinstance(top, list):
        raise malformed("has log-probabilities of another form")
    return [_likely(other) for other in top[:most]]


def _likely(value: Any) -> dict[str, Any]:
    token = value.get("token") if isinstance(value, dict) else None
    if not isinstance(token, str) or len(token) > TOKEN_BYTES:
        raise malformed("has a log-probability of no token")
    return {"token": token, "logprob": _rounded(value.get("logprob")), "bytes": [*token.encode(errors="replace")]}


def _of_text(value: dict[str, Any], most: int) -> dict[str, Any]:
    tokens, own, top = value.get("tokens"), value.get("token_logprobs"), value.get("top_logprobs") or []
    if (
        not isinstance(tokens, list)
        or not isinstance(own, list)
        or len(tokens) != len(own)
        or not isinstance(top, list)
    ):
        raise malformed("has log-probabilities of another form")
    if not all(isinstance(each, str) and len(each) <= TOKEN_BYTES for each in tokens):
        raise malformed("has a log-probability of no token")
    beside = []
    for each in top[: len(tokens)] if most else []:
        if not isinstance(each, dict) or not all(len(token) <= TOKEN_BYTES for token in each):
            raise malformed("has log-probabilities of another form")
        likeliest = sorted(((_rounded(p), token) for token, p in each.items()), reverse=True)[:most]
        beside.append({token: p for p, token in likeliest})
    return {
        "tokens": tokens,
        "token_logprobs": [None if each is None else _rounded(each) for each in own],
        "top_logprobs": beside or None,
        "text_offset": [],
    }


def _rounded(value: Any) -> float:
    if not is_number(value) or math.isnan(value):
        raise malformed("has a log-probability that is not a number")
    return round(min(0.0, max(_LEAST, float(value))), 2)


def embeddings(asked: Asked, body: bytes, model: str, most: int) -> tuple[dict[str, Any], int]:
    """The answer, and how many numbers it gives out. Each vector is cut, normed, and rounded to 255 steps."""
    value = _object(body)
    given = value.get("data")
    if not isinstance(given, list) or len(given) != asked.inputs:
        raise malformed(f"has not {asked.inputs} embeddings")
    data, numbers = [], 0
    for index, each in enumerate(sorted(given, key=_index)):
        vector = each.get("embedding") if isinstance(each, dict) else None
        if _index(each) != index or not isinstance(vector, list) or not vector or len(vector) > 1 << 16:
            raise malformed("has no embedding")
        steps = _steps(vector[: min(asked.dimensions or most, most)])
        numbers += len(steps)
        shown: Any = [step / 127 for step in steps]
        if asked.base64:
            shown = base64.b64encode(struct.pack(f"<{len(shown)}f", *shown)).decode()
        data.append({"object": "embedding", "index": index, "embedding": shown})
    usage = value.get("usage")
    prompt = usage.get("prompt_tokens") if isinstance(usage, dict) else 0
    prompt = prompt if type(prompt) is int and 0 <= prompt <= _USAGE_MOST else 0
    prompt = _prompt(asked, prompt)
    return {
        "object": "list",
        "data": data,
        "model": model,
        "usage": {"prompt_tokens": prompt, "total_tokens": prompt},
    }, numbers


def _steps(vector: list[Any]) -> list[int]:
    if not all(is_number(x) and math.isfinite(x) for x in vector):
        raise malformed("has an embedding that is not made of numbers")
    largest = max(abs(float(x)) for x in vector) or 1.0
    return [round(127 * float(x) / largest) for x in vector]


class Events:
    """Server-sent events out of the pieces of a body, as the WHATWG has them: `data` alone; others are passed over."""

    def __init__(self) -> None:
        self._rest = bytearray()  # of a line that has not ended
        self._data: list[bytes] = []
        self._size = 0
        self.ended = False

    def feed(self, piece: bytes) -> Iterator[bytes]:
        """BackendError ``upstream.malformed``."""
        if b"\n" not in piece:  # no line ends: to look at all of it with each would take the square of its length
            self._rest += piece
            if len(self._rest) > _LINE_MOST:
                raise malformed("has an event that is too long")
            return
        data = piece
        if self._rest:
            data, self._rest = bytes(self._rest) + piece, bytearray()
        if self._data or b"\r" in data:
            yield from self._lines(data)
            return
        # As nearly all servers write them: one line for each.
        blocks = data.split(b"\n\n")
        rest = blocks.pop()
        for block in blocks:
            if len(block) > _LINE_MOST or not block.startswith(b"data: ") or b"\n" in block:
                yield from self._lines(block + b"\n\n")
            elif block == b"data: [DONE]":
                self.ended = True
            elif self.ended:
                raise malformed("goes on after its end")
            else:
                yield block[6:]
        if rest:
            yield from self._lines(rest)

    def _lines(self, data: bytes) -> Iterator[bytes]:
        lines = data.split(b"\n")
        self._rest = bytearray(lines.pop())
        if len(self._rest) > _LINE_MOST:
            raise malformed("has an event that is too long")
        for line in lines:
            if len(line) > _LINE_MOST:
                raise malformed("has an event that is too long")
            line = line.removesuffix(b"\r")  # noqa: PLW2901 - the same line
            if line:
                if line.startswith(b"data:"):
                    self._size += len(line)
                    if self._size > _LINE_MOST:
                        raise malformed("has an event that is too long")
                    self._data.append(line[5:].removeprefix(b" "))
                continue
            self._size = 0
            if self._data:
                data, self._data = b"\n".join(self._data) if len(self._data) > 1 else self._data[0], []
                if data == b"[DONE]":
                    self.ended = True
                elif self.ended:
                    raise malformed("goes on after its end")
                else:
                    yield data


def malformed(what: str) -> BackendError:
    """The error for an answer that is none."""
    return BackendError("upstream.malformed", f"the inference server's answer {what}")


def _object(body: bytes) -> dict[str, Any]:
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise malformed("is not JSON") from None
    if not isinstance(value, dict):
        raise malformed("is not an object")
    return value


def _index(choice: Any) -> int:
    index = choice.get("index", 0) if isinstance(choice, dict) else -1
    return index if type(index) is int else -1


def _counted(value: Any) -> TypeGuard[int]:
    return type(value) is int and 0 <= value <= _USAGE_MOST


def _reason(value: Any) -> str | None:
    if value is None:
        return None
    return value if value in _FINISHED else "stop"
