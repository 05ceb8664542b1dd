"""Any bytes into a grant: only Strongroom's errors come out."""

from __future__ import annotations

import atheris
from harness import fuzz, one_spelling

with atheris.instrument_imports():
    from strongroom.load.grant import Grant, decode, encode


def seeds() -> dict[str, bytes]:
    """One that holds together."""
    return {"whole": encode([Grant("file:///store", b"bundle"), Grant("s3://bucket/x", b"")])}


if __name__ == "__main__":
    fuzz(one_spelling(decode, encode), seeds())
