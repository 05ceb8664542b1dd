"""API keys of the gateway (spec/ledger.md, section 12): their text, and what bounds them."""

from __future__ import annotations

import base64
import hashlib
import re
import secrets

NAME = re.compile(r"(?!.*\.\.)[a-z0-9][a-z0-9._-]{0,63}", re.ASCII)  # a part of the path grammar (core/ids.py)
LONGEST = 366 * 86_400  # seconds
MOST = 32  # that are good at one time, of one principal
_TEXT = re.compile(r"sr-[A-Za-z0-9_-]{43}", re.ASCII)
_BYTES = 32


def make() -> str:
    """A new key: ``sr-`` and 32 random bytes in base64url. Secret."""
    return "sr-" + base64.urlsafe_b64encode(secrets.token_bytes(_BYTES)).rstrip(b"=").decode()


def is_one(text: str) -> bool:
    """Whether `text` has the form of a key."""
    return _TEXT.fullmatch(text) is not None


def digest_of(text: str) -> str:
    """What the log has of a key: SHA-256 of its text, in hexadecimal. 256 random bits need no slow hash."""
    return hashlib.sha256(text.encode()).hexdigest()
