"""Any bytes into the trailer of a pack: only Strongroom's errors come out, and what is accepted has one spelling."""

from __future__ import annotations

import atheris
from harness import fuzz, one_spelling

with atheris.instrument_imports():
    from strongroom.formats.pack import Trailer
    from strongroom.formats.suites import Suite


def seeds() -> dict[str, bytes]:
    """One that holds together."""
    return {
        "common": Trailer.common(Suite.BLAKE3, 0, 4096, 100, b"p" * 32, b"k" * 32, [b"1" * 32, b"2" * 32]).encode(),
        "marked": Trailer.marked(Suite.SHA256, 3, 4096, b"p" * 32, [(b"1" * 32,) * 4]).encode(),
    }


if __name__ == "__main__":
    fuzz(one_spelling(Trailer.decode, Trailer.encode), seeds())
