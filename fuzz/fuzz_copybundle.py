"""Any bytes into a copy bundle: only Strongroom's errors come out, and what is accepted has one spelling."""

from __future__ import annotations

import atheris
from harness import fuzz, one_spelling

with atheris.instrument_imports():
    from strongroom.formats.copybundle import PIECE, CopiedFile, CopyBundle


def seeds() -> dict[str, bytes]:
    """One that holds together."""
    files = (CopiedFile("config.json", 0, 10), CopiedFile("model.safetensors", 16, 900))
    names = ("acme/tiny@1", "user/ana", b"k" * 32, PIECE, 1000, files, True)
    return {"whole": CopyBundle(b"r" * 16, b"v" * 16, 1, b"m" * 32, b"s" * 32, *names).encode()}


if __name__ == "__main__":
    fuzz(one_spelling(CopyBundle.decode, CopyBundle.encode), seeds())
