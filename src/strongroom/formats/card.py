"""The card of a served room (spec/http.md, section 4): what a client believes, given to it beforehand."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Any, Self

from strongroom.core import canonical
from strongroom.errors import LimitExceeded, Tampered
from strongroom.formats.note import COSIGNATURE, VerifierKey
from strongroom.formats.suites import FORMAT, check_format

_MOST = 64 * 1024
_PEM = re.compile(
    r"-----BEGIN CERTIFICATE-----\n(?:[A-Za-z0-9+/=]{1,76}\n){1,500}-----END CERTIFICATE-----\n?", re.ASCII
)
_WITNESS = re.compile(r"https?://[\x21-\x7e]{1,500}", re.ASCII)
_MOST_WITNESSES = 16
_URL = re.compile(r"https://(?:[a-zA-Z0-9.\-]+|\[([0-9a-fA-F:.]+)\])(?::([1-9][0-9]{0,4}))?", re.ASCII)


@dataclass(frozen=True)
class Witnesses:
    """Witnesses, key and address, of which `quorum` have to have cosigned. Tampered ``card.malformed``."""

    named: tuple[tuple[VerifierKey, str], ...]
    quorum: int

    def __post_init__(self) -> None:
        names = {key.name for key, _ in self.named}
        kinds = all(key.algorithm == COSIGNATURE and _WITNESS.fullmatch(url) for key, url in self.named)
        if not kinds or len(names) != len(self.named) or not 1 <= self.quorum <= len(self.named) <= _MOST_WITNESSES:
            raise _malformed("its witnesses are not some with keys, addresses, different names, and a quorum of them")

    def as_json(self) -> dict[str, Any]:
        return {"named": [[key.encode(), url] for key, url in self.named], "quorum": self.quorum}

    @classmethod
    def from_json(cls, value: object) -> Self:
        """The reverse; errors as above, and of `VerifierKey.parse`."""
        if isinstance(value, dict) and value.keys() == {"named", "quorum"} and type(value["quorum"]) is int:
            named = value["named"]
            if isinstance(named, list) and all(_pair(each) for each in named):
                return cls(tuple((VerifierKey.parse(key), url) for key, url in named), value["quorum"])
        raise _malformed("its witnesses are not a list of keys and addresses, and a quorum")


@dataclass(frozen=True)
class Card:
    """`room`: 16 bytes; `log_key` and `signer`: the 32-byte public keys of log and manifests; `authority`: the PEM of
    the one certificate authority that is believed; `witnesses`: who has to have cosigned at a release."""

    url: str
    room: bytes
    log_key: bytes
    signer: bytes
    authority: str
    witnesses: Witnesses | None = None

    def encode(self) -> bytes:
        more = {"witnesses": self.witnesses.as_json()} if self.witnesses is not None else {}
        return canonical.encode(
            {
                **more,
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
        members = {"ca", "format", "log", "room", "signer", "url"}
        if not isinstance(value, dict) or value.keys() - {"witnesses"} != members:
            raise _malformed("it does not have exactly the members of one")
        try:
            check_format(value["format"], "this card")
        except ValueError as error:
            raise _malformed(str(error)) from None
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
        witnesses = Witnesses.from_json(value["witnesses"]) if "witnesses" in value else None
        return cls(texts["url"], room, log_key, signer, texts["ca"], witnesses)


def _pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(each, str) for each in value)


def _address(url: str) -> bool:
    found = _URL.fullmatch(url)
    try:
        return found is not None and int(found[2] or 443) < 65536 and bool(ipaddress.IPv6Address(found[1] or "::1"))
    except ValueError:
        return False


def _malformed(why: str) -> Tampered:
    return Tampered("card.malformed", f"this is not the card of a room: {why}")
