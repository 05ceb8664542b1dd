"""Any bytes into an authority that introduces people or workloads: only Strongroom's errors come out, and what is
accepted stays what it is."""

from __future__ import annotations

import atheris
from harness import fuzz, in_canonical_form

with atheris.instrument_imports():
    from strongroom.errors import StrongroomError
    from strongroom.formats.authority import Authority

PEM = "-----BEGIN CERTIFICATE-----\nMAoDAQ==\n-----END CERTIFICATE-----\n"


def seeds() -> dict[str, bytes]:
    """An identity provider, and a trust domain."""
    return {
        "oidc": Authority("oidc", "https://id.example", "room", "nonce", ("ES256", "RS256")).encode().encode(),
        "x509": Authority("x509", "prod.example", bundle=PEM, longest=3600).encode().encode(),
    }


def TestOneInput(data: bytes) -> None:  # noqa: N802  # the name that fuzzers look for
    for each in (data, in_canonical_form(data)):
        try:
            found = Authority.decode(each.decode("utf-8", "surrogateescape"))
        except StrongroomError:
            continue
        if Authority.decode(found.encode()) != found:
            raise AssertionError(found)


if __name__ == "__main__":
    fuzz(TestOneInput, seeds())
