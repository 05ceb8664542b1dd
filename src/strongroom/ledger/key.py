"""The log's key: who signs a room's checkpoints, and how they are checked."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from strongroom.crypto import signatures
from strongroom.crypto.keys import derive
from strongroom.crypto.signatures import Signer
from strongroom.errors import Tampered
from strongroom.formats.checkpoint import Checkpoint
from strongroom.formats.note import ED25519, Note, Signature, VerifierKey, verify_note


def log_signer(signing_seed: bytes) -> Signer:
    """The log key of the room whose 32-byte signing seed this is (spec/ledger.md, section 1)."""
    return Signer(derive(signing_seed, "ledger"))


@dataclass(frozen=True)
class LogKey:
    """`room`: 16 bytes; `public_key`: 32."""

    room: bytes
    public_key: bytes

    @property
    def origin(self) -> str:
        return f"strongroom/{self.room.hex()}"

    @property
    def verifier(self) -> VerifierKey:
        """As witnesses and other verifiers are given it."""
        return VerifierKey(self.origin, ED25519, self.public_key)

    def sign(self, checkpoint: Checkpoint, signer: Signer) -> bytes:
        """The signed note of a checkpoint."""
        text = checkpoint.encode()
        signature = Signature(self.origin, self.verifier.key_id, signer.sign(text.encode()))
        return Note(text, (signature,)).encode()

    def open(self, note: bytes) -> Checkpoint:
        """The checkpoint in a note; Tampered unless this key signed it, and for this log."""
        return _opened(self, note)


@lru_cache(maxsize=16)  # of a release, each side and each of their memories opens the same note
def _opened(key: LogKey, note: bytes) -> Checkpoint:
    parsed = Note.decode(note)
    if key.origin not in verify_note(parsed, [key.verifier], signatures.verify):
        raise Tampered("log.unsigned", "the checkpoint is not signed by the log key of this room")
    checkpoint = Checkpoint.decode(parsed.text)
    if checkpoint.origin != key.origin:
        raise Tampered("log.other", f"the checkpoint is of another log: {checkpoint.origin!r:.80}")
    return checkpoint
