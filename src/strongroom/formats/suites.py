"""Cipher suites (spec/container.md, section 2): which hash a container is built with. No negotiation, no fallback."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from enum import IntEnum
from typing import Any

from blake3 import blake3

from strongroom.errors import CannotVerify

FORMAT = 1
DIGEST_BYTES = 32


def check_format(number: object, what: str, *, newest: int = FORMAT) -> None:
    """CannotVerify for a format that this release does not know; ValueError for what is no number of a format."""
    if type(number) is not int or number < 1:
        raise ValueError(f"format {number!r}")
    if number > newest:
        raise CannotVerify(
            "format.unknown",
            f"{what} is of format {number}; this release reads format {newest}",
            hint="install a newer Strongroom, as docs/how-to/install.md says",
        )


class Suite(IntEnum):
    """AES-256-GCM throughout; the hash differs."""

    BLAKE3 = 1
    SHA256 = 2

    @classmethod
    def of(cls, number: object) -> Suite:
        """The suite with this number; CannotVerify for one that this release does not know."""
        if type(number) is int and number in (1, 2):  # True == 1, but is no number of a suite
            return cls(number)
        raise CannotVerify(
            "suite.unknown",
            f"suite {number!r} is not one that this release reads (1: BLAKE3, 2: SHA-256)",
            hint="install a newer Strongroom, as docs/how-to/install.md says",
        )

    @property
    def hasher(self) -> Callable[[Any], Any]:
        """The constructor: ``hasher(data).digest()`` is `H` of the specification."""
        return blake3 if self is Suite.BLAKE3 else hashlib.sha256

    def digest(self, data: bytes | bytearray | memoryview) -> bytes:
        """`H(data)`, 32 bytes."""
        return bytes(self.hasher(data).digest())
