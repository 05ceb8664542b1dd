"""Signatures under statements: Ed25519, or the assertion of a passkey (ES256, EdDSA, RS256)."""

from __future__ import annotations

import hashlib

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key

from strongroom.crypto import signatures
from strongroom.errors import Tampered, UsageError
from strongroom.formats.passkey import Assertion

_RSA_LEAST = 2048
_KEY_MOST = 1024  # bytes of an encoded public key


def check_key(encoded: bytes) -> None:
    """UsageError ``passkey.key`` unless `encoded` is the SubjectPublicKeyInfo, in DER, of a key that a passkey may
    have: P-256, Ed25519, RSA from 2048 bits; in its one encoding."""
    try:
        key = load_der_public_key(encoded[:_KEY_MOST])
    except (ValueError, UnsupportedAlgorithm):  # a point that is not on the curve, too
        raise _bad("it is not one") from None
    if isinstance(key, ec.EllipticCurvePublicKey):
        fits = isinstance(key.curve, ec.SECP256R1)
    elif isinstance(key, rsa.RSAPublicKey):
        fits = key.key_size >= _RSA_LEAST
    else:
        fits = isinstance(key, Ed25519PublicKey)
    if not fits:
        raise _bad("it is neither P-256 nor Ed25519 nor RSA of at least 2048 bits")
    if key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo) != encoded:
        raise _bad("it is not in its one encoding")


def verify(key: bytes, signature: bytes, message: bytes) -> None:
    """Tampered unless `signature` is that of `key` over `message`: of 32 bytes an Ed25519 key, else a passkey's, whose
    assertion has SHA-256 of `message` as its challenge."""
    if len(key) == signatures.PUBLIC_KEY_BYTES:
        signatures.verify(key, signature, message)
        return
    assertion = Assertion.decode(signature)
    assertion.check(hashlib.sha256(message).digest())
    try:
        public = load_der_public_key(key)
        # Step 20 of section 7.2.
        if isinstance(public, ec.EllipticCurvePublicKey):
            public.verify(assertion.signature, assertion.signed, ec.ECDSA(SHA256()))
        elif isinstance(public, rsa.RSAPublicKey):
            public.verify(assertion.signature, assertion.signed, padding.PKCS1v15(), SHA256())
        elif isinstance(public, Ed25519PublicKey):
            public.verify(assertion.signature, assertion.signed)
        else:
            raise Tampered("passkey.key", "the key of a passkey is of no kind that passkeys have")
    except (InvalidSignature, ValueError, UnsupportedAlgorithm):
        raise Tampered("signature.invalid", "the assertion is not one of this passkey") from None


def _bad(why: str) -> UsageError:
    return UsageError("passkey.key", f"the public key of the passkey does not do: {why}", hint="strongroom passkey add")
