"""Pack trailers (spec/container.md, section 9): the hash, and for marked segments the key commitment, of each
segment."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from strongroom.core.limits import LIMITS
from strongroom.errors import LimitExceeded, Tampered, Truncated
from strongroom.formats.manifest import COMMON, MARKED, TAG_BYTES, Manifest, PackEntry
from strongroom.formats.suites import DIGEST_BYTES, Suite

_MAGIC = b"SRPACK01"
_HEADER = struct.Struct("<8sBB2xIQII32s32s")
_MARKED_RECORD = struct.Struct("32s32s32s32s")
_RECORD = {COMMON: DIGEST_BYTES, MARKED: 4 * DIGEST_BYTES}


def trailer_bytes(kind: int, count: int) -> int:
    """How long the trailer of a pack with `count` segments is."""
    return _HEADER.size + count * _RECORD[kind]


def object_bytes(manifest: Manifest, pack: PackEntry) -> int:
    """The size of a whole pack in the store: body and trailer."""
    return manifest.body_bytes(pack) + trailer_bytes(pack.kind, pack.count)


@dataclass(frozen=True)
class Trailer:
    """The records of one pack, kept as the bytes that were hashed."""

    suite: Suite
    kind: int
    first: int
    count: int
    segment: int
    last: int
    pack_id: bytes
    commit: bytes
    records: bytes

    @classmethod
    def common(
        cls, suite: Suite, first: int, segment: int, last: int, pack_id: bytes, commit: bytes, digests: Sequence[bytes]
    ) -> Trailer:
        """Of a common pack: the digest of each segment; `commit` is that of the pack key."""
        return cls(suite, COMMON, first, len(digests), segment, last, pack_id, commit, b"".join(digests))

    @classmethod
    def marked(
        cls,
        suite: Suite,
        first: int,
        segment: int,
        pack_id: bytes,
        records: Sequence[tuple[bytes, bytes, bytes, bytes]],
    ) -> Trailer:
        """Of a marked pack: (digest A, digest B, commitment A, commitment B) of each position."""
        joined = b"".join(part for record in records for part in record)
        return cls(suite, MARKED, first, len(records), segment, segment, pack_id, bytes(DIGEST_BYTES), joined)

    @property
    def body_bytes(self) -> int:
        """The size of the body that this is the trailer of."""
        each = (self.count - 1) * self.segment + self.last + self.count * TAG_BYTES
        return 2 * each if self.kind == MARKED else each

    def encode(self) -> bytes:
        return (
            _HEADER.pack(
                _MAGIC,
                self.suite,
                self.kind,
                self.count,
                self.first,
                self.segment,
                self.last,
                self.pack_id,
                self.commit,
            )
            + self.records
        )

    @classmethod
    def decode(cls, data: bytes) -> Trailer:
        """Parse a trailer; Truncated or Tampered when it does not hold together."""
        if len(data) > LIMITS.pack_trailer:
            raise LimitExceeded(
                "pack.too_large", f"a pack's trailer has {len(data)} bytes; {LIMITS.pack_trailer} are read"
            )
        if len(data) < _HEADER.size:
            raise Truncated(
                "pack.truncated", f"a pack's trailer has {len(data)} bytes, expected at least {_HEADER.size}"
            )
        magic, suite, kind, count, first, segment, last, pack_id, commit = _HEADER.unpack_from(data)
        if magic != _MAGIC or data[10:12] != b"\0\0" or kind not in _RECORD:
            raise Tampered("pack.malformed", "these bytes are not the trailer of a pack")
        if len(data) != trailer_bytes(kind, count):
            raise Tampered("pack.malformed", f"a trailer for {count} segments has {len(data)} bytes")
        return cls(Suite.of(suite), kind, first, count, segment, last, pack_id, commit, data[_HEADER.size :])

    @classmethod
    def verify(cls, data: bytes, manifest: Manifest, entry: PackEntry) -> Trailer:
        """Section 12, step 5: the trailer is the one that the signed manifest pins, and says what the manifest says."""
        digest = manifest.suite.digest(data)
        if digest != entry.digest:
            other = next((pack for pack in manifest.packs if pack.digest == digest), None)
            if other is not None:
                raise Tampered(
                    "pack.swapped",
                    f"in the place of pack {entry.name} is pack {other.name}",
                    hint="restore both packs from a copy of the store",
                    pack=entry.name,
                )
            raise Tampered(
                "pack.tampered",
                f"the trailer of pack {entry.name} is not the one that the manifest pins",
                hint="strongroom verify, then restore the pack from a copy of the store",
                pack=entry.name,
            )
        trailer = cls.decode(data)
        size = manifest.marked_segment if entry.kind == MARKED else manifest.common_segment
        last = size
        if entry.kind == COMMON:
            last = min(size, manifest.common_bytes - (entry.end - 1) * size)
        said = (
            trailer.suite,
            trailer.kind,
            trailer.first,
            trailer.count,
            trailer.segment,
            trailer.last,
            trailer.pack_id,
        )
        if said != (manifest.suite, entry.kind, entry.first, entry.count, size, last, entry.id):
            raise Tampered("pack.malformed", f"pack {entry.name} does not say what the manifest says", pack=entry.name)
        return trailer

    def digest_of(self, number: int, variant: int = 0) -> bytes:
        """H of the ciphertext of segment `number` (and variant 0 for A, 1 for B)."""
        at = (number - self.first) * _RECORD[self.kind] + variant * DIGEST_BYTES
        return self.records[at : at + DIGEST_BYTES]

    def marked_record(self, position: int, variant: int) -> tuple[bytes, bytes]:
        """H of the ciphertext of one variant, and the commitment to its key."""
        record = self.marked_records(position, 1)[0]
        return record[variant], record[2 + variant]

    def marked_records(self, first: int, count: int) -> list[tuple[bytes, bytes, bytes, bytes]]:
        """Of `count` positions from `first`: H of the ciphertexts of A and B, and the commitments to their keys."""
        at = (first - self.first) * _RECORD[MARKED]
        return list(_MARKED_RECORD.iter_unpack(self.records[at : at + count * _RECORD[MARKED]]))
