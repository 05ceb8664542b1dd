"""Key bundles (spec/container.md, section 11): what one holder needs to read one version, and no more."""

from __future__ import annotations

import hashlib
import hmac
import struct
from dataclasses import dataclass, field

from strongroom.core.limits import LIMITS
from strongroom.errors import CannotVerify, LimitExceeded, Tampered, Truncated
from strongroom.formats.suites import FORMAT, Suite

_HEADER = struct.Struct("<4sBBHH2x16s16sII32s32s32s")
_KEY = 32


@dataclass(frozen=True)
class KeyBundle:
    """The common key, and for each of m positions one variant's key. Secret: `repr` shows none of the keys."""

    suite: Suite
    room: bytes
    version: bytes
    revision: int
    manifest_digest: bytes
    signer: bytes  # the room's raw Ed25519 public key
    holder: str
    ref: str
    common_key: bytes = field(repr=False)
    word: bytes = field(repr=False)  # bit i: 0 opens variant A of position i, 1 opens B
    variant_keys: bytes = field(repr=False)

    @property
    def positions(self) -> int:
        return len(self.variant_keys) // _KEY

    def variant(self, position: int) -> int:
        """Which variant this bundle opens at `position`: 0 for A, 1 for B."""
        return self.word[position >> 3] >> (position & 7) & 1

    def variant_key(self, position: int) -> bytes:
        return self.variant_keys[position * _KEY : position * _KEY + _KEY]

    def encode(self) -> bytes:
        holder, ref = self.holder.encode(), self.ref.encode()
        header = _HEADER.pack(
            b"SRKB",
            FORMAT,
            self.suite,
            len(holder),
            len(ref),
            self.room,
            self.version,
            self.revision,
            self.positions,
            self.manifest_digest,
            self.signer,
            self.common_key,
        )
        body = header + holder + ref + self.word + self.variant_keys
        return body + hashlib.sha256(body).digest()

    @classmethod
    def decode(cls, data: bytes) -> KeyBundle:
        """Parse a bundle; Truncated, Tampered or CannotVerify when it is not a whole bundle of a known format."""
        if len(data) > LIMITS.bundle:
            raise LimitExceeded(
                "bundle.too_large", f"a key bundle of {len(data)} bytes; at most {LIMITS.bundle} are read"
            )
        if len(data) < _HEADER.size + 32:
            raise Truncated(
                "bundle.truncated", f"a key bundle has at least {_HEADER.size + 32} bytes, this {len(data)}"
            )
        magic, version, suite, holder_size, ref_size, room, weights, revision, positions, digest, signer, common = (
            _HEADER.unpack_from(data)
        )
        if magic != b"SRKB" or data[10:12] != b"\0\0":
            raise Tampered("bundle.malformed", "these bytes are not a key bundle")
        if version != FORMAT:
            raise CannotVerify(
                "bundle.unknown_format",
                f"key bundle of format {version}, expected {FORMAT}",
                hint="install a newer Strongroom, as docs/how-to/install.md says",
            )
        word_size = -(-positions // 8)
        sizes = (_HEADER.size, holder_size, ref_size, word_size, positions * _KEY, 32)
        if positions > LIMITS.positions or len(data) != sum(sizes):
            raise Truncated(
                "bundle.truncated", f"a key bundle for {positions} positions has {sum(sizes)} bytes, this {len(data)}"
            )
        body, checksum = data[:-32], data[-32:]
        if not hmac.compare_digest(hashlib.sha256(body).digest(), checksum):
            raise Tampered(
                "bundle.tampered", "the key bundle's checksum does not match its bytes", hint="ask for a new release"
            )
        parts: list[bytes] = []
        at = 0
        for size in sizes:
            parts.append(data[at : at + size])
            at += size
        _, holder, ref, word, keys, _ = parts
        if positions % 8 and word[-1] >> positions % 8:
            raise Tampered("bundle.malformed", "the code word has bits beyond the last position")
        try:
            return cls(
                Suite.of(suite),
                room,
                weights,
                revision,
                digest,
                signer,
                holder.decode(),
                ref.decode(),
                common,
                word,
                keys,
            )
        except UnicodeDecodeError:
            raise Tampered("bundle.malformed", "a name in the key bundle is not UTF-8") from None
