"""Checkpoints (C2SP tlog-checkpoint), what a log signs; and cosignatures of witnesses (C2SP tlog-cosignature)."""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass

from strongroom.errors import Tampered
from strongroom.formats.note import COSIGNATURE, Note, Signature, VerifierKey, Verify

_SIZE = re.compile(r"0|[1-9][0-9]{0,18}", re.ASCII)
_SIGNATURE = 64
_MOST = 1 << 62


@dataclass(frozen=True)
class Checkpoint:
    """The tree of a log: its origin, size, and root of 32 bytes. `extensions` are opaque lines."""

    origin: str
    size: int
    root: bytes
    extensions: tuple[str, ...] = ()

    def encode(self) -> str:
        """The text of its note."""
        root = base64.b64encode(self.root).decode()
        return "".join(f"{line}\n" for line in (self.origin, str(self.size), root, *self.extensions))

    @classmethod
    def decode(cls, text: str) -> Checkpoint:
        """Tampered ``checkpoint.malformed`` for all but the one text of a checkpoint."""
        lines = text.split("\n")
        if len(lines) < 4 or lines.pop():
            raise _malformed("it has less than three lines, or no newline at its end")
        origin, size, encoded, *extensions = lines
        try:
            root = base64.b64decode(encoded.encode("ascii"), validate=True)
        except (binascii.Error, ValueError):
            root = b""
        found = cls(origin, int(size) if _SIZE.fullmatch(size) else _MOST, root, tuple(extensions))
        if not origin or found.size >= _MOST or len(root) != 32 or "" in extensions or found.encode() != text:
            raise _malformed("origin, size, root or an extension is not one")
        return found


def cosignature_message(note_text: str, seconds: int) -> bytes:
    """What a witness signs: the time at which it saw the checkpoint, and the checkpoint."""
    return f"cosignature/v1\ntime {seconds}\n{note_text}".encode()


def cosignature(key: VerifierKey, seconds: int, signature: bytes) -> Signature:
    """The line for a note: 8 bytes of time, big-endian, then the 64 of the signature."""
    return Signature(key.name, key.key_id, seconds.to_bytes(8, "big") + signature)


def verify_cosignature(note: Note, key: VerifierKey, verify: Verify) -> int | None:
    """When the witness with `key` saw the note's checkpoint, in seconds; None if it has not signed. Tampered
    ``checkpoint.cosignature`` for a signature under its name that is not its own."""
    if key.algorithm != COSIGNATURE:
        return None
    for signature in note.signatures:
        if (signature.name, signature.key_id) != (key.name, key.key_id):
            continue
        seconds, value = int.from_bytes(signature.value[:8], "big"), signature.value[8:]
        try:
            if len(value) != _SIGNATURE:
                raise Tampered("checkpoint.cosignature", "it has another size")
            verify(key.public_key, value, cosignature_message(note.text, seconds))
        except Tampered:
            raise Tampered(
                "checkpoint.cosignature", f"the cosignature of {key.name} is not of this checkpoint"
            ) from None
        return seconds
    return None


def _malformed(why: str) -> Tampered:
    return Tampered("checkpoint.malformed", f"these lines are not a checkpoint: {why}")
