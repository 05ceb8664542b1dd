"""Any bytes into a key bundle: only Strongroom's errors come out, and what is accepted has one spelling."""

from __future__ import annotations

import atheris
from harness import fuzz, one_spelling

with atheris.instrument_imports():
    from strongroom.formats.bundle import KeyBundle
    from strongroom.formats.suites import Suite


def seeds() -> dict[str, bytes]:
    """One that holds together."""
    keys = (b"m" * 32, b"s" * 32, "user/ana", "acme/tiny@1", b"c" * 32, bytes(2), bytes(32 * 11))
    return {"whole": KeyBundle(Suite.BLAKE3, b"r" * 16, b"v" * 16, 1, *keys).encode()}


if __name__ == "__main__":
    fuzz(one_spelling(KeyBundle.decode, KeyBundle.encode), seeds())
