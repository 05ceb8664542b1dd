"""Any bytes into a recovery share: only Strongroom's errors come out."""

from __future__ import annotations

import atheris
from harness import fuzz

with atheris.instrument_imports():
    from strongroom.crypto.shamir import Share, split
    from strongroom.errors import StrongroomError


def seeds() -> dict[str, bytes]:
    """One that holds together."""
    return {str(share.index): str(share).encode() for share in split(bytes(32), 2, 3, random=bytes)}


def TestOneInput(data: bytes) -> None:  # noqa: N802  # the name that fuzzers look for
    try:
        value = Share.parse(data.decode("utf-8", "surrogateescape"))
    except StrongroomError:
        return
    if Share.parse(str(value)) != value:
        raise AssertionError(value)


if __name__ == "__main__":
    fuzz(TestOneInput, seeds())
