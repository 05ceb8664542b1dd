"""Any bytes into a passkey's assertion, and into its client data: only Strongroom's errors come out, and what is
accepted has one spelling."""

from __future__ import annotations

import atheris
from harness import fuzz

with atheris.instrument_imports():
    from strongroom.errors import StrongroomError
    from strongroom.formats.passkey import Assertion

CLIENT = b'{"type":"webauthn.get","challenge":"AA","origin":"http://localhost:1","crossOrigin":false}'


def TestOneInput(data: bytes) -> None:  # noqa: N802  # the name that fuzzers look for
    for encoded in (data, Assertion(bytes(37), data[:4000], b"s").encode()):
        try:
            found = Assertion.decode(encoded)
            if found.encode() != encoded:
                raise AssertionError(found)
            found.check(bytes(32))
        except StrongroomError:
            continue


if __name__ == "__main__":
    fuzz(TestOneInput, {"client": CLIENT, "whole": Assertion(bytes(37), CLIENT, b"signature").encode()})
