"""Reading passes: what a served room lets ciphertext be fetched with (spec/http.md, section 5).

A pass is 24 bytes in base64url: ``expires 8 ‖ tag 16``, the tag HMAC-SHA-256 over label, room and expiry. It names no
version: what it opens is ciphertext, which a store shows to anybody who may read it.
"""

from __future__ import annotations

import base64
import binascii
import hmac

from strongroom.errors import AuthRequired

_LABEL = b"strongroom/1 reading\x00"
_TAG = 16
PASS_LIFE = 86_400  # seconds
_TOLERANCE = 300  # seconds


def make_pass(key: bytes, room: bytes, expires_at: int) -> str:
    """A pass that is good until `expires_at`, in seconds."""
    head = expires_at.to_bytes(8, "big")
    return base64.urlsafe_b64encode(head + _tag(key, room, head)).decode()


def check_pass(text: str, key: bytes, room: bytes, now: int) -> None:
    """AuthRequired ``auth.refused`` for one that is not this room's, or has expired."""
    try:
        data = base64.b64decode(text.encode("ascii"), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        data = b""
    head, tag = data[:8], data[8:]
    good = len(data) == 8 + _TAG and hmac.compare_digest(tag, _tag(key, room, head))
    # Not of more than a day ahead, either, give or take what two servers' clocks differ by: such a one was made while a
    # clock was wrong.
    if not good or not now < int.from_bytes(head, "big") <= now + PASS_LIFE + _TOLERANCE:
        raise AuthRequired("auth.refused", "the pass to read with has expired, or is not one of this room")


def _tag(key: bytes, room: bytes, head: bytes) -> bytes:
    return hmac.digest(key, _LABEL + room + head, "sha256")[:_TAG]
