"""What a log sends to a witness (C2SP tlog-witness, ``add-checkpoint``)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from strongroom.core.limits import LIMITS
from strongroom.errors import LimitExceeded, Tampered
from strongroom.formats.note import Note
from strongroom.formats.tlogproof import decode_hashes, encode_hashes

_OLD = re.compile(r"old (0|[1-9][0-9]{0,18})", re.ASCII)


@dataclass(frozen=True)
class AddCheckpoint:
    """The size that the witness has seen last, the consistency proof from there, and the log's new signed
    checkpoint."""

    old: int
    proof: tuple[bytes, ...]
    note: bytes

    def encode(self) -> bytes:
        lines = [f"old {self.old}", *encode_hashes(self.proof)]
        return "".join(f"{line}\n" for line in lines).encode() + b"\n" + self.note

    @classmethod
    def decode(cls, data: bytes) -> AddCheckpoint:
        """Tampered ``witness.malformed`` for all but the one text of a request; LimitExceeded."""
        if len(data) > LIMITS.note:
            raise LimitExceeded("witness.too_large", f"a request of {len(data)} bytes; at most {LIMITS.note} are read")
        head, blank, note = data.partition(b"\n\n")
        try:
            first, *lines = head.decode("ascii").split("\n")
        except UnicodeDecodeError:
            raise _malformed() from None
        match = _OLD.fullmatch(first)
        if match is None or not blank:
            raise _malformed()
        Note.decode(note)
        return cls(int(match[1]), decode_hashes(lines), note)


def _malformed() -> Tampered:
    return Tampered("witness.malformed", "these bytes are not a request to a witness")
