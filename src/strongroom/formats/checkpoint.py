"""Checkpoints (C2SP tlog-checkpoint), what a log signs; and cosignatures of witnesses (C2SP tlog-cosignature)."""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass

from strongroom.core.limits import LIMITS
from strongroom.errors import CannotVerify, Tampered, UsageError
from strongroom.formats.note import COSIGNATURE, Note, Signature, VerifierKey, Verify, is_text

_SIZE = re.compile(r"0|[1-9][0-9]{0,18}", re.ASCII)
_SIGNATURE = 64
_LATEST = (1 << 63) - 1  # C2SP tlog-cosignature: a time does not exceed it


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
        count = read_size(size)
        if count is None or not origin or len(root) != 32 or "" in extensions or not is_text(text):
            raise _malformed("origin, size, root or an extension is not one")
        found = cls(origin, count, root, tuple(extensions))
        if found.encode() != text:
            raise _malformed("its root is written in another way than checkpoints are")
        return found


def read_size(text: str) -> int | None:
    """A size or an index in the one way that these formats write it, decimal without leading zeros; else None."""
    value = int(text) if _SIZE.fullmatch(text) else LIMITS.log_size
    return value if value < LIMITS.log_size else None


def cosignature_message(note_text: str, seconds: int) -> bytes:
    """What a witness signs: the time at which it saw the checkpoint, and the checkpoint."""
    return f"cosignature/v1\ntime {seconds}\n{note_text}".encode()


def cosignature(key: VerifierKey, seconds: int, signature: bytes) -> Signature:
    """The line for a note: 8 bytes of time, big-endian, then the 64 of the signature. UsageError
    ``checkpoint.cosignature`` for a time that has no form, or a signature of another size."""
    if not 0 <= seconds <= _LATEST or len(signature) != _SIGNATURE:
        raise UsageError("checkpoint.cosignature", f"no cosignature is made of {len(signature)} bytes at {seconds}")
    return Signature(key.name, key.key_id, seconds.to_bytes(8, "big") + signature)


def decode_cosignature(value: bytes) -> tuple[int, bytes]:
    """Time and signature out of a `Signature.value`; Tampered ``checkpoint.cosignature``."""
    seconds = int.from_bytes(value[:8], "big")
    if len(value) != 8 + _SIGNATURE or seconds > _LATEST:
        raise Tampered("checkpoint.cosignature", "these bytes are not a cosignature: 8 bytes of time, 64 of signature")
    return seconds, value[8:]


def verify_cosignature(note: Note, key: VerifierKey, verify: Verify) -> int | None:
    """When the witness with `key` saw the note's checkpoint last, in seconds; None if it has not signed. Tampered
    ``checkpoint.cosignature`` for a signature under its name that is not its own; CannotVerify ``note.algorithm`` for
    one that is not a cosignature."""
    latest: int | None = None
    for signature in note.signatures:
        if (signature.name, signature.key_id) != (key.name, key.key_id):
            continue
        if key.algorithm != COSIGNATURE:
            raise CannotVerify(
                "note.algorithm", f"the key of {key.name!r:.80} is of the kind {key.algorithm}, not one of a witness"
            )
        try:
            seconds, value = decode_cosignature(signature.value)
            verify(key.public_key, value, cosignature_message(note.text, seconds))
        except Tampered:
            raise Tampered(
                "checkpoint.cosignature", f"the cosignature of {key.name} is not of this checkpoint"
            ) from None
        latest = seconds if latest is None else max(latest, seconds)
    return latest


def _malformed(why: str) -> Tampered:
    return Tampered("checkpoint.malformed", f"these lines are not a checkpoint: {why}")
