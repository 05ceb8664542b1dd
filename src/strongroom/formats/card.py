"""The card of a served room (spec/http.md, section 4): what a client believes, given to it beforehand."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from strongroom.core import canonical
from strongroom.errors import LimitExceeded, Tampered
from strongroom.formats.suites import FORMAT, check_format

_MOST = 64 * 1024
_PEM = re.compile(
    r"-----BEGIN CERTIFICATE-----\n(?:[A-Za-z0-9+/=]{1,76}\n){1,500}-----END CERTIFICATE-----\n?", re.ASCII
)
_URL = re.compile(r"https://(?:[a-zA-Z0-9.\-]+|\[([0-9a-fA-F:.]+)\])(?::([1-9][0-9]{0,4}))?", re.ASCII)


@dataclass(frozen=True)
class Card:
    """`room`: 16 bytes; `log_key` and `signer`: the 32-byte public keys of log and manifests; `authority`: the PEM of
    the one certificate authority that is believed."""

    url: str
    room: bytes
    log_key: bytes
    signer: bytes
    authority: str

    def encode(self) -> bytes:
        return canonical.encode(
            {
                "ca": self.authority,
                "format": FORMAT,
                "log": self.log_key.hex(),
                "room": self.room.hex(),
                "signer": self.signer.hex(),
                "url": self.url,
            }
        )

    @classmethod
    def decode(cls, data: bytes) -> Card:
        """Tampered ``card.malformed``, CannotVerify ``format.unknown``."""
        if len(data) > _MOST:
            raise LimitExceeded("card.too_large", f"a card of {len(data)} bytes")
        value = canonical.decode(data, what="the card of the room")
        if not isinstance(value, dict) or value.keys() != {"ca", "format", "log", "room", "signer", "url"}:
            raise _malformed("it does not have exactly the members of one")
        check_format(value["format"], "this card")
        texts = {name: value[name] for name in ("ca", "log", "room", "signer", "url")}
        if not all(isinstance(text, str) for text in texts.values()) or not _address(texts["url"]):
            raise _malformed("its address is not https://HOST:PORT")
        # Exactly one: with none, TLS libraries believe every authority that the system does.
        if not _PEM.fullmatch(texts["ca"]):
            raise _malformed("its authority is not one certificate in PEM")
        for name, digits in (("log", 64), ("room", 32), ("signer", 64)):
            if not re.fullmatch(rf"[0-9a-f]{{{digits}}}", texts[name], re.ASCII):
                raise _malformed(f"its {name} is not one")
        room, log_key, signer = (bytes.fromhex(texts[name]) for name in ("room", "log", "signer"))
        return cls(texts["url"], room, log_key, signer, texts["ca"])


def _address(url: str) -> bool:
    found = _URL.fullmatch(url)
    try:
        return found is not None and int(found[2] or 443) < 65536 and bool(ipaddress.IPv6Address(found[1] or "::1"))
    except ValueError:
        return False


def _malformed(why: str) -> Tampered:
    return Tampered("card.malformed", f"this is not the card of a room: {why}")
