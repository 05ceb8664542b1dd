"""Any bytes into a manifest's payload: only Strongroom's errors come out, and what is accepted has one spelling."""

from __future__ import annotations

import atheris
from harness import fuzz, one_spelling

with atheris.instrument_imports():
    from strongroom.formats.manifest import COMMON, MARKED, Manifest, PackEntry
    from strongroom.formats.suites import Suite


def seeds() -> dict[str, bytes]:
    """One that holds together."""
    common = (PackEntry(b"a" * 32, COMMON, 0, 3, b"d" * 32),)
    marked = (PackEntry(b"b" * 32, MARKED, 0, 5, b"e" * 32),)
    ids = (Suite.BLAKE3, b"r" * 16, b"v" * 16, 1)
    return {"whole": Manifest(*ids, 10_000, 4096, common, 5, 4096, marked, 4200, b"i" * 32).encode()}


if __name__ == "__main__":
    fuzz(one_spelling(Manifest.decode, Manifest.encode, json=True), seeds())
