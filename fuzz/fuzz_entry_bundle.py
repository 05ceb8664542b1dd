"""Any bytes into an entry bundle: only Strongroom's errors come out, and what is accepted has one spelling."""

from __future__ import annotations

import atheris
from harness import fuzz, one_spelling

with atheris.instrument_imports():
    from strongroom.formats.tiles import decode_bundle, encode_bundle


def seeds() -> dict[str, bytes]:
    """Few entries, and as many as a bundle has."""
    return {"few": encode_bundle([b"one", b"", b"x" * 300]), "full": encode_bundle([b"entry"] * 256)}


if __name__ == "__main__":
    fuzz(one_spelling(decode_bundle, encode_bundle), seeds())
