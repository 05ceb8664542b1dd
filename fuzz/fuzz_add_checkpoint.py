"""Any bytes into a request to a witness: only Strongroom's errors come out, and what is accepted has one spelling."""

from __future__ import annotations

import atheris
from harness import fuzz, one_spelling

with atheris.instrument_imports():
    from strongroom.formats.checkpoint import Checkpoint
    from strongroom.formats.note import ED25519, Note, Signature, VerifierKey
    from strongroom.formats.witness import AddCheckpoint


def seeds() -> dict[str, bytes]:
    """From the empty log, and from a smaller one."""
    key = VerifierKey("example.com/log", ED25519, bytes(32))
    text = Checkpoint(key.name, 20852163, bytes(range(32))).encode()
    note = Note(text, (Signature(key.name, key.key_id, bytes(64)),)).encode()
    path = (b"a" * 32, b"b" * 32, b"c" * 32)
    return {"first": AddCheckpoint(0, (), note).encode(), "next": AddCheckpoint(20852014, path, note).encode()}


if __name__ == "__main__":
    fuzz(one_spelling(AddCheckpoint.decode, AddCheckpoint.encode), seeds())
