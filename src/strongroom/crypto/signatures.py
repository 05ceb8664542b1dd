"""Ed25519 signatures (RFC 8032).

What is signed, and how bytes of one kind are kept from passing for another, is the business of the formats: every one
of them signs under its own domain (DSSE payload type, signed note, ledger entry).
"""

from __future__ import annotations

import hashlib

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from strongroom.errors import Tampered, UsageError

SEED_BYTES = 32
PUBLIC_KEY_BYTES = 32


def key_id(public_key: bytes) -> str:
    """The SHA-256 of the raw 32-byte public key, in hex: how manifests and notes name it."""
    return hashlib.sha256(public_key).hexdigest()


class Signer:
    """An Ed25519 private key."""

    def __init__(self, seed: bytes) -> None:
        """From the 32-byte seed (RFC 8032 section 5.1.5); UsageError when it has another size."""
        if len(seed) != SEED_BYTES:
            raise UsageError("signature.bad_seed", f"an Ed25519 seed has {SEED_BYTES} bytes, not {len(seed)}")
        self._key = Ed25519PrivateKey.from_private_bytes(seed)
        self.public_key = self._key.public_key().public_bytes_raw()

    @property
    def key_id(self) -> str:
        return key_id(self.public_key)

    def sign(self, data: bytes) -> bytes:
        """The 64-byte signature over `data`; the same for the same data."""
        return self._key.sign(data)

    def __repr__(self) -> str:
        return f"Signer(key_id={self.key_id!r})"


def verify(public_key: bytes, signature: bytes, data: bytes) -> None:
    """Tampered("signature.invalid") unless `signature` is that of the 32-byte `public_key` over `data`."""
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, data)
    except (InvalidSignature, ValueError):  # ValueError: no public key, by its size
        raise Tampered(
            "signature.invalid",
            "the signature does not belong to these bytes and this public key",
            key_id=key_id(public_key),
        ) from None
