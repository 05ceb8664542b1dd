"""The outer layout of a wrapped key, for backends whose own answer to damaged bytes is slow or unclear.

::

    magic 8 | body | SHA-256(magic, body, context) truncated to 8 bytes

The checksum has no key: who means to alter a wrapped key can recompute it, and then meets the backend's own
authentication. It tells damage and the wrong context from a wrong passphrase or a server's refusal, before either is
asked.
"""

from __future__ import annotations

import hashlib
import hmac

from strongroom.crypto.keys import KEY_BYTES
from strongroom.errors import Tampered, Truncated, UsageError

_CHECK_BYTES = 8
MAX_BYTES = 4096


def close(magic: bytes, body: bytes, context: str) -> bytes:
    """`body` in its envelope; `magic` is 8 bytes and names backend and version."""
    return magic + body + _check(magic + body, context)


def open_(magic: bytes, wrapped: bytes, context: str, least: int) -> bytes:
    """The body, of at least `least` bytes; Truncated or Tampered when `wrapped` is not whole or not for `context`."""
    if len(wrapped) < len(magic) + least + _CHECK_BYTES:
        raise Truncated("keystore.wrapped_truncated", f"{len(wrapped)} bytes are too few for a wrapped key")
    if len(wrapped) > MAX_BYTES or wrapped[: len(magic)] != magic:
        raise Tampered(
            "keystore.wrapped_malformed",
            "these bytes are not a key that this kind of key store wrapped, in a version this release reads",
            hint="strongroom doctor",
        )
    inner, check = wrapped[:-_CHECK_BYTES], wrapped[-_CHECK_BYTES:]
    if not hmac.compare_digest(_check(inner, context), check):
        raise Tampered(
            "keystore.wrapped_damaged",
            f"the wrapped key is damaged, or was not wrapped for {context!r}",
            hint="strongroom doctor",
        )
    return inner[len(magic) :]


def require_key(key: bytes) -> bytes:
    """`key` if it is 32 bytes long; UsageError otherwise."""
    if len(key) != KEY_BYTES:
        raise UsageError("keystore.not_a_key", f"a key store wraps keys of {KEY_BYTES} bytes, not of {len(key)}")
    return key


def require_unwrapped(key: bytes) -> bytes:
    """`key` if it is 32 bytes long; Tampered otherwise, for what came out of a wrapped key."""
    if len(key) != KEY_BYTES:
        raise Tampered("keystore.not_a_key", f"the wrapped key holds {len(key)} bytes where {KEY_BYTES} were expected")
    return key


def _check(inner: bytes, context: str) -> bytes:
    text = context.encode()
    return hashlib.sha256(len(inner).to_bytes(8, "big") + inner + text).digest()[:_CHECK_BYTES]
