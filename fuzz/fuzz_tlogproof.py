"""Any bytes into a log proof: only Strongroom's errors come out, and what is accepted has one spelling."""

from __future__ import annotations

import atheris
from harness import fuzz, one_spelling

with atheris.instrument_imports():
    from strongroom.formats.checkpoint import Checkpoint
    from strongroom.formats.note import ED25519, Note, Signature, VerifierKey
    from strongroom.formats.tlogproof import LogProof


def seeds() -> dict[str, bytes]:
    """With and without extra data."""
    key = VerifierKey("example.com/log", ED25519, bytes(32))
    text = Checkpoint(key.name, 11, bytes(range(32))).encode()
    note = Note(text, (Signature(key.name, key.key_id, bytes(64)),)).encode()
    path = (b"a" * 32, b"b" * 32)
    return {"plain": LogProof(6, path, note).encode(), "extra": LogProof(0, (), note, b"extra").encode()}


if __name__ == "__main__":
    fuzz(one_spelling(LogProof.decode, LogProof.encode), seeds())
