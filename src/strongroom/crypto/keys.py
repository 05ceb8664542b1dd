"""The key schedule of spec/container.md, section Keys: which key derives from which, and how a key is committed to."""

from __future__ import annotations

import hashlib
import hmac
import os

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from strongroom.errors import Tampered

KEY_BYTES = 32
_LABEL = b"strongroom/1 "
_ZEROS = memoryview(bytes(1 << 17))
_COMMITMENT = _LABEL + b"commitment\x00"


def random_key() -> bytes:
    """A fresh 256-bit key from the operating system."""
    return os.urandom(KEY_BYTES)


def derive(key: bytes, purpose: str, context: bytes = b"") -> bytes:
    """HKDF-Expand (RFC 5869) with SHA-256: the 32-byte key for `purpose` under a uniformly random `key`."""
    return HKDFExpand(SHA256(), KEY_BYTES, _LABEL + purpose.encode("ascii") + b"\x00" + context).derive(key)


def keystream(key: bytes, size: int, *, offset: int = 0, nonce: bytes = b"") -> bytes:
    """`size` bytes of AES-256-CTR keystream under `key` from byte `offset` (a multiple of 16): a pseudorandom table.

    `nonce`, at most 8 bytes, is what the counter block begins with: a table of its own under the same key."""
    counter = nonce + (offset // 16).to_bytes(16 - len(nonce), "big")
    zeros = _ZEROS[:size] if size <= len(_ZEROS) else bytes(size)
    return Cipher(algorithms.AES(key), modes.CTR(counter)).encryptor().update(zeros)


def scattered_keystream(key: bytes, blocks: bytes) -> bytes:
    """The keystream of `keystream` at whichever counter blocks, 16 bytes each, are wanted: AES of each by itself."""
    return Cipher(algorithms.AES(key), modes.ECB()).encryptor().update(blocks)  # noqa: S305 - counter blocks, no text


def commitment(key: bytes) -> bytes:
    """A 32-byte binding commitment to `key`.

    AES-GCM does not commit: a ciphertext can be made that opens under two keys, to two different plaintexts. With the
    commitment signed beside the ciphertext, only one key is accepted.
    """
    return hashlib.sha256(_COMMITMENT + key).digest()


def check_commitment(key: bytes, expected: bytes, what: object) -> None:
    """Tampered unless `expected` commits to `key`; `what` names the key's place."""
    if not hmac.compare_digest(commitment(key), expected):
        raise Tampered(
            "key.wrong",
            f"the key for {what} is not the one that was committed to when it was sealed",
            hint="use the key bundle or key store that belongs to this version and room",
        )
