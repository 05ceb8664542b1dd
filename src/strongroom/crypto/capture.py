"""Prompts and answers, sealed for one reader by a gateway that can't read them back (spec/gateway.md, section 9).

HPKE is RFC 9180 in base mode, DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, AES-256-GCM, as for a release. Its info is the
label and the hash of the record of that request, so that what was sealed belongs to one record and opens with no other.
"""

from __future__ import annotations

import hashlib
from typing import NoReturn

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

from strongroom.errors import Tampered, UsageError

KEY_BYTES = 32
_LABEL = b"strongroom/1 capture\x00"
_COMMITMENT = b"strongroom/1 captured\x00"


def key_id(public_key: bytes) -> str:
    """What a public key is called in records' neighbours and in the log: its SHA-256, in hexadecimal."""
    return hashlib.sha256(public_key).hexdigest()


def commitment(captured: bytes) -> str:
    """What a record has of what was sealed beside it. It begins with 32 random bytes: who reads records must not be
    able to try prompts."""
    return hashlib.sha256(_COMMITMENT + captured).hexdigest()


class CaptureSealer:
    """Seals for the holder of the private half of `public_key`; UsageError ``capture.bad_key``."""

    def __init__(self, public_key: bytes) -> None:
        try:
            self._key = X25519PublicKey.from_public_bytes(public_key)
            X25519PrivateKey.generate().exchange(self._key)
        except ValueError:  # another size, or a point of small order: whoever has the file could compute the secret
            _bad_key("this is not the public half of a key that prompts and answers can be sealed to")
        self.key_id = key_id(public_key)

    def seal(self, captured: bytes, record: bytes) -> bytes:
        """`captured`, for the record with this hash (32 bytes)."""
        return _suite().encrypt(captured, self._key, info=_LABEL + record)


class CaptureKey:
    """The private half, from 32 bytes, or made now; UsageError ``capture.bad_key``."""

    def __init__(self, private: bytes | None = None) -> None:
        try:
            self._key = X25519PrivateKey.generate() if private is None else X25519PrivateKey.from_private_bytes(private)
        except ValueError:
            _bad_key("this is not the private half of a key that prompts and answers are sealed to")
        self.public_key = self._key.public_key().public_bytes_raw()
        self.key_id = key_id(self.public_key)

    def private_bytes(self) -> bytes:
        return self._key.private_bytes_raw()

    def open(self, sealed: bytes, record: bytes) -> bytes:
        """Tampered ``capture.tampered`` unless it was sealed to this key for that very record."""
        try:
            return _suite().decrypt(sealed, self._key, info=_LABEL + record)
        except (InvalidTag, ValueError):
            raise Tampered(
                "capture.tampered", "what was captured does not open: it was altered, or is of another record"
            ) from None

    def __repr__(self) -> str:
        return f"CaptureKey(key_id={self.key_id!r})"


def _bad_key(why: str) -> NoReturn:
    raise UsageError("capture.bad_key", why, hint="strongroom capture keygen FILE") from None


def _suite() -> Suite:
    return Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
