"""Identifiers and the path grammar: one grammar for CLI arguments, API URLs, policy resources and ledger fields.

::

    NAME      = part *("/" part)            ; acme/tiny
    part      = [a-z0-9] *[a-z0-9._-]       ; no "..", at most 64 characters
    REF       = NAME ["@" N]                ; acme/tiny@3; NAME alone is the newest version
    PRINCIPAL = ("user" / "workload" / "team") "/" NAME
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from strongroom.errors import Tampered, UsageError

_PART = r"(?!.*\.\.)[a-z0-9][a-z0-9._-]{0,63}"
_NAME = re.compile(rf"{_PART}(/{_PART}){{0,7}}", re.ASCII)
_KINDS = ("user", "workload", "team")


@dataclass(frozen=True, order=True)
class Ref:
    """The name of a version of weights; `number` None means the newest."""

    name: str
    number: int | None = None

    @classmethod
    def parse(cls, text: str) -> Ref:
        name, at, number = text.partition("@")
        if not _NAME.fullmatch(name):
            raise UsageError(
                "ref.malformed",
                f"{text!r} is not a name of weights; expected lower-case parts such as acme/tiny or acme/tiny@3",
                hint="strongroom ls",
            )
        if not at:
            return cls(name)
        if not re.fullmatch(r"[1-9][0-9]{0,8}", number, re.ASCII):
            raise UsageError(
                "ref.malformed", f"{text!r}: after @ comes a version number such as 3", hint="strongroom ls"
            )
        return cls(name, int(number))

    def __str__(self) -> str:
        return self.name if self.number is None else f"{self.name}@{self.number}"


def parse_principal(text: str) -> str:
    """`text` if it is a principal's path such as user/ana; UsageError otherwise."""
    kind, _, name = text.partition("/")
    if kind not in _KINDS or not _NAME.fullmatch(name):
        raise UsageError(
            "principal.malformed",
            f"{text!r} is not a principal; expected user/NAME, workload/NAME or team/NAME",
            hint="strongroom principal ls",
        )
    return text


def parse_id(text: object, size: int = 16) -> bytes:
    """The bytes of an identifier in lower-case hexadecimal; Tampered otherwise (somebody wrote to the database: such a
    text must become neither a path nor an exception of Python's)."""
    if not isinstance(text, str) or not re.fullmatch(rf"[0-9a-f]{{{2 * size}}}", text, re.ASCII):
        raise Tampered("id.malformed", f"an identifier in the database is not {size} bytes in hexadecimal")
    return bytes.fromhex(text)


def random_id(size: int = 16) -> bytes:
    """`size` random bytes from the operating system."""
    return os.urandom(size)
