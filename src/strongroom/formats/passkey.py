"""A passkey's assertion, in the place of a statement's signature (spec/ledger.md, section 10; W3C Web Authentication,
Level 3, section 7.2).

The challenge is the SHA-256 of what would be signed otherwise: the assertion is over that very statement, and whoever
has the log can check it.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
from dataclasses import dataclass
from typing import Any

from strongroom.errors import Tampered

RP = "localhost"  # the page is the client's own, on the machine of whoever decides
_ORIGIN = re.compile(r"http://localhost(:[1-9][0-9]{0,4})?", re.ASCII)
_VERSION = 1
_DATA_LEAST, _MOST = 37, 4096
_PRESENT, _VERIFIED = 0x01, 0x04


@dataclass(frozen=True)
class Assertion:
    """`data`: authenticatorData; `client`: clientDataJSON; `signature`: over `data` and the SHA-256 of `client`."""

    data: bytes
    client: bytes
    signature: bytes

    def encode(self) -> bytes:
        """``1 ‖ length 2 ‖ data ‖ length 2 ‖ client ‖ signature``, lengths big-endian."""
        sized = b"".join(len(part).to_bytes(2, "big") + part for part in (self.data, self.client))
        return bytes([_VERSION]) + sized + self.signature

    @classmethod
    def decode(cls, encoded: bytes) -> Assertion:
        """The reverse; Tampered ``passkey.malformed``."""
        if not encoded or encoded[0] != _VERSION or len(encoded) > _MOST:
            raise _malformed("it is of another version, or too large")
        parts, at = [], 1
        for _ in range(2):
            end = at + 2 + int.from_bytes(encoded[at : at + 2], "big")
            if end > len(encoded) or at + 2 > len(encoded):
                raise _malformed("it is cut off")
            parts.append(encoded[at + 2 : end])
            at = end
        if len(parts[0]) < _DATA_LEAST or at == len(encoded):
            raise _malformed("a part of it is missing")
        return cls(parts[0], parts[1], encoded[at:])

    @property
    def count(self) -> int:
        """The authenticator's signature counter; 0 for one that does not count."""
        return int.from_bytes(self.data[33:37], "big")

    @property
    def signed(self) -> bytes:
        """What the authenticator has signed (step 20)."""
        return self.data + hashlib.sha256(self.client).digest()

    def check(self, challenge: bytes) -> None:
        """Tampered ``passkey.refused`` unless it is an assertion over `challenge`, made on the client's own page by
        somebody whom the authenticator has verified. Numbers are those of section 7.2."""
        # Steps 8 and 9. Of two members of one name, another reader may take the other.
        try:
            said = json.loads(self.client.decode("utf-8"), object_pairs_hook=_unique)
        except (ValueError, RecursionError):
            raise _refused("its client data is not JSON") from None
        if not isinstance(said, dict):
            raise _refused("its client data is no object")
        # Step 10.
        if said.get("type") != "webauthn.get":
            raise _refused("it is not the assertion of a passkey")
        # Step 11: this very statement.
        expected = base64.urlsafe_b64encode(challenge).rstrip(b"=").decode()
        if not isinstance(said.get("challenge"), str) or not hmac.compare_digest(
            said["challenge"].encode("utf-8", "replace"), expected.encode()
        ):
            raise _refused("it is over another statement")
        # Steps 12 and 13: no other page, and no page within another.
        origin = said.get("origin")
        if not isinstance(origin, str) or not _ORIGIN.fullmatch(origin):
            raise _refused("it was made for another page than the client's own")
        if said.get("crossOrigin", False) is not False or "topOrigin" in said:
            raise _refused("it was made within another page")
        # Step 14.
        if not hmac.compare_digest(self.data[:32], hashlib.sha256(RP.encode()).digest()):
            raise _refused("it is for another relying party")
        # Steps 15 and 16: somebody was there, and it was the one whom the authenticator knows.
        if self.data[32] & (_PRESENT | _VERIFIED) != _PRESENT | _VERIFIED:
            raise _refused("the authenticator has not verified who was there")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _malformed(why: str) -> Tampered:
    return Tampered("passkey.malformed", f"a passkey's assertion is malformed: {why}")


def _refused(why: str) -> Tampered:
    return Tampered("passkey.refused", f"the passkey's assertion does not hold: {why}")
