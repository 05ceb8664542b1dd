"""Sealing and opening segments (spec/container.md, sections 5, 6 and 12): the only place that touches weights' AEAD."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from strongroom.crypto.keys import check_commitment, derive, keystream
from strongroom.errors import Tampered
from strongroom.formats.manifest import TAG_BYTES
from strongroom.formats.suites import FORMAT, Suite

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

    def chosen(self, word: bytes) -> bytes:
        """For each position the key of the variant that a code word names: bit i mod 8 of byte i // 8, 1 for B."""
        table = np.frombuffer(self.variants, np.uint64).reshape(-1, _KEY // 8)  # A, B, A, B, …
        bits = np.unpackbits(np.frombuffer(word, np.uint8), bitorder="little")[: len(table) // 2]
        return table.take(np.arange(0, len(table), 2) + bits, axis=0).tobytes()


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

    def open_variants(
        self,
        first: int,
        variants: Sequence[int],
        keys: Sequence[bytes],
        records: Sequence[tuple[bytes, bytes, bytes, bytes]],
        nonce: bytes,
        sealed: memoryview,
        out: memoryview,
    ) -> None:
        """As `open_into`, for neighbouring positions from `first`, checking the commitment to each key first. On any
        error the caller wipes `out`: positions before the one that failed are in it.

        Of each position one of 0 (A) and 1 (B), its key, and its record in the trailer; `sealed` holds A, then B, of
        each, and `out` takes the plaintexts.
        """
        size = len(out) // len(variants)
        sealed_size = size + TAG_BYTES
        start = to = 0
        for position, (variant, key, record) in enumerate(zip(variants, keys, records, strict=True), first):
            check_commitment(key, record[2 + variant], position)
            piece = sealed[start + variant * sealed_size : start + (variant + 1) * sealed_size]
            kind = VARIANT_A + variant
            self.open_into(AESGCM(key), nonce, kind, position, piece, record[variant], out[to : to + size])
            start, to = start + 2 * sealed_size, to + size
