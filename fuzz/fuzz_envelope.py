"""Any bytes into a DSSE envelope: only Strongroom's errors come out, and what is accepted has one spelling."""

from __future__ import annotations

import atheris
from harness import fuzz

with atheris.instrument_imports():
    from strongroom.errors import StrongroomError
    from strongroom.formats.dsse import Envelope
    from strongroom.formats.manifest import PAYLOAD_TYPE


def seeds() -> dict[str, bytes]:
    """One that holds together."""
    return {"whole": Envelope(PAYLOAD_TYPE, b"payload", (("k" * 64, b"s" * 64),)).encode()}


def TestOneInput(data: bytes) -> None:  # noqa: N802  # the name that fuzzers look for
    try:
        value = Envelope.decode(data, payload_type=PAYLOAD_TYPE)
    except StrongroomError:
        return
    if value.encode() != data:  # one spelling for one value
        raise AssertionError(value)


if __name__ == "__main__":
    fuzz(TestOneInput, seeds())
