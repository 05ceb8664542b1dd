"""What a log sends to a witness (C2SP tlog-witness, ``add-checkpoint``)."""

from __future__ import annotations

from dataclasses import dataclass

from strongroom.core.limits import LIMITS
from strongroom.errors import LimitExceeded, Tampered
from strongroom.formats.checkpoint import Checkpoint, read_size
from strongroom.formats.note import Note
from strongroom.formats.tlogproof import decode_hashes, encode_hashes

_OLD = "old "


@dataclass(frozen=True)
class AddCheckpoint:
    """The size that the witness has seen last, the consistency proof from there, and the log's new signed
    checkpoint."""

    old: int
    proof: tuple[bytes, ...]
    note: bytes

    def encode(self) -> bytes:
        lines = [f"{_OLD}{self.old}", *encode_hashes(self.proof)]
        return "".join(f"{line}\n" for line in lines).encode() + b"\n" + self.note

    @classmethod
    def decode(cls, data: bytes) -> AddCheckpoint:
        """Tampered ``witness.malformed``, ``proof.malformed``, ``note.malformed``, ``checkpoint.malformed`` for all but
        the one text of a request; LimitExceeded."""
        if len(data) > LIMITS.note:
            raise LimitExceeded("witness.too_large", f"a request of {len(data)} bytes; at most {LIMITS.note} are read")
        head, blank, note = data.partition(b"\n\n")
        try:
            first, *lines = head.decode("ascii").split("\n")
        except UnicodeDecodeError:
            raise _malformed() from None
        old = read_size(first.removeprefix(_OLD))
        if old is None or not first.startswith(_OLD) or not blank:
            raise _malformed()
        Checkpoint.decode(Note.decode(note).text)
        return cls(old, decode_hashes(lines), note)


def _malformed() -> Tampered:
    return Tampered("witness.malformed", "these bytes are not a request to a witness")
