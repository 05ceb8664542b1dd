"""What the tokens of a version spell, byte by byte: whether a text is what its tokens say (spec/gateway.md, section 5).

Lengths of tokens would not do: the longest of a vocabulary have 80 bytes and more, and a server that says that all its
tokens were such could write any text of that length.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

from strongroom.core.limits import MIB
from strongroom.errors import UsageError
from strongroom.vault.child import Answer, Child
from strongroom.vault.names import shown
from strongroom.vault.originals import Originals

_FILE = "tokenizer.json"
_LARGEST = 64 * MIB  # bytes of a tokenizer.json
_SECONDS, _PATIENCE = 60, 60.0
_ANSWER_MAX = 256 * MIB
_HINT = "the gateway meters this version's answers by their bytes, too: strongroom budget REF"


def _each(error: UnicodeError) -> tuple[str, int]:
    """One sign for each byte that is no character, as decoders with a byte fallback have it."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error("strongroom.each", _each)
_REPLACED = ("replace", "strongroom.each")


class Spelling:
    """The vocabulary of one version. `tokens`: the bytes of each by its number; `control` those that answers are mostly
    written without; `spaced`: the first space of a text may be left out."""

    def __init__(self, tokens: Sequence[bytes | None], control: Sequence[int], *, spaced: bool) -> None:
        self._tokens, self._control, self._spaced = tuple(tokens), frozenset(control), spaced

    def as_json(self) -> dict[str, Any]:
        """As `from_json` takes it: tokens' bytes in Latin-1."""
        tokens = [None if each is None else each.decode("latin-1") for each in self._tokens]
        return {"tokens": tokens, "control": sorted(self._control), "spaced": self._spaced}

    @classmethod
    def from_json(cls, value: Any) -> Spelling:
        """UsageError ``spelling.unknown`` for what is none."""
        try:
            tokens = [None if each is None else each.encode("latin-1") for each in value["tokens"]]
            control = [each for each in value["control"] if type(each) is int]
            return cls(tokens, control, spaced=value["spaced"] is True)
        except (TypeError, KeyError, AttributeError, ValueError):
            raise _unknown("what reads its tokenizer gives no bytes") from None

    def spells(self, tokens: Sequence[int], text: str) -> bool:
        """Whether `text` is the beginning of what `tokens` spell: with the control tokens or without, a byte that is no
        character written in one of two ways. So beside its tokens a text says how long it is and two bits more."""
        if not text:
            return True
        if self._begins(tokens, text):
            return True
        if self._control.isdisjoint(tokens):
            return False
        return self._begins([each for each in tokens if each not in self._control], text)

    def _begins(self, tokens: Sequence[int], text: str) -> bool:
        words = self._tokens
        if not tokens or min(tokens) < 0:
            return False
        try:
            spelled = b"".join([words[each] for each in tokens])  # type: ignore[misc]  # None is what fails
        except (IndexError, TypeError):  # numbers of no token
            return False
        for said in (text, " " + text) if self._spaced else (text,):
            if spelled.startswith(said.encode()):
                return True
            if "\ufffd" in said and any(spelled.decode("utf-8", way).startswith(said) for way in _REPLACED):
                return True
        return False


def spelling_of(originals: Originals) -> Spelling:
    """That of a version. UsageError ``spelling.unknown`` where its files do not say, or its decoder does more than put
    pieces side by side."""
    file = next((each for each in originals.layout.files if each.path == _FILE), None)
    if file is None:
        raise _unknown("it has no tokenizer.json")
    if file.bytes > _LARGEST:
        raise _unknown(f"its tokenizer.json has {file.bytes} bytes")
    text = bytes(originals.read(file.offset, file.end)).decode("utf-8", "replace")
    child = Child(
        "strongroom.vault.vocabulary",
        memory=512 * MIB + 64 * len(text),
        seconds=_SECONDS,
        patience=_PATIENCE,
        most=_ANSWER_MAX,
        explain=_explained,
    )
    try:
        child.say(text)
        found = child.hear("vocabulary")
    finally:
        child.close()
    return Spelling.from_json(found)  # a child that a file has turned against us says what it likes


def _explained(answer: Answer) -> UsageError:
    return _unknown(shown(str(answer.get("message", "what reads its tokenizer was stopped"))))


def _unknown(why: Any) -> UsageError:
    return UsageError("spelling.unknown", f"it is not known what the version's tokens spell: {why}", hint=_HINT)
