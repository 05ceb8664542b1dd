"""A put that somebody has signed: what was said of the files, and what it commits to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from strongroom.formats.entry import Private
from strongroom.formats.statement import Statement, Voice
from strongroom.formats.upload import files_digest


@dataclass(frozen=True)
class Sent:
    """`files`: the digest that the statement commits to; `at`: when the statement came, in seconds."""

    statement: Statement
    files: Private
    at: int

    @property
    def by(self) -> str:
        return self.statement.by

    @classmethod
    def of(cls, voice: Voice, name: str, files: Iterable[tuple[str, str]]) -> Sent:
        """Now, by `voice`; `files`: paths and SHA-256 in hexadecimal of what is put."""
        digest = Private.fresh("files", files_digest(files))
        statement = voice.say("put", {"name": name, "files": digest.commitment})
        return cls(statement, digest, statement.at)
