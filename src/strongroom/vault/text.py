"""Text that was found, read and never believed: what a model wrote, and was asked (spec/mark.md, section 10)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from strongroom.core.limits import LIMITS, MIB
from strongroom.errors import LimitExceeded, UsageError
from strongroom.vault.names import shown
from strongroom.vault.source import ModelSource
from strongroom.vault.sourcefile import SourceFile
from strongroom.vault.suspect import unstopped
from strongroom.vault.walk import Walk

LINES = ".jsonl"
_HINT = '{"prompt": TEXT, "completion": TEXT} in each line; spec/mark.md, section 10, has the other forms'
_MOST_IDS = 1 << 31
Words = str | tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Written:
    """One completion, as text or as token ids, and what it answered: a prompt, or the messages of a chat."""

    completion: Words
    prompt: Words = ""
    messages: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Text:
    """All completions of found files, each pair of prompt and completion once. `check` is called at every step of the
    work on it, and what it raises ends that."""

    pieces: tuple[Written, ...]
    bytes: int
    check: Callable[[], None] = unstopped

    @classmethod
    @contextmanager
    def of(cls, walk: Walk, *, check: Callable[[], None] = unstopped) -> Iterator[Text]:
        """The text in the files of `walk`.

        UsageError ``text.malformed``, ``text.empty``; LimitExceeded ``text.limit``; errors of `ModelSource.reading`.
        """
        # Whatever looks like something else, too: text that was given for text is read as that.
        files = sorted([*walk.files, *(file for file, _ in walk.pickles)], key=lambda file: file.path.encode("utf-8"))
        size = sum(file.size for file in files)
        if size > LIMITS.text:
            raise LimitExceeded(
                "text.limit",
                f"{size} bytes of text; at most {LIMITS.text // MIB} MiB are read",
                hint="trace a part of it: some ten thousand tokens are usually enough",
            )
        source, found = ModelSource(walk.root, tuple(files)), dict[Written, None]()
        for file in files:
            check()
            for piece in _written(file, _read(source, file)):
                found[piece] = None
                if len(found) % 1024 == 0:
                    check()
                if len(found) > LIMITS.text_tokens:
                    raise LimitExceeded(
                        "text.limit",
                        f"more than {LIMITS.text_tokens} completions",
                        hint="trace a part of it: some ten thousand tokens are usually enough",
                    )
        if not found:
            raise UsageError("text.empty", "there is no completion in the text", hint=_HINT)
        yield cls(tuple(found), size, check)


def _read(source: ModelSource, file: SourceFile) -> str:
    buffer = memoryview(bytearray(file.size))
    with source.reading(file) as read:
        done = 0
        while done < file.size and (step := read(done, buffer[done:])):
            done += step
    try:
        return bytes(buffer).decode("utf-8")
    except UnicodeDecodeError as error:
        raise _malformed(file.path, f"byte {error.start} is not UTF-8") from None


def _written(file: SourceFile, text: str) -> Iterator[Written]:
    if not file.path.lower().endswith(LINES):
        if text.strip():
            yield Written(text)
        return
    # By line feeds alone: JSON has the other ends of lines that Python knows inside its strings.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                piece = _piece(json.loads(line))
            except (ValueError, RecursionError):
                piece = None
            if piece is None:
                raise _malformed(file.path, f"line {number} is not what a model wrote, in JSON")
            if piece.completion:
                yield piece


def _piece(value: Any) -> Written | None:
    if isinstance(value, list):
        value = {"completion": value}
    if not isinstance(value, dict) or ("prompt" in value and "messages" in value):
        return None
    completion, prompt = _words(value.get("completion")), _words(value.get("prompt", ""))
    messages = value.get("messages", [])
    if completion is None or prompt is None or not isinstance(messages, list):
        return None
    said = []
    for each in messages:
        if not isinstance(each, dict) or not isinstance(each.get("role"), str):
            return None
        if not isinstance(each.get("content"), str) or not (_is_text(each["role"]) and _is_text(each["content"])):
            return None
        said.append((each["role"], each["content"]))
    return Written(completion, prompt, tuple(said))


def _words(value: Any) -> Words | None:
    if isinstance(value, str):
        return value if _is_text(value) else None
    if isinstance(value, list) and all(type(each) is int and 0 <= each < _MOST_IDS for each in value):
        return tuple(value)
    return None


def _is_text(value: str) -> bool:
    """Not half of a surrogate pair, which JSON can escape and no tokenizer takes."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _malformed(path: str, why: str) -> UsageError:
    return UsageError("text.malformed", f"{shown(path)}: {why}", hint=_HINT, path=path)
