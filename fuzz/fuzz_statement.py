"""Any bytes into a signed statement, as a whole and as its payload: only Strongroom's errors come out, and what is
accepted has one spelling."""

from __future__ import annotations

import atheris
from harness import fuzz

with atheris.instrument_imports():
    from strongroom.core import canonical
    from strongroom.crypto.signatures import Signer
    from strongroom.errors import StrongroomError
    from strongroom.formats.dsse import Envelope
    from strongroom.formats.statement import PAYLOAD_TYPE, Statement


def seeds() -> dict[str, bytes]:
    """Some that hold together, and a payload without its envelope."""
    digest, known = "d" * 64, {"room": "ab" * 16, "by": "user/ana", "at": 5, "nonce": "0" * 32}
    bodies = {
        "approve": {"request": digest, "duration": 60, "uses": None},
        "renew": {"lease": "0" * 16, "duration": 60},
        "revoke": {"target": "user/ana", "reason": digest},
        "apikey": {"key": digest, "principal": "user/ana", "name": "ci", "expires_at": 9, "state": "active"},
    }
    made = {kind: Statement.sign(kind, body, signer=Signer(bytes(32)), **known) for kind, body in bodies.items()}
    return {
        **{kind: statement.envelope.encode() for kind, statement in made.items()},
        "payload": made["approve"].payload,
    }


def TestOneInput(data: bytes) -> None:  # noqa: N802  # the name that fuzzers look for
    wrapped = Envelope(PAYLOAD_TYPE, data, (("key", b"signature"),)).encode()
    for envelope in (data, wrapped):
        try:
            found = Statement.decode(envelope.decode("utf-8", "surrogateescape"))
        except StrongroomError:
            continue
        said = {"statement": found.kind, "room": found.room, "by": found.by, "at": found.at, "nonce": found.nonce}
        if canonical.encode({**said, "body": found.body}) != found.payload:
            raise AssertionError(found)
        if Envelope.decode(envelope, payload_type=PAYLOAD_TYPE).encode() != envelope:
            raise AssertionError(envelope)


if __name__ == "__main__":
    fuzz(TestOneInput, seeds())
