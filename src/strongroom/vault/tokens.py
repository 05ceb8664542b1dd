"""Found text as the tokens of a version: by its tokenizer, cut to what its model reads at once (spec/mark.md, section
10)."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from strongroom.core.limits import LIMITS, MIB
from strongroom.errors import StrongroomError, UsageError
from strongroom.vault.originals import Originals
from strongroom.vault.text import Text, Words, Written

HINT = "trace the weights themselves, where they can be had"
_SMALL = 128 * MIB  # of a configuration or a tokenizer
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
        self._files, self._words = files, words
        self._window = min(_WINDOW, window or _WINDOW)
        self._tokenizer: Any = None

    def pieces(self, text: Text) -> tuple[list[Tokens], int]:
        """The text as pieces that the model can read at once, the longest first, and how many completions are beyond
        the limit. UsageError ``text.tokens``, ``text.no_tokenizer``, ``text.unsupported``."""
        found: list[Tokens] = []
        room, limit = LIMITS.text_tokens, self._window
        for number, piece in enumerate(text.pieces):
            if room <= 0:
                return sorted(found, key=len, reverse=True), len(text.pieces) - number
            if number % 256 == 0:
                text.check()
            context, completion = self._context(piece), self._ids(piece.completion)[:room]
            room -= len(completion)
            found += _windows(context, completion, limit)
        return sorted(found, key=len, reverse=True), 0

    def _context(self, piece: Written) -> tuple[int, ...]:
        if piece.messages:
            said = [{"role": role, "content": content} for role, content in piece.messages]
            with refusals("the chat template of the version does not take these messages"):
                shown = self._own().apply_chat_template(said, tokenize=False, add_generation_prompt=True)
            return self._ids(shown)
        if piece.prompt or isinstance(piece.completion, str):
            return self._ids(piece.prompt, special=True)
        return ()

    def _ids(self, words: Words, *, special: bool = False) -> tuple[int, ...]:
        if isinstance(words, str):
            ids = self._own().backend_tokenizer.encode(words, add_special_tokens=special).ids
        else:
            ids = list(words)
        if ids and max(ids) >= self._words:
            raise UsageError(
                "text.tokens", f"there is a token {max(ids)}, and the version has {self._words} words, from 0 on"
            )
        return tuple(ids)

    def _own(self) -> Any:
        """The version's tokenizer."""
        if self._tokenizer is None:
            if "tokenizer.json" not in self._files:
                raise UsageError(
                    "text.no_tokenizer",
                    "the version has no tokenizer.json that would make tokens of text",
                    hint='give token ids: {"prompt": [IDS], "completion": [IDS]} in each line',
                )
            tokenizers: Any = importlib.import_module("tokenizers")
            transformers: Any = importlib.import_module("transformers")

            settings = self._files.json("tokenizer_config.json") if "tokenizer_config.json" in self._files else {}
            special = {
                name: value["content"] if isinstance(value, dict) else value
                for name in ("bos_token", "eos_token", "unk_token", "pad_token")
                if isinstance(value := settings.get(name), str | dict)
            }
            template = settings.get("chat_template")
            if "chat_template.jinja" in self._files:
                template = self._files.read("chat_template.jinja").decode("utf-8", "replace")
            with refusals("the version's tokenizer can't be read"):
                self._tokenizer = transformers.PreTrainedTokenizerFast(
                    tokenizer_object=tokenizers.Tokenizer.from_buffer(self._files.read("tokenizer.json")), **special
                )
                self._tokenizer.chat_template = template
                # A prompt that is cut off silently, or filled up, would not be the one that was answered.
                self._tokenizer.backend_tokenizer.no_truncation()
                self._tokenizer.backend_tokenizer.no_padding()
        return self._tokenizer


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
    except Exception as error:  # jinja, torch, tokenizers and transformers have no tree of their own
        why = str(error)[:300] or type(error).__name__
        raise UsageError("text.unsupported", f"{what}: {why}", hint=HINT) from error
