"""Proofs of single entries as files (C2SP tlog-proof): checked offline with the log's public key alone."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass

from strongroom.core.limits import LIMITS
from strongroom.errors import LimitExceeded, Tampered
from strongroom.formats.checkpoint import Checkpoint, read_size
from strongroom.formats.merkle import HASH, verify_inclusion
from strongroom.formats.note import Note, VerifierKey, Verify, verify_note

_FIRST = "c2sp.org/tlog-proof@v1"


@dataclass(frozen=True)
class LogProof:
    """Index and audit path (hashes of 32 bytes) of an entry in the tree of the checkpoint `note`. `extra` is
    authenticated by nothing; none and an empty one are the same."""

    index: int
    path: tuple[bytes, ...]
    note: bytes
    extra: bytes | None = None

    def encode(self) -> bytes:
        lines = [_FIRST]
        if self.extra:
            lines.append(f"extra {base64.b64encode(self.extra).decode()}")
        lines += [f"index {self.index}", *encode_hashes(self.path)]
        return "".join(f"{line}\n" for line in lines).encode() + b"\n" + self.note

    @classmethod
    def decode(cls, data: bytes) -> LogProof:
        """Tampered ``proof.malformed``, ``note.malformed``, ``checkpoint.malformed`` for all but the one text of a
        proof; LimitExceeded."""
        if len(data) > LIMITS.note:
            raise LimitExceeded("proof.too_large", f"a proof of {len(data)} bytes; at most {LIMITS.note} are read")
        head, blank, note = data.partition(b"\n\n")
        try:
            first, *lines = head.decode("ascii").split("\n")
        except UnicodeDecodeError:
            raise _malformed() from None
        extra = None
        if lines and lines[0].startswith("extra "):
            try:
                extra = base64.b64decode(lines.pop(0).removeprefix("extra ").encode(), validate=True)
            except (binascii.Error, ValueError):
                raise _malformed() from None
        index = read_size(lines.pop(0).removeprefix("index ")) if lines else None
        if first != _FIRST or not blank or index is None:
            raise _malformed()
        found = cls(index, decode_hashes(lines), note, extra)
        Checkpoint.decode(Note.decode(note).text)
        if found.encode() != data:
            raise _malformed()
        return found

    def verify(self, leaf: bytes, key: VerifierKey, verify: Verify) -> Checkpoint:
        """The checkpoint of the log of `key` that the entry with the hash `leaf` is in; Tampered otherwise."""
        note = Note.decode(self.note)
        if key.name not in verify_note(note, [key], verify):
            raise Tampered("log.unsigned", f"the checkpoint is not signed by {key.name}")
        checkpoint = Checkpoint.decode(note.text)
        if checkpoint.origin != key.name:
            raise Tampered("log.other", f"the checkpoint is of the log {checkpoint.origin!r:.80}")
        verify_inclusion(leaf, self.index, checkpoint.size, self.path, checkpoint.root)
        return checkpoint


def encode_hashes(hashes: Sequence[bytes]) -> list[str]:
    """One line of base64 for each."""
    return [base64.b64encode(value).decode() for value in hashes]


def decode_hashes(lines: Sequence[str]) -> tuple[bytes, ...]:
    """The reverse; Tampered ``proof.malformed``, LimitExceeded beyond the 63 that a proof can have."""
    if len(lines) > LIMITS.proof_hashes:
        raise LimitExceeded("proof.too_long", f"a proof of {len(lines)} hashes")
    hashes = []
    for line in lines:
        try:
            value = base64.b64decode(line.encode("ascii"), validate=True)
        except (binascii.Error, ValueError):
            raise _malformed() from None
        if len(value) != HASH or base64.b64encode(value).decode() != line:
            raise _malformed()
        hashes.append(value)
    return tuple(hashes)


def _malformed() -> Tampered:
    return Tampered("proof.malformed", "these bytes are not a log proof")
