"""Sealing and opening segments (spec/container.md, sections 5, 6 and 12): the only place that touches weights' AEAD."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from strongroom.crypto.keys import derive, keystream
from strongroom.errors import Tampered
from strongroom.formats.suites import FORMAT, Suite

TAG_BYTES = 16
COMMON, VARIANT_A, VARIANT_B = 0, 1, 2
_AAD = struct.Struct("<4sBBBx16sI")
_INDEX = struct.Struct("<Q")
_KEY = 32


@dataclass(frozen=True)
class VersionKeys:
    """Everything that follows from the version key V. Only the custodian holds it; `repr` shows nothing."""

    common: bytes
    variants: bytes

    @classmethod
    def of(cls, version_key: bytes, positions: int) -> VersionKeys:
        table = keystream(derive(version_key, "variants"), 2 * positions * _KEY)
        return cls(derive(version_key, "common"), table)

    def __repr__(self) -> str:
        return "VersionKeys(…)"

    def variant_key(self, position: int, variant: int) -> bytes:
        """K(i,A) for variant 0, K(i,B) for variant 1."""
        at = (2 * position + variant) * _KEY
        return self.variants[at : at + _KEY]


def pack_key(common_key: bytes, pack_id: bytes) -> bytes:
    """The key of one common pack. Fresh with every pack identifier, so that no nonce repeats under it."""
    return derive(common_key, "pack", pack_id)


class SegmentCipher:
    """Seals and opens the segments of one revision of one version. Thread-safe; holds no key."""

    def __init__(self, suite: Suite, version: bytes, revision: int, layout_digest: bytes) -> None:
        self._hasher = suite.hasher
        prefix = (b"SRSG", FORMAT, suite)
        self._prefixes = [_AAD.pack(*prefix, kind, version, revision) for kind in (COMMON, VARIANT_A, VARIANT_B)]
        self._layout_digest = layout_digest

    def _associated_data(self, kind: int, index: int) -> bytes:
        return self._prefixes[kind] + _INDEX.pack(index) + self._layout_digest

    def seal_into(
        self, aead: AESGCM, nonce: bytes, kind: int, index: int, plaintext: memoryview, out: memoryview
    ) -> bytes:
        """Encrypt into `out` (plaintext + 16 bytes); returns H(ciphertext and tag)."""
        aead.encrypt_into(nonce, plaintext, self._associated_data(kind, index), out)
        return bytes(self._hasher(out).digest())

    def open_into(
        self, aead: AESGCM, nonce: bytes, kind: int, index: int, sealed: memoryview, digest: bytes, out: memoryview
    ) -> None:
        """Check `sealed` (private memory: it is read twice) against `digest`, then decrypt it into `out`.

        The hash comes first: a holder of the common key who can write to the store could otherwise replace a segment,
        with a correct tag. Tampered is raised on any failure; where a wrong tag has left unauthenticated plaintext in
        `out` (decrypt_into does), it is wiped first.
        """
        if self._hasher(sealed).digest() != digest:
            raise Tampered(
                "segment.tampered",
                f"segment {index} is not the one that the signed manifest pins",
                hint="strongroom verify names every damaged segment; restore the pack from a copy of the store",
            )
        try:
            aead.decrypt_into(nonce, sealed, self._associated_data(kind, index), out)
        except InvalidTag:
            out[:] = bytes(len(out))
            raise Tampered(
                "segment.undecryptable",
                f"segment {index} does not open: it was sealed for another place or variant, or under another key",
                hint="the key bundle or layout does not belong to this version; ask for a new release",
            ) from None
