"""Any bytes into a DSSE envelope: only Strongroom's errors come out, and what is accepted has one spelling."""

from __future__ import annotations

from functools import partial

import atheris
from harness import fuzz, one_spelling

with atheris.instrument_imports():
    from strongroom.formats.dsse import Envelope
    from strongroom.formats.manifest import PAYLOAD_TYPE


def seeds() -> dict[str, bytes]:
    """One that holds together."""
    return {"whole": Envelope(PAYLOAD_TYPE, b"payload", (("k" * 64, b"s" * 64),)).encode()}


if __name__ == "__main__":
    fuzz(one_spelling(partial(Envelope.decode, payload_type=PAYLOAD_TYPE), Envelope.encode, json=True), seeds())
