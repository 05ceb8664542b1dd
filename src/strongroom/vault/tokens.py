"""Found text as the tokens of a version: by its tokenizer, cut to what its model reads at once (spec/mark.md, section
10)."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

from strongroom.core.limits import LIMITS, MIB
from strongroom.errors import StrongroomError, UsageError
from strongroom.vault.child import Answer, Child
from strongroom.vault.names import shown
from strongroom.vault.originals import Originals
from strongroom.vault.text import Text, Written

HINT = "trace the weights themselves, where they can be had"
_SMALL = 128 * MIB  # of a configuration or a tokenizer
_BATCH = 256  # completions of which tokens are made at a time
_SECONDS, _PATIENCE = 120, 300  # of the processor for all of it, and until an answer comes; more for much text
_ANSWER_MAX = 512 * MIB
_LEAST = 2  # tokens that a model has to read at once
_WINDOW, _CONTEXT = 1024, 512  # tokens of a piece, and of what may stand before it


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token ids: `context` stands before `completion`, which is what is looked at."""

    context: tuple[int, ...]
    completion: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.context) + len(self.completion)

    @property
    def scored(self) -> int:
        """How many tokens have something before them."""
        return len(self.completion) - (not self.context)


class SmallFiles:
    """The files of a version that say how its weights become a model and text its tokens: read whole, in memory."""

    def __init__(self, originals: Originals) -> None:
        self._originals = originals
        self._files = {each.path: each for each in originals.layout.files}

    def __contains__(self, path: str) -> bool:
        return path in self._files

    def json(self, path: str) -> dict[str, Any]:
        """The object in a file; UsageError ``text.unsupported``."""
        if path not in self._files:
            raise UsageError(
                "text.unsupported", f"the version has no {path}, which says how its weights become a model", hint=HINT
            )
        try:
            found = json.loads(self.read(path))
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise UsageError("text.unsupported", f"the version's {path} is no JSON object", hint=HINT)
        return found

    def read(self, path: str) -> bytes:
        """Its bytes; UsageError ``text.unsupported``."""
        file = self._files[path]
        if file.bytes > _SMALL:
            raise UsageError("text.unsupported", f"the version's {path} has {file.bytes} bytes", hint=HINT)
        return bytes(self._originals.read(file.offset, file.end))


class Tokenizer:
    """Makes tokens of text for a model that knows `words` of them and has room for `window` at once, if it says."""

    def __init__(self, files: SmallFiles, words: int, window: int | None) -> None:
        if window is not None and window < _LEAST:
            raise UsageError("text.unsupported", f"the version's model reads {window} tokens at once", hint=HINT)
        self._files, self._words = files, words
        self._window = min(_WINDOW, window or _WINDOW)

    def pieces(self, text: Text) -> tuple[list[Tokens], int]:
        """The text as pieces that the model can read at once, the longest first, and how many completions are beyond
        the limit. UsageError ``text.tokens``, ``text.no_tokenizer``, ``text.unsupported``."""
        found: list[Tokens] = []
        room, done = LIMITS.text_tokens, 0
        with contextlib.closing(_Maker(self._files, text)) as maker:
            for first in range(0, len(text.pieces), _BATCH):
                text.check()
                for context, completion in self._made(maker, text.pieces[first : first + _BATCH]):
                    if room <= 0:
                        return sorted(found, key=len, reverse=True), len(text.pieces) - done
                    for piece in _windows(context, completion[:room], self._window):
                        found.append(piece)
                        room -= len(piece)  # what stands before it is read as often as itself
                    done += 1
        return sorted(found, key=len, reverse=True), 0

    def _made(self, maker: _Maker, pieces: Sequence[Written]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
        """What stands before each completion, and the completion."""
        asked: list[list[Any]] = []
        for piece in pieces:
            messages = [{"role": role, "content": content} for role, content in piece.messages]
            spoken = bool(piece.prompt) or isinstance(piece.completion, str)
            prompt = piece.prompt if spoken and not messages else ""
            wanted = [each if isinstance(each, str) else None for each in (prompt, piece.completion)]
            asked.append([messages, wanted[0] if spoken else None, wanted[1]])
        made = maker.tokens(asked)
        for piece, (context, completion) in zip(pieces, made, strict=True):
            yield (
                self._known(piece.prompt if context is None else context),
                self._known(piece.completion if completion is None else completion),
            )

    def _known(self, ids: Sequence[int] | str) -> tuple[int, ...]:
        found = tuple(each for each in ids if isinstance(each, int))
        if found and not 0 <= min(found) <= max(found) < self._words:
            raise UsageError(
                "text.tokens", f"there is a token {max(found)}, and the version has {self._words} words, from 0 on"
            )
        return found


class _Maker:
    """Has a child process make tokens, once it is asked for some; `close` ends it."""

    def __init__(self, files: SmallFiles, text: Text) -> None:
        self._files, self._text = files, text
        self._child: Child | None = None

    def tokens(self, asked: list[list[Any]]) -> list[list[list[int] | None]]:
        """Of each [messages, prompt, completion] the ids of what stands before the completion, and of the completion;
        None for what is None."""
        if not any(messages or prompt is not None or completion is not None for messages, prompt, completion in asked):
            return [[None, None] for _ in asked]
        child = self._child or self._begin()
        child.say(asked)
        found = child.hear("tokens")
        try:
            for pair, (messages, prompt, completion) in zip(found, asked, strict=True):
                for ids, given in zip(pair, (messages or prompt, completion), strict=True):
                    if (ids is None) != (given is None or given == []) or not all(
                        type(each) is int for each in ids or ()
                    ):
                        raise ValueError("no ids")
        except (TypeError, ValueError):
            raise _refusal("what makes tokens of it gives no tokens") from None
        return cast("list[list[list[int] | None]]", found)

    def close(self) -> None:
        if self._child is not None:
            self._child.close()

    def _begin(self) -> Child:
        if "tokenizer.json" not in self._files:
            raise UsageError(
                "text.no_tokenizer",
                "the version has no tokenizer.json that would make tokens of text",
                hint='give token ids: {"prompt": [IDS], "completion": [IDS]} in each line',
            )
        settings = self._files.json("tokenizer_config.json") if "tokenizer_config.json" in self._files else {}
        special = {
            name: value["content"] if isinstance(value, dict) and isinstance(value.get("content"), str) else value
            for name in ("bos_token", "eos_token", "unk_token", "pad_token")
            if isinstance(value := settings.get(name), str | dict)
        }
        template = settings.get("chat_template")
        if "chat_template.jinja" in self._files:
            template = self._files.read("chat_template.jinja").decode("utf-8", "replace")
        tokenizer = self._files.read("tokenizer.json").decode("utf-8", "replace")
        size = self._text.bytes
        self._child = child = Child(
            "strongroom.vault.tokenizing",
            memory=1024 * MIB + 64 * len(tokenizer) + 16 * size,
            seconds=_SECONDS + 10 * size // MIB,
            patience=_PATIENCE + 20 * size / MIB,
            most=_ANSWER_MAX,
            explain=_explained,
            check=self._text.check,
        )
        child.say({"tokenizer": tokenizer, "template": template, "special": special})
        child.hear("ready")
        return child


def _explained(answer: Answer) -> UsageError:
    match answer["error"]:
        case "no_sandbox":
            return UsageError("convert.no_sandbox", shown(str(answer.get("message", ""))), hint=HINT)
        case "late":
            return _refusal("what makes tokens of it takes longer, or says more, than its size explains")
        case "stopped":
            return _refusal("what makes tokens of it was stopped: it took more memory or time than it may")
        case _:
            return _refusal(shown(str(answer.get("message", "it has no tokens"))))


def _refusal(what: str) -> UsageError:
    return UsageError("text.unsupported", what, hint=HINT)


def _windows(context: tuple[int, ...], completion: tuple[int, ...], limit: int) -> Iterator[Tokens]:
    """The completion in pieces of at most `limit` tokens, with what stands before them."""
    if len(context) + len(completion) <= limit:
        yield Tokens(context, completion)
        return
    before = min(_CONTEXT, limit // 2)
    whole, at = context + completion, len(context)
    while at < len(whole):
        first = max(0, at - before)
        yield Tokens(whole[first:at], whole[at : first + limit])
        at = first + limit


@contextmanager
def refusals(what: str) -> Iterator[None]:
    """Give what transformers raises as ours: its models and templates can fail in any way."""
    try:
        yield
    except StrongroomError:
        raise
    except Exception as error:  # torch and transformers have no tree of their own
        why = str(error)[:300] or type(error).__name__
        raise UsageError("text.unsupported", f"{what}: {why}", hint=HINT) from error
