"""RFC 9180 in base mode, written from the RFC and from nothing of ours: DHKEM(X25519, HKDF-SHA256), HKDF-SHA256,
AES-256-GCM."""

from __future__ import annotations

import hmac

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

KEM, SUITE = b"KEM\x00\x20", b"HPKE\x00\x20\x00\x01\x00\x02"


def extract(suite: bytes, salt: bytes, label: bytes, ikm: bytes) -> bytes:
    return hmac.digest(salt or bytes(32), b"HPKE-v1" + suite + label + ikm, "sha256")


def expand(suite: bytes, prk: bytes, label: bytes, info: bytes, size: int) -> bytes:
    """One block of HKDF is enough: 32 bytes at most are wanted."""
    whole = size.to_bytes(2, "big") + b"HPKE-v1" + suite + label + info
    return hmac.digest(prk, whole + b"\x01", "sha256")[:size]


def open_base(private: bytes, sealed: bytes, info: bytes) -> bytes:
    """What was sealed to the public half of `private`: 32 bytes of encapsulated key, then the ciphertext."""
    own = X25519PrivateKey.from_private_bytes(private)
    enc, ciphertext = sealed[:32], sealed[32:]
    shared = own.exchange(X25519PublicKey.from_public_bytes(enc))
    context = enc + own.public_key().public_bytes_raw()
    secret = expand(KEM, extract(KEM, b"", b"eae_prk", shared), b"shared_secret", context, 32)
    schedule = b"\x00" + extract(SUITE, b"", b"psk_id_hash", b"") + extract(SUITE, b"", b"info_hash", info)
    prk = extract(SUITE, secret, b"secret", b"")
    key, nonce = expand(SUITE, prk, b"key", schedule, 32), expand(SUITE, prk, b"base_nonce", schedule, 12)
    return AESGCM(key).decrypt(nonce, ciphertext, b"")
