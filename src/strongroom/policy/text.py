"""The text of a policy set, before Cedar reads it: what an officer could misread, and what Cedar can't bear.

Measured with Cedar 4.12: brackets nested some hundreds deep end the process (the parser's stack), and from some length
of a chain on the validator gives up *and says that the policy is valid*. So nesting and length are bounded here, with
the tokens of Cedar's own lexer, and far below either.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

from strongroom.core.limits import MIB
from strongroom.errors import UsageError

TEXT_MAX = MIB
_NESTED_MAX = 16
_LINKS_MAX = 128  # operators and accesses in one policy: each may nest what Cedar makes of it one deeper
_TOKEN = re.compile(r'//[^\n]*|"(?:\\.|[^"\\])*"|&&|\|\||[A-Za-z_]\w*|[^\s\w]', re.ASCII | re.DOTALL)
_LINKS = {"&&", "||", "+", "-", "*", "!", ".", "[", "if", "else", "like", "is", "in", "when", "unless"}
_UNSEEN = {"Cc", "Cf", "Co", "Cs", "Zl", "Zp"}  # controls, directions, zero widths, line breaks that editors don't show


@dataclass(frozen=True)
class Statement:
    """One policy: the line that its first token is on (from 1), and its text, to the semicolon."""

    line: int
    text: str


def statements(text: str) -> list[Statement]:
    """The policies of a text, in order. UsageError ``policy.invalid`` for a text that must not reach Cedar."""
    if len(text) > TEXT_MAX or len(_utf8(text)) > TEXT_MAX:
        raise invalid(f"a policy set is a text of at most {TEXT_MAX} bytes")
    _seen(text)
    found: list[Statement] = []
    start = line = depth = links = 0
    counter = _Lines(text)
    for match in _TOKEN.finditer(text):
        word = match.group()
        if word.startswith("//"):
            continue
        if not line:
            start, line = match.start(), counter.at(match.start())
            found.append(Statement(line, ""))
        depth = depth + 1 if word in ("(", "[", "{") else max(depth - (word in (")", "]", "}")), 0)
        links += word in _LINKS
        if depth > _NESTED_MAX or links > _LINKS_MAX:
            raise invalid(
                f"the policy at line {line} nests deeper than {_NESTED_MAX}, or has more than {_LINKS_MAX} operators",
                line=line,
                hint="split it: several permits, or several forbids, are read as one with an or between them",
            )
        if word == '"':
            # And the search for the end of the next one would begin anew: quadratic.
            raise invalid(f"line {counter.at(match.start())}: a text in quotes does not end", line=line)
        if word == "has":
            # Every attribute of the schema is always there. A misspelt one in a `has` is no error for Cedar: the rule
            # would pass validation, and a forbid would never apply.
            raise invalid(
                f"line {counter.at(match.start())}: every attribute is always there, and none has to be asked for",
                line=counter.at(match.start()),
                hint="leave the has out; resource is Strongroom::Weights tells weights from the room",
            )
        if word == ";":
            found[-1] = Statement(line, text[start : match.end()])
            line = links = 0
    if line:
        found[-1] = Statement(line, text[start:])
    return found


def invalid(message: str, *, hint: str = "strongroom policy check FILE", **evidence: object) -> UsageError:
    """The error for a text that is no valid set of policies."""
    return UsageError("policy.invalid", message, hint=hint, **evidence)


class _Lines:
    """Line numbers of positions that only grow: a text of many short policies is counted through once."""

    def __init__(self, text: str) -> None:
        self._text, self._line, self._position = text, 1, 0

    def at(self, position: int) -> int:
        self._line += self._text.count("\n", self._position, position)
        self._position = position
        return self._line


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise invalid("the text of a policy set has half a character in it (a lone surrogate)") from None


def _seen(text: str) -> None:
    """Refuse what a reviewer does not see, so that what is approved is enforced (Trojan Source, CVE-2021-42574).

    A carriage return is fine before a line feed only: alone it ends a comment for Cedar, and no line on the screen.
    """
    for match in re.finditer(r"[^\n\t -~]", text.replace("\r\n", "\n")):
        if unicodedata.category(match.group()) in _UNSEEN:
            line = text.replace("\r\n", "\n").count("\n", 0, match.start()) + 1
            raise invalid(
                f"line {line} has a character that can't be seen (U+{ord(match.group()):04X})",
                line=line,
                hint="remove it: who reads the policy has to see all of it",
            )
