"""Signed statements: what a principal decides, under that principal's key (spec/ledger.md, section 4)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, Protocol

from strongroom.core import canonical
from strongroom.core.limits import LIMITS
from strongroom.errors import LimitExceeded, Tampered, UsageError
from strongroom.formats.dsse import Envelope, pre_authentication_encoding
from strongroom.formats.entry import (
    COUNT,
    DIGEST,
    FLAG,
    FORM,
    GRANTING,
    ID,
    KEPT,
    KEY,
    LEASED,
    METHOD,
    SHORT,
    STATE,
    TEXT,
    TEXTS,
    Kind,
    conforms,
    one_of,
    or_empty,
    or_null,
    with_optional,
)
from strongroom.formats.passkey import Assertion

_ED25519 = 64  # bytes of such a signature; an assertion has more
PAYLOAD_TYPE = "application/vnd.strongroom.statement+json"


class Signing(Protocol):
    """What signs; `strongroom.crypto.signatures.Signer` is one."""

    @property
    def key_id(self) -> str: ...

    def sign(self, data: bytes) -> bytes: ...


_MEMBERS = {"statement": TEXT, "room": ID, "by": TEXT, "at": COUNT, "nonce": ID}


BODIES: dict[str, dict[str, Kind]] = {
    "request": {
        "action": LEASED,
        "ref": TEXT,
        "for": TEXT,
        "duration": COUNT,
        "uses": or_null(COUNT),
        "reason": DIGEST,
    },
    "approve": {"request": DIGEST, "duration": COUNT, "uses": or_null(COUNT)},
    "deny": {"request": DIGEST, "reason": DIGEST},
    "renew": {"lease": SHORT, "duration": COUNT},
    "revoke": {"target": TEXT, "reason": DIGEST},
    "release": {
        "action": one_of("load", "copy"),
        "ref": TEXT,
        "holder": TEXT,
        "public_key": DIGEST,
        "challenge": DIGEST,
        "break_glass": FLAG,
        "reason": or_empty(DIGEST),
    },
    "call": {"method": TEXT, "path": TEXT, "body": DIGEST},
    "propose": {"digest": DIGEST, "reason": DIGEST},
    "principal": {  # null: as it is in the record `before`
        "principal": TEXT,
        "key": or_null(or_empty(DIGEST)),
        "person": or_null(TEXT),
        "roles": or_null(TEXTS),
        "teams": or_null(TEXTS),
        "state": or_null(STATE),
        "before": or_null(COUNT),
    },
    "authority": {"authority": TEXT, "text": TEXT},
    "passkey": {"key": KEY, "credential": TEXT, "state": one_of("active", "removed")},
    "login": {"method": METHOD, "authority": TEXT, "public_key": DIGEST, "duration": COUNT},
    "put": {"name": TEXT, "files": DIGEST},
    "rotate": {"ref": TEXT},
    "shred": {"ref": TEXT},
    "copy": {"ref": TEXT, "holder": TEXT, "release": COUNT, "files": COUNT, "bytes": COUNT},
    "trace": {"suspect": DIGEST, "ref": or_null(TEXT), "lease": or_null(SHORT)},
    "enact": {"proposal": SHORT, "reason": or_empty(DIGEST)},
    "ceiling": {"ref": TEXT, "holders": COUNT, "copies": COUNT, "copiers": COUNT},
    "thaw": {"ref": TEXT, "reason": DIGEST},
    "clock": {"reason": DIGEST},
    "redact": {"entry": COUNT},
    "review": {"size": COUNT, "findings": COUNT, "removed": COUNT},
    "keystore": {"operation": one_of("rotate"), "epoch": COUNT},
    "reinstate": {"principal": TEXT, "key": or_empty(DIGEST), "role": GRANTING, "reason": DIGEST},
    "apikey": {"key": DIGEST, "principal": TEXT, "name": TEXT, "expires_at": COUNT, "state": KEPT},
    "inference": {
        "account": COUNT,
        "ref": TEXT,
        "gateway": ID,
        "records": COUNT,
        "head": DIGEST,
        **dict.fromkeys(("requests", "refused", "tokens", "bits"), COUNT),
        "settings": DIGEST,
    },
}


_OPTIONAL: dict[str, dict[str, Kind]] = {
    "principal": {"subject": or_null(DIGEST)},
    "release": {"form": FORM},
    "inference": {"capture": DIGEST},
}


@dataclass(frozen=True)
class Statement:
    """A statement by a principal. Parsed, it is only that: `verify` says whether the principal made it."""

    kind: str
    room: str
    by: str
    at: int
    nonce: str
    body: Mapping[str, Any]
    envelope: str = field(repr=False, compare=False)
    _verified: str = field(default="", init=False, repr=False, compare=False)

    @classmethod
    def sign(
        cls,
        kind: str,
        body: Mapping[str, Any],
        *,
        room: str,
        by: str,
        at: int,
        signer: Signing,
        nonce: str = "",
    ) -> Statement:
        """A new statement under the key of `signer`; ValueError when `body` is not one of `kind` (a fault of ours)."""
        value = {"statement": kind, "room": room, "by": by, "at": at, "nonce": nonce or os.urandom(16).hex()}
        try:
            payload = canonical.encode({**value, "body": dict(body)})
        except UnicodeEncodeError:  # half a surrogate pair: an argument of the command line that is not UTF-8
            raise UsageError("statement.text", "what is to be signed is not text") from None
        signature = signer.sign(pre_authentication_encoding(PAYLOAD_TYPE, payload))
        envelope = Envelope(PAYLOAD_TYPE, payload, ((signer.key_id, signature),)).encode().decode()
        try:
            return cls.decode(envelope)
        except Tampered as error:
            raise ValueError(f"not a statement of the kind {kind}: {error.message}") from None

    @classmethod
    def decode(cls, envelope: str) -> Statement:
        """Parse; Tampered ``statement.malformed`` or what `Envelope.decode` raises. The same text gives the same object
        for a while: a statement is read by whoever receives it, by the fold, and by whoever looks at its entry."""
        return _decoded(envelope)

    @classmethod
    def _of(cls, envelope: str) -> Statement:
        if len(envelope) > LIMITS.entry:
            raise LimitExceeded("statement.too_large", f"a statement of {len(envelope)} characters")
        try:
            data = envelope.encode()
        except UnicodeEncodeError:
            raise _malformed("it is not text") from None
        parsed = Envelope.decode(data, payload_type=PAYLOAD_TYPE)
        if len(parsed.signatures) != 1:
            raise _malformed("it does not have exactly one signature")
        value = canonical.decode(parsed.payload, what="a statement")
        if not isinstance(value, dict) or not isinstance(value.get("body"), dict):
            raise _malformed("it has no body")
        body = value.pop("body")
        if not conforms(value, _MEMBERS):
            raise _malformed("it does not have exactly the members of one")
        members = BODIES.get(value["statement"])
        if members is not None and value["statement"] in _OPTIONAL:
            members = with_optional(members, _OPTIONAL[value["statement"]], body)
        if members is None or not conforms(body, members):
            raise _malformed(f"its body is not that of the kind {value['statement']!r:.40}")
        found = cls(value["statement"], value["room"], value["by"], value["at"], value["nonce"], body, envelope)
        vars(found)["_parsed"] = parsed  # what is asked for next, of every statement, several times
        return found

    @cached_property
    def _parsed(self) -> Envelope:
        return Envelope.decode(self.envelope.encode(), payload_type=PAYLOAD_TYPE)

    @property
    def payload(self) -> bytes:
        """The signed bytes."""
        return self._parsed.payload

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the payload in hexadecimal: what an approval names."""
        return hashlib.sha256(self.payload).hexdigest()

    @property
    def key_id(self) -> str:
        """What the signature says of the key that made it: SHA-256 of the public key in hexadecimal, or any text."""
        ((key_id, _),) = self._parsed.signatures
        return key_id

    @property
    def count(self) -> int:
        """The signature counter of the passkey that made this; 0 for every other key. Tampered for what is neither."""
        ((_, signature),) = self._parsed.signatures
        return 0 if len(signature) == _ED25519 else Assertion.decode(signature).count

    @property
    def id(self) -> str:
        """The identifier of what this statement begins: the first 16 digits of `digest`."""
        return self.digest[:16]

    def verify(self, public_key: str, verify: Callable[[bytes, bytes, bytes], None]) -> None:
        """Tampered unless signed by `public_key` (64 hexadecimal digits). `verify` takes key, signature and message,
        and raises Tampered, as `strongroom.crypto.signatures.verify` does."""
        if self._verified == public_key:  # this very object: what it says, and its signature, can't have changed
            return
        ((key_id, signature),) = self._parsed.signatures
        key = bytes.fromhex(public_key)
        # Named and not only tried: a text for one statement, whoever looks at it later.
        if key_id != hashlib.sha256(key).hexdigest():
            raise Tampered("statement.other_key", f"the statement by {self.by} is signed with another key")
        verify(key, signature, pre_authentication_encoding(PAYLOAD_TYPE, self.payload))
        vars(self)["_verified"] = public_key


@dataclass(frozen=True)
class Voice:
    """Somebody who speaks in a room, with the key that is there for it: looked up before a long job, not at its end."""

    room: str
    by: str
    signer: Signing
    clock: Callable[[], int]

    def say(self, kind: str, body: Mapping[str, Any]) -> Statement:
        """A new statement of now; errors as `Statement.sign`."""
        return Statement.sign(kind, body, room=self.room, by=self.by, at=self.clock(), signer=self.signer)


@lru_cache(maxsize=512)
def _decoded(envelope: str) -> Statement:
    return Statement._of(envelope)  # noqa: SLF001 - the same noun; what raises is not kept


def _malformed(why: str) -> Tampered:
    return Tampered("statement.malformed", f"a signed statement is malformed: {why}")
