"""Any bytes into a signed note: only Strongroom's errors come out, and what is accepted has one spelling."""

from __future__ import annotations

import atheris
from harness import fuzz, one_spelling

with atheris.instrument_imports():
    from strongroom.formats.note import ED25519, Note, Signature, VerifierKey


def seeds() -> dict[str, bytes]:
    """One with an empty line in its text, and two signatures."""
    key = VerifierKey("example.com/log", ED25519, bytes(32))
    lines = (Signature(key.name, key.key_id, bytes(64)), Signature("example.com/other", b"\xff" * 4, b"signature"))
    return {"whole": Note("example.com/log\n\nè — text\n", lines).encode()}


if __name__ == "__main__":
    fuzz(one_spelling(Note.decode, Note.encode), seeds())
