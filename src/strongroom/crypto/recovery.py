"""Recovery of a room whose key store is lost: its key, sealed to a key pair whose private half exists as shares only.

The room keeps the public half, so a new room key is sealed for recovery without any share being taken out of its safe.
A sealed room key is::

    "SRRC" | version 1 | 3 zero bytes | recovery public key 32 | HPKE encapsulation 32, ciphertext and tag

HPKE is RFC 9180 in base mode, DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, AES-256-GCM, its info being the label, the room
id and the recovery public key. Base mode does not say who sealed: anybody who can write to the database could put a key
of their own there. What comes out is the room's key only if it also opens what the room's key opens; the caller checks
that.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

from strongroom.crypto.keys import KEY_BYTES, derive
from strongroom.crypto.shamir import Share, combine, split
from strongroom.crypto.signatures import Signer
from strongroom.errors import Tampered, Truncated, UsageError

PUBLIC_KEY_BYTES = 32
_MAGIC = b"SRRC\x01\x00\x00\x00"
_LABEL = b"strongroom/1 recovery\x00"
_HEAD = len(_MAGIC) + PUBLIC_KEY_BYTES
SEALED_BYTES = _HEAD + 32 + KEY_BYTES + 16


def create_recovery(k: int, n: int) -> tuple[bytes, list[Share]]:
    """A new recovery key: its 32-byte public half, and the private half as `n` shares of which `k` are needed."""
    private = X25519PrivateKey.generate()
    return private.public_key().public_bytes_raw(), split(private.private_bytes_raw(), k, n)


def signer_of(shares: Sequence[Share]) -> Signer:
    """What the shares sign with: an Ed25519 key of the recovery key (spec/ledger.md, section 11). UsageError for shares
    that are too few or do not belong together."""
    return Signer(derive(combine(shares), "reinstate"))


def seal_for_recovery(public_key: bytes, room_key: bytes, room_id: bytes) -> bytes:
    """The 32-byte `room_key`, sealed so that only the shares of `public_key` open it, and only for `room_id`.

    UsageError when `public_key` is not one, or `room_key` has another size.
    """
    if len(room_key) != KEY_BYTES:
        raise UsageError("recovery.not_a_key", f"a room key has {KEY_BYTES} bytes, not {len(room_key)}")
    try:
        key = X25519PublicKey.from_public_bytes(public_key)
        sealed = _suite().encrypt(room_key, key, info=_info(room_id, public_key))
    except ValueError:  # a wrong size, or a point of small order, under which the secret would be known to all
        raise UsageError("recovery.bad_public_key", "this is not the public half of a recovery key") from None
    return _MAGIC + public_key + sealed


def open_with_shares(sealed: bytes, shares: Sequence[Share], room_id: bytes) -> bytes:
    """The 32-byte room key. Changes nothing, so it is also the drill that proves the shares.

    UsageError for shares that are too few or do not belong together or to this room; Truncated or Tampered when
    `sealed` is not whole, was altered, or is another room's.
    """
    if len(sealed) < SEALED_BYTES:
        raise Truncated("recovery.truncated", f"a sealed room key has {SEALED_BYTES} bytes, this one {len(sealed)}")
    if len(sealed) > SEALED_BYTES or sealed[: len(_MAGIC)] != _MAGIC:
        raise Tampered("recovery.malformed", "these bytes are not a sealed room key of a version this release reads")
    private = X25519PrivateKey.from_private_bytes(combine(shares))
    public_key = sealed[len(_MAGIC) : _HEAD]
    if not hmac.compare_digest(private.public_key().public_bytes_raw(), public_key):
        raise UsageError(
            "recovery.other_key",
            f"the shares of set {shares[0].set_id.hex()} belong to another recovery key than this room key's",
            hint="use the shares that were made for this room last",
        )
    try:
        return _suite().decrypt(sealed[_HEAD:], private, info=_info(room_id, public_key))
    except InvalidTag:
        raise Tampered("recovery.tampered", "the sealed room key was altered, or belongs to another room") from None


def _suite() -> Suite:
    return Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)


def _info(room_id: bytes, public_key: bytes) -> bytes:
    return _LABEL + len(room_id).to_bytes(2, "big") + room_id + public_key
