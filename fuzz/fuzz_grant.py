"""Any bytes into a grant: only Strongroom's errors come out."""

from __future__ import annotations

import atheris
from harness import fuzz

with atheris.instrument_imports():
    from strongroom.errors import StrongroomError
    from strongroom.load.grant import Grant, decode, encode


def seeds() -> dict[str, bytes]:
    """One that holds together."""
    return {"whole": encode([Grant("file:///store", b"bundle"), Grant("s3://bucket/x", b"")])}


def TestOneInput(data: bytes) -> None:  # noqa: N802  # the name that fuzzers look for
    try:
        value = decode(data)
    except StrongroomError:
        return
    if encode(value) != data:
        raise AssertionError(value)


if __name__ == "__main__":
    fuzz(TestOneInput, seeds())
