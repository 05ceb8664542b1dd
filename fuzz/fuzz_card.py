"""Any bytes into the card of a room: only Strongroom's errors come out, and what is accepted has one spelling."""

from __future__ import annotations

import atheris
from harness import fuzz, one_spelling

with atheris.instrument_imports():
    from strongroom.formats.card import Card, Witnesses
    from strongroom.formats.note import COSIGNATURE, VerifierKey

WITNESS = VerifierKey("w.example", COSIGNATURE, bytes(32))
PEM = "-----BEGIN CERTIFICATE-----\nMAoDAQ==\n-----END CERTIFICATE-----\n"


def seeds() -> dict[str, bytes]:
    """One with witnesses, and one without."""
    parts = ("https://room.example:8443", bytes(16), bytes(32), bytes(32), PEM)
    return {
        "plain": Card(*parts).encode(),
        "witnesses": Card(*parts, Witnesses(((WITNESS, "https://w.example"),), 1)).encode(),
    }


if __name__ == "__main__":
    fuzz(one_spelling(Card.decode, Card.encode, json=True), seeds())
