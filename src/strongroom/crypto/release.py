"""The cryptography of a release (spec/release.md): challenges, and key bundles sealed to a key of the receiver's."""

from __future__ import annotations

import hmac
import os
from functools import cache

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

from strongroom.errors import AuthRequired, Tampered, UsageError

CHALLENGE_LIFE = 300  # seconds
_CHALLENGE = b"strongroom/1 challenge\x00"
_RELEASE = b"strongroom/1 release\x00"
_TAG = 16


def make_challenge(key: bytes, room: bytes, era: int, now: int) -> bytes:
    """A challenge of 32 bytes that any replica recognises and none has to remember. `era`: that of the log's state."""
    head = now.to_bytes(8, "big") + os.urandom(8)
    return head + _tag(key, room, era, head)


def check_challenge(challenge: bytes, key: bytes, room: bytes, era: int, now: int) -> None:
    """AuthRequired ``challenge.foreign`` or ``challenge.expired``. That it is used once is the log's to say."""
    head, tag = challenge[:16], challenge[16:]
    if len(challenge) != 32 or not hmac.compare_digest(tag, _tag(key, room, era, head)):
        raise AuthRequired("challenge.foreign", "the challenge is not one of this room", hint="ask for a new one")
    age = now - int.from_bytes(head[:8], "big")
    if not -CHALLENGE_LIFE <= age <= CHALLENGE_LIFE:
        raise AuthRequired(
            "challenge.expired",
            f"the challenge is {age} seconds old; it is good for {CHALLENGE_LIFE}",
            hint="ask for a new one",
        )


def _tag(key: bytes, room: bytes, era: int, head: bytes) -> bytes:
    return hmac.digest(key, _CHALLENGE + room + era.to_bytes(8, "big") + head, "sha256")[:_TAG]


@cache
def _probe() -> X25519PrivateKey:
    """A key to try others with; what it agrees on with them is thrown away."""
    return X25519PrivateKey.generate()


def check_receiver(public_key: bytes) -> None:
    """UsageError ``release.bad_key`` for a key that nothing can be sealed to: to be known before anything is
    recorded."""
    try:
        _probe().exchange(X25519PublicKey.from_public_bytes(public_key))
    except ValueError:  # a point of small order: whoever listens could compute the secret
        raise _bad_key() from None


class ReleaseKey:
    """The receiver's X25519 key for one release."""

    def __init__(self) -> None:
        self._private = X25519PrivateKey.generate()
        self.public_key = self._private.public_key().public_bytes_raw()

    def open(self, sealed: bytes, index: int, leaf: bytes) -> bytes:
        """The encoded bundle; Tampered ``release.tampered`` unless sealed to this key for that very entry."""
        try:
            return _suite().decrypt(sealed, self._private, info=_info(index, leaf))
        except (InvalidTag, ValueError):
            raise Tampered(
                "release.tampered", "the released keys do not open: they were altered, or are for another entry"
            ) from None


def seal_bundle(bundle: bytes, public_key: bytes, index: int, leaf: bytes) -> bytes:
    """`bundle`, for the holder of `public_key` (32 bytes) and the log's entry `index` with the hash `leaf`."""
    try:
        return _suite().encrypt(bundle, X25519PublicKey.from_public_bytes(public_key), info=_info(index, leaf))
    except ValueError:
        raise _bad_key() from None


def _bad_key() -> UsageError:
    return UsageError("release.bad_key", "the public key of the request is not an X25519 key")


def _suite() -> Suite:
    return Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)


def _info(index: int, leaf: bytes) -> bytes:
    return _RELEASE + index.to_bytes(8, "big") + leaf
