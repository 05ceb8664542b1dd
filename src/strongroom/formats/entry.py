"""Entries of the ledger (spec/ledger.md, sections 2 and 3)."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from strongroom.core import canonical
from strongroom.core.limits import LIMITS
from strongroom.errors import CannotVerify, LimitExceeded, Tampered, UsageError

FORMAT = 1
CUSTODIAN = "custodian"
UNKNOWN = "unknown"
_MEMBERS = {"format", "type", "at", "by", "ref", "body", "private"}
_PRIVATE = b"strongroom/1 private\x00"
_SALT = 32

Kind = Callable[[Any], bool]


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= canonical.MAX_INTEGER


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _hexadecimal(digits: int) -> Kind:
    match = re.compile(rf"[0-9a-f]{{{digits}}}", re.ASCII).fullmatch
    return lambda value: type(value) is str and match(value) is not None


def or_empty(kind: Kind) -> Kind:
    """A kind: one of `kind`, or the empty text."""
    return lambda value: value == "" or kind(value)


def or_null(kind: Kind) -> Kind:
    """A kind: one of `kind`, or null."""
    return lambda value: value is None or kind(value)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_text, value)) and value == sorted(set(value))


def _object(**members: Kind) -> Kind:
    return lambda value: isinstance(value, dict) and conforms(value, members)


def one_of(*texts: str) -> Kind:
    """A kind: one of `texts`."""
    return lambda value: isinstance(value, str) and value in texts


def conforms(value: Mapping[str, Any], members: Mapping[str, Kind]) -> bool:
    """Whether `value` has exactly `members`, each of its kind."""
    if value.keys() != members.keys():
        return False
    for name, kind in members.items():  # noqa: SIM110 - a million entries are verified in this loop: all() takes twice as long
        if not kind(value[name]):
            return False
    return True


def with_optional(members: dict[str, Kind], more: Mapping[str, Kind], value: Mapping[str, Any]) -> dict[str, Kind]:
    """`members`, with those of `more` that `value` has."""
    return members | {name: kind for name, kind in more.items() if name in value}


TEXT, COUNT, FLAG, TEXTS = _text, _count, _flag, _texts
ID, SHORT, DIGEST = _hexadecimal(32), _hexadecimal(16), _hexadecimal(64)
STATE = one_of("active", "suspended", "removed")
_KEY = re.compile(r"(?:[0-9a-f]{2}){33,1024}", re.ASCII).fullmatch


def _key(value: Any) -> bool:
    return isinstance(value, str) and _KEY(value) is not None


KEY = _key  # a passkey's public key, in hexadecimal: longer than an Ed25519 key
METHOD = one_of("oidc", "x509")
FORMS = ("int4", "int8", "q4_0", "q8_0")  # in which a copy of floats may leave (spec/release.md, section 5)
FORM = one_of(*FORMS)
LEASED = one_of("load", "copy", "trace")
KEYSTORE = one_of("rotate", "recover")
KEPT = one_of("active", "ended")  # of an API key
GRANTING = one_of("officer", "executive")  # roles that let others in
_LEASE = _object(id=SHORT, holder=TEXT, action=LEASED, ref=TEXT, expires_at=COUNT, uses=or_null(_count))

# What the body of each type has.
BODIES: dict[str, dict[str, Kind]] = {
    "genesis": {"room": ID, "signer": DIGEST, "policy": DIGEST, "custody": TEXT},
    "principal": {
        "principal": TEXT,
        "key": or_empty(DIGEST),
        "person": TEXT,
        "roles": TEXTS,
        "teams": TEXTS,
        "state": STATE,
        "statement": TEXT,
    },
    "grant": {"id": SHORT, "principal": TEXT, "expires_at": COUNT, "statement": TEXT},
    "policy": {"digest": DIGEST, "proposal": SHORT, "break_glass": FLAG, "statement": TEXT},
    "proposal": {"id": SHORT, "digest": DIGEST, "enact_after": COUNT, "statement": TEXT},
    "put": {
        "version": ID,
        "revision": COUNT,
        "manifest": DIGEST,
        "bytes": COUNT,
        "positions": COUNT,
        "statement": TEXT,
    },
    "rotate": {"revision": COUNT, "manifest": DIGEST, "statement": TEXT},
    "shred": {"statement": TEXT},
    "request": {
        "id": SHORT,
        "action": LEASED,
        "for": TEXT,
        "duration": COUNT,
        "uses": or_null(_count),
        "expires_at": COUNT,
        "statement": TEXT,
    },
    "approve": {
        "id": SHORT,
        "duration": COUNT,
        "uses": or_null(_count),
        "roles": TEXTS,
        "statement": TEXT,
        "lease": or_null(_LEASE),
    },
    "deny": {"id": SHORT, "statement": TEXT},
    "release": {
        "action": one_of("load", "copy"),
        "holder": TEXT,
        "lease": or_null(SHORT),
        "revision": COUNT,
        "manifest": DIGEST,
        "public_key": DIGEST,
        "challenge": DIGEST,
        "break_glass": FLAG,
        "statement": TEXT,
    },
    "copy": {"holder": TEXT, "release": COUNT, "files": COUNT, "bytes": COUNT, "statement": TEXT},
    "renew": {"lease": SHORT, "expires_at": COUNT, "statement": TEXT},
    "revoke": {"target": TEXT, "statement": TEXT},
    "ceiling": {"holders": COUNT, "copies": COUNT, "copiers": COUNT, "statement": TEXT},
    "thaw": {"statement": TEXT},
    "refused": {"action": TEXT, "code": TEXT, "rule": TEXT},
    "clock": {"before": COUNT, "statement": TEXT},
    "trace": {"suspect": DIGEST, "lease": or_null(SHORT), "verdict": TEXT, "accused": TEXTS, "statement": TEXT},
    "review": {"size": COUNT, "findings": COUNT, "removed": COUNT, "statement": TEXT},
    "session": {
        "method": METHOD,
        "authority": TEXT,
        "public_key": DIGEST,
        "expires_at": COUNT,
        "proof": DIGEST,
        "statement": TEXT,
    },
    "passkey": {"key": KEY, "credential": TEXT, "state": one_of("active", "removed"), "statement": TEXT},
    "authority": {"id": SHORT, "authority": TEXT, "expires_at": or_null(_count), "statement": TEXT},
    "keystore": {"operation": KEYSTORE, "epoch": COUNT, "statement": TEXT},
    "redact": {"entry": COUNT, "statement": TEXT},
    "reinstate": {"principal": TEXT, "key": or_empty(DIGEST), "role": GRANTING, "statement": TEXT},
    "apikey": {
        "key": DIGEST,
        "principal": TEXT,
        "name": TEXT,
        "expires_at": COUNT,
        "state": KEPT,
        "statement": TEXT,
    },
    "inference": {
        "gateway": ID,
        "records": COUNT,
        "head": DIGEST,
        "requests": COUNT,
        "refused": COUNT,
        "tokens": COUNT,
        "bits": COUNT,
        "settings": DIGEST,
    },
}
# What it may have beside: absent, and not empty, where there is none.
OPTIONAL: dict[str, dict[str, Kind]] = {
    "principal": {"subject": DIGEST},
    "genesis": {"recovery": DIGEST},
    "release": {"form": FORM},
    "inference": {"capture": DIGEST, "statement": TEXT},
}
# What `private` may have.
_PRIVATE_NAMES: dict[str, frozenset[str]] = {
    "principal": frozenset({"oidc", "spiffe", "contact"}),
    "put": frozenset({"files"}),
    "refused": frozenset({"detail"}),
    "trace": frozenset({"detail"}),
    **{
        kind: frozenset({"reason"})
        for kind in ("proposal", "policy", "request", "deny", "release", "revoke", "clock", "thaw", "reinstate")
    },
}


@dataclass(frozen=True, init=False)
class Entry:
    """One entry. `body` has the members that the type demands; `private` maps names to commitments in hexadecimal."""

    type: str
    at: int
    by: str
    ref: str
    body: Mapping[str, Any]
    private: Mapping[str, str]

    def __init__(
        self,
        type: str,  # noqa: A002 - the member's name
        at: int,
        by: str,
        ref: str = "",
        body: Mapping[str, Any] | None = None,
        private: Mapping[str, str] | None = None,
    ) -> None:
        # Not through object.__setattr__, as a frozen dataclass does by itself: a log of a million is made of these.
        members = self.__dict__
        members["type"], members["at"], members["by"], members["ref"] = type, at, by, ref
        members["body"] = {} if body is None else body
        members["private"] = {} if private is None else private

    def encode(self) -> bytes:
        """Canonical JSON. ValueError or TypeError when it is not of its type (a fault of ours), LimitExceeded
        ``entry.too_large``."""
        body, private = self.body, self.private
        if type(body) is not dict or type(private) is not dict:
            body, private = dict(body), dict(private)
        if wrong := _unfit(self.type, self.at, self.by, self.ref, body, private):
            raise ValueError(f"not an entry of type {self.type}: {wrong}")
        data = canonical.encode_typed(
            {
                "at": self.at,
                "body": body,
                "by": self.by,
                "format": FORMAT,
                "private": private,
                "ref": self.ref,
                "type": self.type,
            }
        )
        if len(data) > LIMITS.entry:
            raise LimitExceeded(
                "entry.too_large", f"an entry of {len(data)} bytes; the log takes at most {LIMITS.entry}"
            )
        return data

    @classmethod
    def decode(cls, data: bytes) -> Entry:
        """The reverse: Tampered ``entry.malformed``, CannotVerify ``format.unknown``, LimitExceeded."""
        if len(data) > LIMITS.entry:
            raise LimitExceeded("entry.too_large", f"an entry of {len(data)} bytes; at most {LIMITS.entry} are read")
        value = canonical.decode_typed(data, what="an entry of the log")
        if isinstance(value, dict) and type(value.get("format")) is int and value["format"] > FORMAT:
            raise CannotVerify(
                "format.unknown",
                f"the log has an entry of format {value['format']}",
                hint="install a newer Strongroom, as docs/how-to/install.md says",
            )
        if wrong := _fault(value):
            raise Tampered("entry.malformed", f"an entry of the log is malformed: {wrong}")
        del value["format"]
        return cls(**value)


def _fault(value: Any) -> str:
    """What is wrong with the parsed entry `value`, or nothing."""
    if not isinstance(value, dict) or value.keys() != _MEMBERS:
        return "it does not have exactly the members of one"
    if value["format"] != FORMAT or type(value["format"]) is not int:
        return "it is of another format"
    return _unfit(value["type"], value["at"], value["by"], value["ref"], value["body"], value["private"])


def _unfit(kind: Any, at: Any, by: Any, ref: Any, body: Any, private: Any) -> str:
    """Why an entry of format 1 can't have these members, or nothing."""
    members = BODIES.get(kind) if isinstance(kind, str) else None
    if members is None:
        return "its type is not known"
    if not _count(at) or not isinstance(by, str) or not isinstance(ref, str):
        return "time, principal or reference is not one"
    if not isinstance(body, dict):
        return f"its body is not that of type {kind}"
    if kind in OPTIONAL:
        members = with_optional(members, OPTIONAL[kind], body)
    if not conforms(body, members):
        return f"its body is not that of type {kind}"
    if not isinstance(private, dict):
        return "what it says to be private is not"
    if private and not (private.keys() <= _PRIVATE_NAMES.get(kind, frozenset()) and all(map(DIGEST, private.values()))):
        return "what it says to be private is not"
    return ""


@dataclass(frozen=True)
class Private:
    """A value that is kept beside the log, which has its commitment only. `repr` does not show it."""

    name: str
    value: str = field(repr=False)
    salt: bytes = field(repr=False)

    @classmethod
    def fresh(cls, name: str, value: str) -> Private:
        return cls(name, value, os.urandom(_SALT))

    @property
    def commitment(self) -> str:
        """SHA-256 over label, salt, and canonical JSON of name and value, in hexadecimal. UsageError
        ``private.text``."""
        try:
            said = canonical.encode([self.name, self.value])
        except ValueError:  # half a surrogate pair: an argument of the command line that is not UTF-8
            raise UsageError("private.text", f"the {self.name} is not text") from None
        return hashlib.sha256(_PRIVATE + self.salt + said).hexdigest()

    def check(self, commitment: str) -> None:
        """Tampered ``entry.private`` unless this is the value that was committed to."""
        if len(self.salt) != _SALT or not hmac.compare_digest(self.commitment, commitment):
            raise Tampered("entry.private", f"the {self.name} kept beside the log is not the one that was recorded")
