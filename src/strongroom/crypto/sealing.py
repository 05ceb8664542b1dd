"""Sealed boxes: a short secret encrypted under a long-lived key, with the purpose that it is for bound in.

Layout (spec/container.md, section Sealed boxes)::

    "SRBX" | version 1 | 3 zero bytes | salt 32 | commitment 32 | AES-256-GCM ciphertext and tag

The box key is derived from the long-lived key, a fresh random salt and the context, and encrypts exactly once, under
the
all-zero nonce: no pair of key and nonce can repeat.
"""

from __future__ import annotations

import os

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from strongroom.crypto.keys import check_commitment, commitment, derive
from strongroom.errors import Tampered, Truncated

_MAGIC = b"SRBX\x01\x00\x00\x00"
_NONCE = bytes(12)
OVERHEAD = len(_MAGIC) + 32 + 32 + 16


def seal(key: bytes, plaintext: bytes, context: str) -> bytes:
    """Encrypt `plaintext` under the 32-byte `key` for `context`, a string that names its one purpose."""
    salt = os.urandom(32)
    box_key = derive(key, "box", salt + context.encode())
    header = _MAGIC + salt + commitment(box_key)
    return header + AESGCM(box_key).encrypt(_NONCE, plaintext, header)


def unseal(key: bytes, box: bytes, context: str) -> bytes:
    """Open a box; Truncated or Tampered when it is not whole, or was sealed under another key or context."""
    if not isinstance(box, bytes):  # it comes from a database, which may hold anything
        raise Tampered("box.malformed", f"a sealed box is bytes, and not {type(box).__name__}")
    if len(box) < OVERHEAD:
        raise Truncated("box.truncated", f"a sealed box has at least {OVERHEAD} bytes, this one {len(box)}")
    header, ciphertext = box[:72], box[72:]
    if header[:8] != _MAGIC:
        raise Tampered("box.malformed", "these bytes are not a sealed box of a version this release reads")
    box_key = derive(key, "box", header[8:40] + context.encode())
    check_commitment(box_key, header[40:], f"the sealed box {context!r}")
    try:
        return AESGCM(box_key).decrypt(_NONCE, ciphertext, header)
    except InvalidTag:
        raise Tampered("box.tampered", f"the sealed box {context!r} was altered") from None
